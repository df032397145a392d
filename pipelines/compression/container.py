"""The container format of compressed images: a header, the names of the images, and chunks of coded tokens.

stream   "smalti\\0" | version u8 | section of the header | section of the names [| section of the sizes]
         | section of a chunk ...
section  length u32 | content | CRC-32 of the content u32
header   pipeline 16 B | image c, h, w u16 | images u32 | images of a chunk u16 | lossless u8 [| condition 8 B]
names    UTF-8, separated by zero bytes; empty without names
sizes    height u16, width u16 of each image
chunk    CRC-32 of the decoded data u32 | exceptions u32 | bytes of tokens u32 | classes u8 | exceptions u32 ...
         | tokens | pixels

Only streams of versions 2 and 3 have `condition`, the first bytes of the sha256 of the columns that images are
conditioned on (`digest_condition`), with the rows of all images in order; the reader must have these columns. In
version 3 they are zero without a condition. Only a stream of version 3 has `sizes`: its chunks contain, instead of
images, the tiles of `image` that cover each of them side by side, from the upper left, the last ones flush with its
border. Numbers are little-endian. Every length is checked against the rest of the stream, and every checksum before
anything is decoded.
Checksums detect damage, not malice.
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

from ..images.formats import MAX_PIXELS, MAX_SIDE

MAGIC, VERSION, VERSION_WITH_CONDITION, VERSION_WITH_TILES = b"smalti\0", 1, 2, 3
NO_CONDITION = bytes(8)
MAX_PART = 255  # maximum length of a file or folder name, in bytes
NUMBER, CHUNK = struct.Struct("<I"), struct.Struct("<III?")
PLAIN, CONDITIONED = struct.Struct("<16s3HIH?"), struct.Struct("<16s3HIH?8s")
HEADERS = {VERSION: PLAIN, VERSION_WITH_CONDITION: CONDITIONED, VERSION_WITH_TILES: CONDITIONED}


class StreamError(ValueError):
    """A stream cannot be read or written."""


class DamagedStream(StreamError):
    """The stream is truncated or corrupted."""


class ModelMismatch(StreamError):
    """The stream was made by another pipeline, or this machine computes different probabilities."""


class Header(NamedTuple):
    """The header of a stream. pipeline: 16 bytes that identify it; image: (C, H, W); lossless: whether chunks contain
    pixels in addition to tokens; names: of all images, or empty; condition: 8 bytes that identify the condition of the
    images, without which they cannot be decoded, or empty; sizes: (height, width) of each image if tiles of the shape
    `image` cover it, or None."""

    pipeline: bytes
    image: tuple[int, int, int]
    images: int
    chunk_images: int
    lossless: bool
    names: tuple[str, ...]
    condition: bytes = b""
    sizes: tuple[tuple[int, int], ...] | None = None

    @property
    def num_coded(self) -> int:
        """Number of images in all chunks, or of tiles."""
        if self.sizes is None:
            return self.images
        _, height, width = self.image
        return sum(-(-down // height) * -(-right // width) for down, right in self.sizes)

    @property
    def num_chunks(self) -> int:
        """Number of chunks; all except the last are full."""
        return -(-self.num_coded // self.chunk_images)


class Chunk(NamedTuple):
    """Coded images: tokens, and in a lossless stream pixels. exceptions: ascending positions of uniformly coded
    symbols, counting classes first, then tokens, then pixels; digest: the CRC-32 of the decoded content; classes:
    whether `tokens` begins with the class of each image, given which its tokens are coded."""

    exceptions: NDArray[np.uint32]
    tokens: bytes | memoryview
    pixels: bytes | memoryview
    digest: int
    classes: bool = False


def write_stream(file: BinaryIO, header: Header, chunks: Iterable[Chunk]) -> int:
    """Write a stream, one chunk at a time, and return its size in bytes. Raises `StreamError` for invalid names before
    anything is written."""
    check_file_names(header)
    pipeline, image, images, chunk_images, lossless, names, condition, sizes = header
    version, last = (VERSION_WITH_CONDITION, [condition]) if condition else (VERSION, [])
    if sizes is not None:
        version, last = VERSION_WITH_TILES, [condition or NO_CONDITION]
        if problem := find_size_problem(header):
            raise StreamError(problem)
    written = file.write(MAGIC + bytes([version]))
    fields = HEADERS[version].pack(pipeline, *image, images, chunk_images, lossless, *last)
    written += file.write(pack_section(fields)) + file.write(pack_section("\0".join(names).encode()))
    if sizes is not None:
        written += file.write(pack_section(np.array(sizes, "<u2").tobytes()))
    for exceptions, tokens, pixels, digest, classes in chunks:
        lengths = CHUNK.pack(digest, len(exceptions), len(tokens), classes)
        written += file.write(pack_section(b"".join((lengths, exceptions.astype("<u4").tobytes(), tokens, pixels))))
    return written


def pack_section(content: bytes) -> bytes:
    return NUMBER.pack(len(content)) + content + NUMBER.pack(crc32(content))


def read_stream(data: bytes) -> tuple[Header, list[Chunk]]:
    """Parse and check a stream into its header and chunks, which are views of `data`. Raises `StreamError`."""
    if not data.startswith(MAGIC):
        raise StreamError("not a file written by smalti compress" if data else "the file is empty")
    reader = Reader(memoryview(data)[len(MAGIC) :])
    if (version := reader.take(1)[0]) not in HEADERS:
        read = f"{min(HEADERS)} to {max(HEADERS)}"
        newer = "; a newer Smalti is needed" if version > max(HEADERS) else ""
        raise StreamError(f"the stream has format version {version}, this Smalti reads {read}{newer}")
    header = parse_header(HEADERS[version], reader.section(), reader.section())
    if version == VERSION_WITH_TILES:
        header = read_sizes(header, reader.section())
    chunks = [read_chunk(reader.section()) for _ in range(header.num_chunks)]
    if len(reader.left):
        raise DamagedStream(f"{len(reader.left)} bytes follow the end of the stream")
    return header, chunks


class Reader:
    """Reads parts of a stream in turn. Raises `DamagedStream` if it ends early."""

    def __init__(self, data: memoryview) -> None:
        self.left = data

    def take(self, size: int) -> memoryview:
        if size > len(self.left):
            raise DamagedStream("the stream is truncated")
        taken, self.left = self.left[:size], self.left[size:]
        return taken

    def section(self) -> memoryview:
        """Read and check the content of the next section."""
        (size,) = NUMBER.unpack(self.take(NUMBER.size))
        content = self.take(size)
        if NUMBER.unpack(self.take(NUMBER.size)) != (crc32(content),):
            raise DamagedStream("the stream is damaged: wrong checksum")
        return content


def parse_header(form: struct.Struct, fields: memoryview, names: memoryview) -> Header:
    """Parse and check the header from its two sections. form: the fields of its version."""
    try:
        pipeline, channels, height, width, images, chunk_images, lossless, *condition = form.unpack(fields)
        called = tuple(bytes(names).decode().split("\0")) if len(names) else ()
    except (struct.error, UnicodeDecodeError) as error:
        raise DamagedStream(f"the stream is damaged: {error}") from error
    if not chunk_images:
        raise DamagedStream("the stream is damaged: its chunks contain no images")
    header = Header(pipeline, (channels, height, width), images, chunk_images, lossless, called, *condition)
    check_file_names(header)
    return header


def read_sizes(header: Header, content: memoryview) -> Header:
    if len(content) != 4 * header.images:
        raise DamagedStream(f"the stream is damaged: {len(content)} bytes for the sizes of {header.images} images")
    sizes = tuple((int(down), int(right)) for down, right in np.frombuffer(content, "<u2").reshape(-1, 2))
    condition = b"" if header.condition == NO_CONDITION else header.condition
    header = header._replace(condition=condition, sizes=sizes)
    if problem := find_size_problem(header):
        raise DamagedStream(f"the stream is damaged: {problem}")
    return header


def find_size_problem(header: Header) -> str | None:
    """Return why tiles cannot cover images of these sizes, or None."""
    _, height, width = header.image
    if not height or not width:
        return "its tiles have no pixels"
    if header.sizes is not None and len(header.sizes) != header.images:
        return f"got {len(header.sizes)} sizes for {header.images} images"
    for number, (down, right) in enumerate(header.sizes or ()):
        if down < height or right < width:
            return f"image {number}: {down} x {right} pixels, smaller than a tile of {height} x {width}"
        if max(down, right) > MAX_SIDE or down * right > MAX_PIXELS:
            return f"image {number}: {down} x {right} pixels; the limit is {MAX_PIXELS} and {MAX_SIDE} per side"
    return None


def read_chunk(content: memoryview) -> Chunk:
    reader = Reader(content)
    digest, exceptions, tokens, classes = CHUNK.unpack(reader.take(CHUNK.size))
    positions = np.frombuffer(reader.take(exceptions * NUMBER.size), "<u4")
    return Chunk(positions, reader.take(tokens), reader.left, digest, classes)


def check_file_names(header: Header) -> None:
    """Raise `StreamError` unless there are no names, or one distinct, valid file name below the output folder per
    image."""
    names = header.names
    if names and len(names) != header.images:
        raise StreamError(f"got {len(names)} names for {header.images} images")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise StreamError(f"two images have the name {repeated[0][:80]!r}")
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    for name in names:
        if problem := find_name_problem(name.split("/")):
            raise StreamError(f"invalid image name {name[:80]!r}: {problem}")
        if name in folders:
            raise StreamError(f"{name[:80]!r} is both an image and a folder")


def find_name_problem(parts: Sequence[str]) -> str | None:
    """Return why a name with these parts is not a valid file below a folder, or None."""
    if {"", ".", ".."} & {*parts} or re.match("[A-Za-z]:", parts[0]):
        return "must be relative, without . and .."
    if re.search(r"[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]", "".join(parts)):
        return "must be UTF-8, without backslashes and control characters"
    if max(len(part.encode()) for part in parts) > MAX_PART:
        return f"must have at most {MAX_PART} bytes per part"
    return None
