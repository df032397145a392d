"""Stamps, which show whether a file has changed since a run began, so that a run never continues with other images.

The stamp of a file on this machine is its size, the time of its last write (mtime) and of its last change of any kind
(ctime). ctime also detects a file that was rewritten and given its old date, and another file that was moved to its
name, without inode numbers, which some network file systems make up. But `touch`, `chmod` and a new hard link, which do
not change the data, count as changes too. Two changes are not detected: a write within the same tick of the file
system's clock (some milliseconds) in which the stamp was taken; and, on NFS, a write by another machine during a read,
until the file is opened again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from tokenizer.files import one_line

from ..config import UserError

TOLD = ("ETag", "etag", "blob_id", "Content-MD5", "md5Hash", "Digest", "Last-Modified", "LastModified", "mtime")

Stamp = tuple[int, int, int]
MISSING: Stamp = (-1, -1, -1)


class FileChanged(UserError):
    """A file has changed since the run began. It does not count as a bad image, and nothing replaces it."""

    def __init__(self, name: str | Path) -> None:
        super().__init__(one_line(f"{name}: it has changed since the run started; start the run again"))


class KnownFile(NamedTuple):
    """The file of an image, and the stamp that it had when it was found; None: any stamp is accepted."""

    path: Path
    stamp: Stamp | None


def stamp_of(facts: os.stat_result) -> Stamp:
    """Size in bytes, mtime and ctime in nanoseconds."""
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def stamp_at(path: str | Path) -> Stamp:
    """The stamp of the file at a path, following links; `MISSING` if there is none."""
    try:
        return stamp_of(os.stat(path))
    except (OSError, ValueError):
        return MISSING


def require_stamp(path: Path, stamp: Stamp | None, facts: os.stat_result) -> None:
    """Raise `FileChanged` if the open file at `path`, with these `facts`, has another stamp."""
    if stamp is not None and stamp_of(facts) != stamp:
        raise FileChanged(path)


def size_and_dates(facts: os.stat_result) -> tuple[int, str]:
    """The stamp of a shard: its size, and the dates as text."""
    size, written, changed = stamp_of(facts)
    return size, f"{written} {changed}"


def stamp_told(info: dict[str, Any], url: str) -> str:
    """The server's facts about a file that change when the file does; "" if there are none, and then only the length
    detects a change.

    Over http, all of these facts. Elsewhere only the most specific one: a listing and an answer write dates with
    different digits.
    """
    told = [f"{name}={info[name]}" for name in TOLD if info.get(name)]
    return " ".join(told if url.startswith("http") else told[:1])
