"""The container of compressed images: a header, chunks of coded tokens, the names of the images.

stream  header | chunk ... chunk | names (where the header says so)
header  "VQC1" | version u8 | profile u8 | coder u8 | flags u8 | model_id 16 B | vocab_size u32 | grid h, w u16 |
        image c, h, w u16 | num_images u32 | chunk_images u16 | answer 8 B | CRC32C u32
chunk   count u16 | profile u8 | bytes of tokens u32 | bytes of pixels u32 (lossless only) | exceptions varint ... |
        tokens | pixels | CRC32C of what it decodes to u32 | CRC32C of the chunk u32
names   (length u16 | UTF-8) ... | CRC32C u32

Numbers are little-endian. `parse` believes nothing: bounds, then the exact length, then every checksum, all before a
payload is decoded or memory is set aside for what the header claims. A CRC finds damage, not malice; tokens that decode
otherwise than they were coded pass it once in 2^32. Of images it says nothing unless the stream is lossless: those are
made of the tokens afterwards, in float32, and differ by one grey level here and there between machines.
"""

from __future__ import annotations

import math
import re
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .crc32c import Data, crc32c

MAGIC, VERSION = b"VQC1", 1
RAW, GUARD = 0, 1  # profiles: ids packed into whole bits; ids coded under float64 tables with exceptions
NO_CODER, RANGE_CODER = 0, 1
LOSSLESS, NAMED = 1, 2  # flags
MAX_NAME = 1024  # bytes
# No coder needs more: an id below 2^20 costs at most 24 bits under 24-bit counts, and a coder flushes a few words.
SYMBOL_BYTES, FLUSH_BYTES = 8, 64

_HEADER = struct.Struct("<4sBBBB16sI2H3HIH8s")
_LOSSY_CHUNK, _LOSSLESS_CHUNK, _SUMS = struct.Struct("<HBI"), struct.Struct("<HBII"), struct.Struct("<II")
_CRC, _NAME_LENGTH = struct.Struct("<I"), struct.Struct("<H")
HEADER_BYTES = _HEADER.size + _CRC.size

Ids = NDArray[np.integer[Any]]
Pixels = NDArray[np.uint8]


class StreamError(ValueError):
    """The root of everything that can be wrong with a stream, read or about to be written."""


class TruncatedStream(StreamError):
    """The stream ends before its last part does."""


class DamagedStream(StreamError):
    """A checksum differs, two fields contradict each other, or something follows the end."""


class ForeignStream(StreamError):
    """Not one of our streams, or one of a version, profile or coder that is not known here."""


class ModelMismatch(StreamError):
    """Made by another model, or by a machine that computes other probabilities than this one."""


class StreamLimit(StreamError):
    """What the header announces is more than the caller allows."""


# checksums ----------------------------------------------------------------------------------------


def _check_crc(part: memoryview, where: str) -> None:
    if crc32c(part[: -_CRC.size]) != _CRC.unpack(part[-_CRC.size :])[0]:
        raise DamagedStream(f"{where}: damaged (its checksum differs)")


def _sealed(part: bytes) -> bytes:
    return part + _CRC.pack(crc32c(part))


# raw bits -----------------------------------------------------------------------------------------


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(values: Ids, bits: int) -> bytes:
    """Values in `[0, 2**bits)`, flattened, lowest bit first, the last byte filled with zeros. `bits` may be 0."""
    flat = np.asarray(values).reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >> bits):
        raise StreamError(f"values of {bits} bits lie in [0, {1 << bits}), got {int(flat.min())} to {int(flat.max())}")
    planes = np.empty((flat.size, bits), dtype=np.uint8)
    for bit in range(bits):
        planes[:, bit] = flat >> bit & 1
    return np.packbits(planes, bitorder="little").tobytes()


def unpack_bits(data: Data, count: int, bits: int) -> NDArray[np.int64]:
    """The inverse of `pack_bits`: (count,). Raises `DamagedStream` unless the length is exact and the filling is 0."""
    packed = np.frombuffer(data, dtype=np.uint8)
    if len(packed) != packed_bytes(count, bits):
        raise DamagedStream(f"{count} values of {bits} bits take {packed_bytes(count, bits)} bytes, got {len(packed)}")
    flat = np.unpackbits(packed, bitorder="little")
    if flat[count * bits :].any():
        raise DamagedStream(f"{count} values of {bits} bits: the bits after the last value should be 0")
    planes = flat[: count * bits].reshape(count, bits)
    values = np.zeros(count, dtype=np.int64)
    for bit in range(bits):
        values |= planes[:, bit].astype(np.int64) << bit
    return values


# header -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a stream says about all of its chunks: `grid` (h, w), `image` (c, h, w), `model_id` 16 bytes.

    `answer` holds 8 bytes of the digest of the known-answer check, `named` says that names follow the chunks, and
    `lossless` that every chunk has pixels beside its tokens. Raises a `StreamError` naming a field out of range.
    """

    profile: int
    coder: int
    lossless: bool
    named: bool
    model_id: bytes
    vocab_size: int
    grid: tuple[int, int]
    image: tuple[int, int, int]
    num_images: int
    chunk_images: int
    answer: bytes

    def __post_init__(self) -> None:
        if self.profile not in (RAW, GUARD):
            raise ForeignStream(f"header: profile {self.profile} is unknown; this version reads {RAW} and {GUARD}")
        if self.coder not in (NO_CODER, RANGE_CODER):
            raise ForeignStream(f"header: coder {self.coder} is unknown; this version reads {NO_CODER}, {RANGE_CODER}")
        if (self.profile == RAW) != (self.coder == NO_CODER):
            raise DamagedStream(f"header: profile {self.profile} does not go with coder {self.coder}")
        if (len(self.model_id), len(self.answer), len(self.grid), len(self.image)) != (16, 8, 2, 3):
            raise DamagedStream("header: model_id takes 16 bytes, answer 8, grid two sizes and image three")
        bounds = [("vocab_size", self.vocab_size, 1, 1 << 20), ("num_images", self.num_images, 0, (1 << 32) - 1)]
        bounds += [("chunk_images", self.chunk_images, 1, (1 << 16) - 1)]
        bounds += [("a side of grid", size, 1, (1 << 16) - 1) for size in self.grid]
        bounds += [("a size of image", size, 1, (1 << 16) - 1) for size in self.image]
        for name, value, low, high in bounds:
            if not low <= value <= high:
                raise DamagedStream(f"header: {name} is {value}, allowed are {low} to {high}")

    @property
    def num_tokens(self) -> int:
        """Of one image."""
        return math.prod(self.grid)

    @property
    def num_pixels(self) -> int:
        """Of one image, every channel counted."""
        return math.prod(self.image)

    @property
    def token_bits(self) -> int:
        """Of one id stored raw."""
        return (self.vocab_size - 1).bit_length()

    @property
    def num_chunks(self) -> int:
        """Every chunk but the last is full."""
        return -(-self.num_images // self.chunk_images)

    def images_in(self, index: int) -> int:
        """How many images chunk `index` holds."""
        return min(self.chunk_images, self.num_images - index * self.chunk_images)

    def symbols_in(self, count: int) -> tuple[int, ...]:
        """How many symbols `count` images have: tokens, and pixels in a lossless stream."""
        return (count * self.num_tokens, count * self.num_pixels)[: 1 + self.lossless]

    def pack(self) -> bytes:
        """`HEADER_BYTES` bytes."""
        flags = LOSSLESS * self.lossless | NAMED * self.named
        sizes = (self.vocab_size, *self.grid, *self.image, self.num_images, self.chunk_images)
        kind = (MAGIC, VERSION, self.profile, self.coder, flags)
        return _sealed(_HEADER.pack(*kind, self.model_id, *sizes, self.answer))

    @classmethod
    def unpack(cls, data: Data) -> Header:
        """The header at the front of `data`. Raises a `StreamError`: length, magic, version, checksum, then fields."""
        view = memoryview(data)[:HEADER_BYTES]
        if not MAGIC.startswith(bytes(view[: len(MAGIC)])):  # said of a short file too: it is no shortened stream
            raise ForeignStream(f"not a stream of ours: begins with {bytes(view[:4])!r}, expected {MAGIC!r}")
        if len(view) < HEADER_BYTES:
            raise TruncatedStream(f"header: the stream ends after {len(view)} bytes, a header takes {HEADER_BYTES}")
        _, version, profile, coder, flags, model_id, vocab_size, *sizes, answer = _HEADER.unpack(view[: _HEADER.size])
        if version != VERSION:
            raise ForeignStream(f"header: version {version} is unknown; this version of smalti reads {VERSION}")
        _check_crc(view, "header")
        if flags & ~(LOSSLESS | NAMED):
            raise ForeignStream(f"header: flags {flags:#x} are unknown; this version reads {LOSSLESS | NAMED:#x}")
        grid, image, (num_images, chunk_images) = (sizes[0], sizes[1]), (sizes[2], sizes[3], sizes[4]), sizes[5:]
        lossless, named = bool(flags & LOSSLESS), bool(flags & NAMED)
        shapes = (vocab_size, grid, image, num_images, chunk_images)
        return cls(profile, coder, lossless, named, model_id, *shapes, answer)


@dataclass(frozen=True)
class Limits:
    """What a reader allows: images, tokens and pixels of a whole stream, and tokens and pixels of one chunk, which are
    what is held in memory at once."""

    max_images: int = 1 << 24
    max_tokens: int = 1 << 26
    max_pixels: int = 1 << 32
    max_chunk: int = 1 << 27

    def check(self, header: Header) -> None:
        """Raises `StreamLimit`."""
        chunk = min(header.num_images, header.chunk_images)
        for what, announced, allowed in (
            ("images", header.num_images, self.max_images),
            ("tokens", header.num_images * header.num_tokens, self.max_tokens),
            ("pixels", header.num_images * header.num_pixels, self.max_pixels),
            ("tokens and pixels in a chunk", chunk * (header.num_tokens + header.num_pixels), self.max_chunk),
        ):
            if announced > allowed:
                raise StreamLimit(f"header: announces {announced} {what}, at most {allowed} are allowed")


DEFAULT_LIMITS = Limits()


def expect(
    header: Header, *, model_id: bytes, vocab_size: int, grid: Sequence[int], image: Sequence[int], answer: bytes
) -> None:
    """Raise `ModelMismatch` naming everything in which the stream's model is not this one."""
    found = [
        (name, theirs, ours)
        for name, theirs, ours in (
            ("image (c, h, w)", header.image, tuple(image)),
            ("grid", header.grid, tuple(grid)),
            ("vocab_size", header.vocab_size, vocab_size),
            ("model_id", header.model_id.hex(), model_id.hex()),
        )
        if theirs != ours
    ]
    if found:
        differing = "; ".join(f"{name} is {theirs} in the stream, {ours} here" for name, theirs, ours in found)
        raise ModelMismatch(f"made by another model: {differing}")
    if header.answer != answer:
        raise ModelMismatch(
            f"known-answer check: this machine computes other probabilities than the one that made the stream "
            f"({answer.hex()} here, {header.answer.hex()} there)"
        )


# chunks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """`count` images as coded bytes: `tokens`, and in a lossless stream `pixels`.

    The chunk's own `profile` is RAW where coding could not be verified. `exceptions` are the ascending positions that
    were coded uniformly, counted through the tokens and then through the pixels. `digest` is that of what was coded.
    """

    count: int
    profile: int
    exceptions: tuple[int, ...]
    tokens: bytes
    pixels: bytes | None
    digest: int

    def pack(self, header: Header, index: int) -> bytes:
        """The bytes of chunk `index`. Raises a `StreamError` where the chunk does not fit the header."""
        where = f"chunk {index}"
        parts = [self.tokens] if self.pixels is None else [self.tokens, self.pixels]
        if len(parts) != 1 + header.lossless:
            raise StreamError(f"{where}: a lossless stream has pixels in every chunk, another stream in none")
        sizes = [len(part) for part in parts]
        allowed = _check_sizes(where, header, index, self.count, self.profile, sizes)
        steps = [after - before for before, after in pairwise((-1, *self.exceptions))]
        if min(steps, default=1) < 1 or sum(steps) > allowed:
            raise StreamError(f"{where}: exceptions should ascend through [0, {allowed})")
        layout = _LOSSLESS_CHUNK if header.lossless else _LOSSY_CHUNK
        exceptions = b"".join(map(_varint, (len(self.exceptions), *(step - 1 for step in steps))))
        body = b"".join((layout.pack(self.count, self.profile, *sizes), exceptions, *parts))
        return _sealed(body + _CRC.pack(self.digest))


def digest(tokens: Ids, pixels: Pixels | None = None) -> int:
    """CRC32C of what a chunk decodes to: ids `(n, ...)` as u32, then pixels `(n, c, h, w)`."""
    content = np.asarray(tokens).astype("<u4").tobytes()
    return crc32c(content if pixels is None else content + np.asarray(pixels, dtype=np.uint8).tobytes())


def verify(header: Header, index: int, chunk: Chunk, tokens: Ids, pixels: Pixels | None = None) -> None:
    """Check what chunk `index` was decoded to, ids `(n, ...)` and pixels `(n, c, h, w)`, before it is handed on.

    Raises `ModelMismatch` if it is not what was coded: the bytes were intact, so the probabilities were not the same.
    In a chunk stored raw there are no probabilities to blame, and it is a `DamagedStream`.
    """
    inside = not tokens.size or 0 <= int(tokens.min()) <= int(tokens.max()) < header.vocab_size
    if inside and digest(tokens, pixels) == chunk.digest:
        return
    if chunk.profile == RAW:
        raise DamagedStream(f"chunk {index}: damaged (intact bytes, but not the ids that were stored)")
    raise ModelMismatch(
        f"chunk {index}: intact, but decodes to other tokens here than where it was made; the probabilities of the two "
        "machines differ (other versions of torch, another device, or lower precision)"
    )


def _check_sizes(where: str, header: Header, index: int, count: int, profile: int, sizes: Sequence[int]) -> int:
    """Hold a chunk's fields against the header; return how many exceptions it may have."""
    if count != header.images_in(index):
        raise DamagedStream(f"{where}: holds {count} images, should hold {header.images_in(index)}")
    if profile not in (RAW, header.profile):
        raise DamagedStream(f"{where}: profile {profile} in a stream of profile {header.profile}")
    symbols = header.symbols_in(count)
    for what, number, bits, size in zip(("tokens", "pixels"), symbols, (header.token_bits, 8), sizes, strict=False):
        if profile == RAW and size != packed_bytes(number, bits):
            raise DamagedStream(f"{where}: {size} bytes of raw {what}, should be {packed_bytes(number, bits)}")
        if size > number * SYMBOL_BYTES + FLUSH_BYTES:
            raise DamagedStream(
                f"{where}: {size} bytes for {number} {what}, at most {number * SYMBOL_BYTES + FLUSH_BYTES} make sense"
            )
    return 0 if profile == RAW else sum(symbols)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


# reading ------------------------------------------------------------------------------------------


class _Reader:
    """Takes from the front of the bytes; what is missing is a `TruncatedStream`."""

    def __init__(self, view: memoryview, at: int) -> None:
        self.view, self.at = view, at

    def take(self, size: int, where: str) -> memoryview:
        if size > len(self.view) - self.at:
            raise TruncatedStream(f"{where}: the stream ends early, after {len(self.view)} bytes")
        self.at += size
        return self.view[self.at - size : self.at]

    def fields(self, layout: struct.Struct, where: str) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size, where))

    def varint(self, where: str) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1, where)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise DamagedStream(f"{where}: a number among the exceptions does not end")


@dataclass(frozen=True)
class Stream:
    """A stream whose bytes were all checked. Iterating yields its chunks in order, one in memory at a time.

    `names` are those of the images, or None. The bytes are not copied: a memory-mapped file stays open meanwhile.
    """

    header: Header
    names: list[str] | None
    _view: memoryview
    _starts: Sequence[int]

    def chunk(self, index: int) -> Chunk:
        """Chunk `index`, checked again: a mapped file may have changed since."""
        start, end = self._starts[index : index + 2]
        _check_crc(self._view[start:end], f"chunk {index}")
        return _read_chunk(_Reader(self._view, start), self.header, index)

    def __iter__(self) -> Iterator[Chunk]:
        return map(self.chunk, range(self.header.num_chunks))


def parse(data: Data, *, limits: Limits = DEFAULT_LIMITS) -> Stream:
    """Check a whole stream (bytes or a memory-mapped file) and return it ready to be decoded chunk by chunk.

    Raises a `StreamError` that says where and what. Whether the stream is for this model is asked by `expect`, whether
    it decoded well by `verify`.
    """
    view = memoryview(data).toreadonly()
    header = Header.unpack(view)
    limits.check(header)
    reader, starts = _Reader(view, HEADER_BYTES), array("Q", [HEADER_BYTES])
    for index in range(header.num_chunks):
        _read_chunk(reader, header, index)
        starts.append(reader.at)
    encoded = _read_names(reader, header.num_images) if header.named else []
    if reader.at < len(view):
        raise DamagedStream(f"{len(view) - reader.at} bytes follow the end, at byte {reader.at}")
    for index, (start, end) in enumerate(pairwise(starts)):
        _check_crc(view[start:end], f"chunk {index} (at byte {start})")
    if not header.named:
        return Stream(header, None, view, starts)
    _check_crc(view[starts[-1] :], f"names (at byte {starts[-1]})")
    return Stream(header, _decode_names(encoded), view, starts)


def _read_chunk(reader: _Reader, header: Header, index: int) -> Chunk:
    """The next chunk, its checksum unchecked."""
    where = f"chunk {index} (at byte {reader.at})"
    count, profile, *sizes = reader.fields(_LOSSLESS_CHUNK if header.lossless else _LOSSY_CHUNK, where)
    allowed = _check_sizes(where, header, index, count, profile, sizes)
    exceptions, position = [], -1
    number = reader.varint(where)
    if number > allowed:
        raise DamagedStream(f"{where}: {number} exceptions, at most {allowed} make sense")
    for _ in range(number):
        position += 1 + reader.varint(where)
        exceptions.append(position)
    if position >= allowed:
        raise DamagedStream(f"{where}: an exception at position {position}, there are {allowed}")
    parts = [bytes(reader.take(size, where)) for size in sizes]
    of_content, _ = reader.fields(_SUMS, where)
    return Chunk(count, profile, tuple(exceptions), parts[0], parts[1] if header.lossless else None, of_content)


# names --------------------------------------------------------------------------------------------


def check_names(names: Sequence[str]) -> None:
    """Raise a `StreamError` unless every name is a file of its own below the folder it will be restored to."""
    for name in names:
        if problem := _problem_with(name):
            raise StreamError(f"name {name[:80]!r}: {problem}")
    # With the lowest character as separator, a folder is followed at once by what it holds.
    for name, following in pairwise(sorted(name.replace("/", "\0") for name in names)):
        if following == name or following.startswith(name + "\0"):
            problem = "stands twice" if following == name else "is a file and a folder"
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


def _pack_names(names: Sequence[str]) -> bytes:
    encoded = [name.encode() for name in names]
    return _sealed(b"".join(_NAME_LENGTH.pack(len(name)) + name for name in encoded))


def _read_names(reader: _Reader, number: int) -> list[bytes]:
    """The table of names, its checksum unchecked."""
    where, encoded = f"names (at byte {reader.at})", []
    for _ in range(number):
        (size,) = reader.fields(_NAME_LENGTH, where)
        encoded.append(bytes(reader.take(size, where)))
    reader.take(_CRC.size, where)
    return encoded


def _decode_names(encoded: Sequence[bytes]) -> list[str]:
    try:
        names = [name.decode() for name in encoded]
    except UnicodeDecodeError as error:
        raise StreamError(f"names: {error.object[:80]!r} is not UTF-8") from error
    check_names(names)
    return names


# writing ------------------------------------------------------------------------------------------


def write_stream(file: BinaryIO, header: Header, chunks: Iterable[Chunk], names: Sequence[str] | None = None) -> int:
    """Write a stream, one chunk in memory at a time, and return its bytes.

    Raises a `StreamError` where the chunks or the names do not fit the header or each other; bad names are refused
    before anything is written.
    """
    if (0 if names is None else len(names)) != header.num_images * header.named:
        raise StreamError(f"names: {header.num_images * header.named} expected, got {len(names or ())}")
    check_names(names or ())
    size, written = file.write(header.pack()), 0
    for index, chunk in enumerate(chunks):
        if index == header.num_chunks:
            raise StreamError(f"more than the {header.num_chunks} chunks that the header announces")
        size, written = size + file.write(chunk.pack(header, index)), index + 1
    if written < header.num_chunks:
        raise StreamError(f"{written} chunks, the header announces {header.num_chunks}")
    return size + (file.write(_pack_names(names)) if names is not None else 0)
