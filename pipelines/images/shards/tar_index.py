"""What lies where in a tar file: the names, places and sizes of its files, found by reading headers alone.

`tarfile` reads the headers. It takes one of any size into memory, so it is given a file that refuses long reads. It
also takes damage for the end of the archive, so the end is checked. Nothing is extracted: names that lead out of a
folder, links and devices are just names that no image has.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER = 1 << 14
"""Bytes of a pax or GNU header, which holds a name; those of one file take at most twice as many together."""


class TarError(ValueError):
    """The file is not a tar, is damaged or ends early; the message says where."""


@dataclass(frozen=True)
class Member:
    """A regular file in the tar: its `size` bytes begin at `offset`."""

    name: str
    offset: int
    size: int


def scan(file: BinaryIO, length: int) -> Iterator[Member]:
    """The regular files of a tar of `length` bytes, in their order. Raises `TarError`."""
    headers = Headers(file, length)
    tar = opened(headers)
    while member := next_member(tar, headers):
        regular = member.isreg() and not member.issparse()
        end = max(tar.offset, member.offset_data + member.size) if regular else tar.offset
        if member.size < 0 or tar.offset <= member.offset:
            raise TarError(f"no header of a tar at byte {member.offset}")
        if end > length:
            raise TarError(f"it ends at byte {length}, inside a file that goes on to byte {end}")
        if regular:
            yield Member(member.name, member.offset_data, member.size)
    headers.seek(tar.offset)
    if headers.read(BLOCK).strip(b"\0"):
        raise TarError(f"no header of a tar at byte {tar.offset}")


def opened(headers: Headers) -> tarfile.TarFile:
    """The archive, whose first headers are read."""
    with headers.of_a_member():
        return tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="replace")  # type: ignore[arg-type]


def next_member(tar: tarfile.TarFile, headers: Headers) -> tarfile.TarInfo | None:
    """The next file, folder or link; None at the end, and where no header follows. Raises `TarError`."""
    with headers.of_a_member():
        member = tar.next()
    tar.members.clear()  # else it keeps all of them, and all global headers
    tar.pax_headers.clear()
    return member


class Headers:
    """A file of `length` bytes of which little can be read at a time, and for one member."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file = file
        self.length = length
        self.used = 0

    @contextmanager
    def of_a_member(self) -> Iterator[None]:
        """To read the headers of one member. Raises `TarError` for what `tarfile` raises."""
        self.used = 0
        try:
            yield
        except TarError:
            raise
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise TarError(f"no header of a tar at byte {max(0, self.tell() - BLOCK)}") from error

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, place: int) -> None:
        self.file.seek(place)

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises `TarError` for too many, and at the end of the file."""
        place = self.tell()
        self.used += size
        if size > MAX_HEADER:
            raise TarError(f"a header of {size} bytes at byte {place}; the limit is {MAX_HEADER}")
        if size < 0 or self.used > 2 * MAX_HEADER:
            raise TarError(f"no header of a tar at byte {place}")
        data = self.file.read(size) if place + size <= self.length else b""
        if len(data) != size:
            raise TarError(f"it ends at byte {self.length}, without an end mark")
        return data
