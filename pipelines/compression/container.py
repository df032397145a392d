"""The container of compressed images: a header, the names of the images, and chunks of coded tokens.

stream   "smalti\\0" | version u8 | section of the header | section of the names | section of a chunk ...
section  length u32 | content | CRC-32 of the content u32
header   pipeline 16 B | image c, h, w u16 | images u32 | images of a chunk u16 | lossless u8
names    UTF-8, a zero byte between two; empty without names
chunk    CRC-32 of what it decodes to u32 | exceptions u32 | bytes of tokens u32 | exceptions u32 ... | tokens | pixels

Numbers are little-endian. Every length is checked against what is left of the stream, and every checksum before
anything is decoded. A checksum finds damage, not malice.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION = b"smalti\0", 1
MAX_PART = 255  # bytes that file systems take as the name of a file or a folder
NUMBER, HEADER, CHUNK = struct.Struct("<I"), struct.Struct("<16s3HIH?"), struct.Struct("<III")


class StreamError(ValueError):
    """What is wrong with a stream, read or about to be written."""


class DamagedStream(StreamError):
    """The stream is cut off or was changed: another copy of the file may be whole."""


class ModelMismatch(StreamError):
    """The stream was made by another pipeline, or this machine computes other probabilities."""


class Header(NamedTuple):
    """What a stream says of all its chunks. pipeline: 16 bytes that identify it; image: (C, H, W); lossless: whether
    the chunks hold pixels beside the tokens; names: of all images, or none."""

    pipeline: bytes
    image: tuple[int, int, int]
    images: int
    chunk_images: int
    lossless: bool
    names: tuple[str, ...]

    @property
    def num_chunks(self) -> int:
        """Number of chunks; all but the last are full."""
        return -(-self.images // self.chunk_images)


class Chunk(NamedTuple):
    """Some coded images: tokens, and in a lossless stream pixels. exceptions: ascending positions of the symbols that
    were coded uniformly, counted through tokens and then pixels; digest: the CRC-32 of what was coded."""

    exceptions: NDArray[np.uint32]
    tokens: bytes | memoryview
    pixels: bytes | memoryview
    digest: int


def write_stream(file: BinaryIO, header: Header, chunks: Iterable[Chunk]) -> int:
    """Write a stream, one chunk in memory at a time, and return its number of bytes. Raises `StreamError` for names
    that cannot be files, before anything is written."""
    check_names(header)
    size = file.write(MAGIC + bytes([VERSION]))
    fields = HEADER.pack(header.pipeline, *header.image, header.images, header.chunk_images, header.lossless)
    size += file.write(section(fields)) + file.write(section("\0".join(header.names).encode()))
    for exceptions, tokens, pixels, digest in chunks:
        sizes = CHUNK.pack(digest, len(exceptions), len(tokens))
        size += file.write(section(b"".join((sizes, exceptions.astype("<u4").tobytes(), tokens, pixels))))
    return size


def section(content: bytes) -> bytes:
    """`content` with its length and its checksum."""
    return NUMBER.pack(len(content)) + content + NUMBER.pack(crc32(content))


def read_stream(data: bytes) -> tuple[Header, list[Chunk]]:
    """The header and the chunks of a stream, which are parts of `data`, all checked. Raises `StreamError`."""
    if not data.startswith(MAGIC):
        raise StreamError("not a stream that smalti compressed" if data else "the file is empty")
    reader = Reader(memoryview(data)[len(MAGIC) :])
    if (version := reader.take(1)[0]) != VERSION:
        raise StreamError(f"the stream has format version {version}, this version of smalti reads {VERSION}")
    header = read_header(reader.section(), reader.section())
    chunks = [read_chunk(reader.section()) for _ in range(header.num_chunks)]
    if len(reader.left):
        raise DamagedStream(f"{len(reader.left)} bytes follow the end of the stream")
    return header, chunks


class Reader:
    """Takes parts of a stream in turn. Raises `DamagedStream` where it ends early."""

    def __init__(self, data: memoryview) -> None:
        self.left = data

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        if size > len(self.left):
            raise DamagedStream("the stream is cut off")
        taken, self.left = self.left[:size], self.left[size:]
        return taken

    def section(self) -> memoryview:
        """The content of the next section, checked."""
        (size,) = NUMBER.unpack(self.take(NUMBER.size))
        content = self.take(size)
        if NUMBER.unpack(self.take(NUMBER.size)) != (crc32(content),):
            raise DamagedStream("the stream is damaged: a checksum differs")
        return content


def read_header(fields: memoryview, names: memoryview) -> Header:
    """The header from its two sections, checked."""
    try:
        pipeline, channels, height, width, images, chunk_images, lossless = HEADER.unpack(fields)
        called = tuple(bytes(names).decode().split("\0")) if len(names) else ()
    except (struct.error, UnicodeDecodeError) as error:
        raise DamagedStream(f"the stream is damaged: {error}") from error
    if not chunk_images:
        raise DamagedStream("the stream is damaged: its chunks are of no images")
    header = Header(pipeline, (channels, height, width), images, chunk_images, lossless, called)
    check_names(header)
    return header


def read_chunk(content: memoryview) -> Chunk:
    """The chunk from its section, checked."""
    reader = Reader(content)
    digest, exceptions, tokens = CHUNK.unpack(reader.take(CHUNK.size))
    positions = np.frombuffer(reader.take(exceptions * NUMBER.size), "<u4")
    return Chunk(positions, reader.take(tokens), reader.left, digest)


def check_names(header: Header) -> None:
    """Raise `StreamError` unless every image has a name that is a file of its own, inside the folder to which it will
    be restored; or none has a name."""
    names = header.names
    if names and len(names) != header.images:
        raise StreamError(f"there are {len(names)} names for {header.images} images")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise StreamError(f"two images are called {repeated[0][:80]!r}")
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    for name in names:
        if problem := problem_with(name.split("/")):
            raise StreamError(f"an image is called {name[:80]!r}: {problem}")
        if name in folders:
            raise StreamError(f"{name[:80]!r} is both an image and a folder")


def problem_with(parts: Sequence[str]) -> str | None:
    """Why a name of these parts cannot be a file below a folder, if it cannot."""
    if {"", ".", ".."} & {*parts} or re.match("[A-Za-z]:", parts[0]):
        return "a name should be relative, without . and .."
    if re.search(r"[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]", "".join(parts)):
        return "a name should be UTF-8, without a backslash or a control character"
    if max(len(part.encode()) for part in parts) > MAX_PART:
        return f"a name should have at most {MAX_PART} bytes"
    return None
