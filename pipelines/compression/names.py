"""The names of the images in a stream: short, relative, and inside the folder they are restored to."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from itertools import pairwise

from .chunks import Reader
from .header import CRC, StreamError, sealed

MAX_NAME, MAX_PART = 1024, 255  # bytes, of all of it and of what a file system takes as one name
_NAME_LENGTH = struct.Struct("<H")


def check_names(names: Sequence[str]) -> None:
    """Raise a `StreamError` unless every name is a file of its own below the folder it will be restored to."""
    for name in names:
        if problem := _problem_with(name):
            raise StreamError(f"name {name[:80]!r}: {problem}")
    # With the lowest character as separator, a folder is followed at once by what it holds.
    for name, following in pairwise(sorted(name.replace("/", "\0") for name in names)):
        if following == name or following.startswith(name + "\0"):
            problem = "appears twice" if following == name else "is a file and a folder"
            raise StreamError(f"name {name.replace(chr(0), '/')[:80]!r}: {problem}")


def _problem_with(name: str) -> str | None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "cannot be written as UTF-8"
    if not 1 <= size <= MAX_NAME:
        return f"takes {size} bytes, allowed are 1 to {MAX_NAME}"
    if re.search(r"[\\\x00-\x1f\x7f-\x9f]", name):
        return "holds a backslash or a control character"
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "should be relative"
    if {"", ".", ".."} & set(name.split("/")):
        return "should not hold an empty part, . or .."
    return None


def restored(name: str) -> str:
    """The name of the PNG file that an image of this name is restored to."""
    return name if os.path.splitext(name)[1].lower() == ".png" else f"{name}.png"  # as for ..png


def check_restorable(names: Sequence[str]) -> None:
    """Raise a `StreamError` for bad names, and for those that could not all be restored: two as one file, one as
    none."""
    check_names(names)
    files: dict[str, str] = {}
    for name in names:
        if (other := files.setdefault(restored(name), name)) != name:
            raise StreamError(f"{other!r} and {name!r} would both come back as {restored(name)!r}; rename one")
        if any(len(part.encode()) > MAX_PART for part in restored(name).split("/")):
            raise StreamError(f"{name!r} would come back as a PNG file whose name is too long; rename it")
    check_names(list(files))


def pack_names(names: Sequence[str]) -> bytes:
    """The table of names, with its checksum."""
    encoded = [name.encode() for name in names]
    return sealed(b"".join(_NAME_LENGTH.pack(len(name)) + name for name in encoded))


def read_names(reader: Reader, number: int) -> list[bytes]:
    """The table of names, its checksum unchecked."""
    where = f"names (at byte {reader.at})"
    encoded = []
    for _ in range(number):
        (size,) = reader.fields(_NAME_LENGTH, where)
        encoded.append(bytes(reader.take(size, where)))
    reader.take(CRC.size, where)
    return encoded


def decode_names(encoded: Sequence[bytes]) -> list[str]:
    """The names of a table, checked. Raises a `StreamError`."""
    try:
        names = [name.decode() for name in encoded]
    except UnicodeDecodeError as error:
        raise StreamError(f"names: {error.object[:80]!r} is not UTF-8") from error
    check_names(names)
    return names
