"""One untrusted file: opened once, only in allowed places, up to an allowed size, and hashed while it is read, so that
the bytes whose sha256 was verified are the bytes that are parsed."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from .errors import IntegrityError, LimitError, PathError, PipelineLoadError, UnreadableError, shown
from .json_text import MAX_JSON_BYTES, parse_json

BLOCK = 1 << 20

Roots = tuple[str, ...]
"""Resolved folders; a file has to be in one of them. Empty: it may be anywhere."""


class ReadOnce:
    """An open file of `size` bytes, read from front to back; `finish` compares its hash to `sha256`, if not None."""

    def __init__(self, file: FileIO, path: Path, size: int, sha256: str | None) -> None:
        self.path, self.size = path, size
        self._file, self._sha256, self._digest, self._position = file, sha256, hashlib.sha256(), 0

    def read(self, count: int) -> bytes:
        """The next `count` bytes. Raises `IntegrityError` if there are fewer."""
        data = bytearray(count)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes. Raises `IntegrityError` if there are fewer."""
        done = 0
        while done < len(buffer):  # in blocks, each of which is hashed while it is in the processor's cache
            part = buffer[done : done + BLOCK]
            count = self._file.readinto(part)
            if not count:
                raise IntegrityError(f"{self.path}: ended after {self._position} of {self.size} bytes")
            self._take(part[:count])
            done += count

    def status(self) -> os.stat_result:
        """The system's present facts about the open file."""
        return os.fstat(self._file.fileno())

    def finish(self) -> None:
        """Read the rest, and raise `IntegrityError` unless the whole file is the one that the manifest lists."""
        while (rest := self._file.read(BLOCK)) and self._position <= self.size:
            self._take(rest)
        if self._position != self.size:
            raise IntegrityError(f"{self.path}: {self._position} bytes, {self.size} when it was opened")
        if self._sha256 is not None and self._digest.hexdigest() != self._sha256:
            raise IntegrityError(
                f"{self.path}: its sha256 differs from the manifest; the file was changed after saving"
            )

    def _take(self, data: bytes | memoryview) -> None:
        self._position += len(data)
        if self._sha256 is not None:
            self._digest.update(data)


def roots_of(folder: Path) -> Roots:
    """Where the files of `folder` may be: in the folder itself and, in the Hub's cache, among the blobs of the same
    repository."""
    real = Path(os.path.realpath(folder))
    for place in real.parents:
        if place.name == "snapshots" and place.parent.name.startswith(("models--", "datasets--")):
            return str(real), str(place.parent / "blobs")
    return (str(real),)


@contextmanager
def opened(path: Path, limit: int, roots: Roots = (), entry: dict[str, Any] | None = None) -> Iterator[ReadOnce]:
    """Open a regular file of at most `limit` bytes; it must have the size and, at the end, the sha256 of the manifest's
    `entry`.

    Raises `PathError` if it is missing, leads out of the `roots` or is not a regular file (reading a pipe would block,
    reading a device would have effects), `LimitError` if it is larger, `IntegrityError` if it changes meanwhile.
    """
    try:
        file = os.fdopen(_descriptor(path, roots), "rb", buffering=0)
    except ValueError as error:
        raise error if isinstance(error, PipelineLoadError) else PathError(f"{path}: no such file") from error
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise PathError(f"{path}: no such file") from error
        raise kind_of_failure(error)(f"{path}: {error.strerror}") from error
    with file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise PathError(f"{path}: not a regular file")
        if info.st_size > limit:
            raise LimitError(f"{path}: {info.st_size} bytes, at most {limit} allowed")
        if entry and info.st_size != entry["size"]:
            raise IntegrityError(f"{path}: {info.st_size} bytes, the manifest says {entry['size']}")
        once = ReadOnce(file, path, info.st_size, entry["sha256"] if entry else None)
        try:
            try:
                yield once
            except PipelineLoadError:
                if entry:
                    once.finish()
                raise
            once.finish()
        except OSError as error:
            raise UnreadableError(f"{path}: cannot be read ({error.strerror})") from error


def _descriptor(path: Path, roots: Roots) -> int:
    """Open `path`: links are resolved once, and the target is opened without following further links."""
    real = os.path.realpath(path, strict=True)
    root = next((root for root in roots if real.startswith(os.path.join(root, ""))), None)
    if roots and root is None:
        raise PathError(f"{path}: a link that leads out of the folder, to {shown(real)}; `cp -L` makes files of links")
    if not stat.S_ISREG(os.lstat(real).st_mode):
        raise PathError(f"{path}: not a regular file")
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    if root is None or os.open not in os.supports_dir_fd:
        return os.open(real, flags)
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in Path(real).relative_to(root).parts:
        try:
            inner = os.open(name, flags, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def read_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes, read once.

    Raises `PathError` if it is missing or not a regular file, `LimitError` if it is larger.
    """
    with opened(Path(path), limit) as file:
        return file.read(file.size)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 1 MiB; see `parse_json`. Raises `PathError`, `LimitError` or
    `FormatError`."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


def kind_of_failure(error: Exception) -> type[PathError]:
    """`UnreadableError` if the file may exist nevertheless, `PathError` if there cannot be a file of this name."""
    names = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR)
    return UnreadableError if isinstance(error, OSError) and error.errno not in names else PathError
