"""One writer at a time for each folder: a lock that ends with the process that holds it, even if it is killed."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import PathError

try:
    import fcntl
except ImportError:  # Windows, which has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The file is in the folder while a process writes there, or after that process was killed."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep all other processes from writing into `folder`, which must exist, during the block. Raises `PathError` that
    names the process that writes there already."""
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    with path.open("a+b") as file:
        # The lock of a deleted file (its process has just ended) keeps nobody out.
        if not _locked(file.fileno(), fcntl.LOCK_EX) or not _is_still(file.fileno(), path):
            raise PathError(taken(folder))
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.truncate(0)
        file.write(json.dumps(facts).encode())
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def require_unclaimed(folder: Path) -> None:
    """Raise `PathError` if another process is writing into `folder`; several processes may call this at once."""
    if fcntl is None or not (folder / LOCK).is_file():
        return
    with (folder / LOCK).open("rb") as file:
        if not _locked(file.fileno(), fcntl.LOCK_SH):
            raise PathError(taken(folder))


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def taken(folder: Path) -> str:
    """The message that a process holds the folder, and which one if that is known."""
    try:
        facts = json.loads((folder / LOCK).read_text())
        who = f"process {int(facts['pid'])} on {facts['host']} has been writing into this folder since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process is writing into this folder"
    return f"{folder}: {who}; a folder takes one writer at a time, nothing was changed"
