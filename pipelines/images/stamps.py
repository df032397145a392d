"""What tells a file from what it was when a run began, so that a run never goes on with other images in their places.

Of a file on this machine that is its size, when it was written last (mtime) and when anything about it changed last
(ctime). The latter also tells a file that was written anew and given its old date, and another one that was moved to
its name, without inode numbers, which some network file systems make up; but `touch`, `chmod` and a new hard link,
which leave the data alone, count as changes too. Not told: what is written within the same tick of the file system's
clock, some milliseconds, in which the file was first looked at; what another machine writes on NFS during a read, until
the file is opened again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from ..config import UserError

TOLD = ("ETag", "etag", "blob_id", "Content-MD5", "md5Hash", "Digest", "Last-Modified", "LastModified", "mtime")

Stamp = tuple[int, int, int]
MISSING: Stamp = (-1, -1, -1)


class FileChanged(UserError):
    """A file that is another one by now. It is no bad image: nothing takes its place."""

    def __init__(self, name: str | Path) -> None:
        super().__init__(f"{name}: it has changed since the run started; start the run again")


class KnownFile(NamedTuple):
    """A file of an image, and the stamp that it had when it was found; None: it may be any."""

    path: Path
    stamp: Stamp | None


def stamp_of(facts: os.stat_result) -> Stamp:
    """Size in bytes, mtime and ctime in nanoseconds."""
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def stamp_at(path: str | Path) -> Stamp:
    """What is at a path, behind links; `MISSING` where nothing can be found."""
    try:
        return stamp_of(os.stat(path))
    except (OSError, ValueError):
        return MISSING


def require_stamp(path: Path, stamp: Stamp | None, facts: os.stat_result) -> None:
    """Raise `FileChanged` if the open file at `path` has another stamp than this."""
    if stamp is not None and stamp_of(facts) != stamp:
        raise FileChanged(path)


def size_and_dates(facts: os.stat_result) -> tuple[int, str]:
    """The stamp of a shard: its size, and the dates as text."""
    size, written, changed = stamp_of(facts)
    return size, f"{written} {changed}"


def stamp_told(info: dict[str, Any], url: str) -> str:
    """What a server says of a file that changes when the file does; "" if nothing, and then its length alone tells.

    Over http that is all of it. Elsewhere it is what tells most: of dates, a listing and an answer have other digits.
    """
    told = [f"{name}={info[name]}" for name in TOLD if info.get(name)]
    return " ".join(told if url.startswith("http") else told[:1])
