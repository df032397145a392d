"""What lies where in a tar file: the names, places and sizes of its files, found by reading headers alone.

Nothing is extracted, so names that lead out of a folder, links and devices are just names that no image has. `tarfile`
is not used because it reads a pax or GNU header of any size into memory. The format is POSIX.1-1988 (ustar), with
pax (POSIX.1-2001) and GNU long names and sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_HEADER = 1 << 16  # bytes of a pax or GNU header, which holds a name
FILE, LONG_NAME, PAX, SPARSE = (b"0", b"\0", b"7"), b"L", b"x", b"S"
NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, FIFOs


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
    position, name, known = 0, "", dict[str, str]()
    while True:
        header = read_at(file, position, BLOCK, length)
        if not header.strip(b"\0"):
            return
        check(header, position)
        kind, size = header[156:157], number(header[124:136], position)
        position += BLOCK
        if kind == SPARSE:
            position = after_map(file, header, position, length)
        if kind in (LONG_NAME, PAX):
            if size > MAX_HEADER:
                raise TarError(f"a header of {size} bytes at byte {position}; the limit is {MAX_HEADER}")
            text = read_at(file, position, size, length)
            name = text.rstrip(b"\0").decode("utf-8", "replace") if kind == LONG_NAME else name
            known = pairs(text) if kind == PAX else known
        else:
            if kind in NO_DATA:
                size = 0
            elif known.get("size", "").isdecimal():
                size = int(known["size"])
            if kind in FILE and not any(key.startswith("GNU.sparse") for key in known):
                yield Member(known.get("path") or name or name_in(header), position, size)
            if kind not in (b"K", b"g"):  # which stand before a file, as its name may
                name, known = "", {}
        position += -(-size // BLOCK) * BLOCK
        if position > length:
            raise TarError(f"it ends at byte {length}, inside a file that goes on to byte {position}")


def read_at(file: BinaryIO, position: int, size: int, length: int) -> bytes:
    """`size` bytes at `position`."""
    file.seek(position)
    data = file.read(size) if position + size <= length else b""
    if len(data) != size:
        raise TarError(f"it ends at byte {length}, without an end mark")
    return data


def check(header: bytes, position: int) -> None:
    """Raise `TarError` unless the header's checksum is right: it is the sum of its bytes, with blanks for itself."""
    if sum(header) - sum(header[148:156]) + 8 * 32 != number(header[148:156], position):
        raise TarError(f"no header of a tar at byte {position}")


def number(field: bytes, position: int) -> int:
    """A number in octal digits, or in base 256 where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        value = int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise TarError(f"no header of a tar at byte {position}")
    return value


def name_in(header: bytes) -> str:
    """The name in a ustar header, its prefix included."""
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    has_prefix = header[257:263] == b"ustar\0" and prefix
    return (prefix + b"/" + name if has_prefix else name).decode("utf-8", "replace")


def pairs(text: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE` of a pax header, as far as they are well formed."""
    found, position = {}, 0
    while position < len(text):
        digits, _, _ = text[position : position + 20].partition(b" ")
        size = int(digits) if digits.isdigit() else 0
        record = text[position : position + size][len(digits) + 1 : -1]
        key, equals, value = record.partition(b"=")
        if size < len(digits) + 3 or not equals:
            break
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        position += size
    return found


def after_map(file: BinaryIO, header: bytes, position: int, length: int) -> int:
    """Where the data of a GNU sparse file begin: its map may go on in further blocks."""
    more = header[482]
    while more:
        more = read_at(file, position, BLOCK, length)[504]
        position += BLOCK
    return position
