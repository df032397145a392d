"""The header of a stream: what made it, how it is coded, and how much of it a reader allows."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from zlib import crc32

MAGIC = b"VQC1"
VERSION = 1
RAW, GUARD = 0, 1  # profiles: ids packed into whole bits; ids coded under float64 tables with exceptions
NO_CODER, RANGE_CODER = 0, 1
LOSSLESS, NAMED = 1, 2  # flags
_HEADER = struct.Struct("<4sBBBB16sI2H3HIH8s")
CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + CRC.size

Data = bytes | bytearray | memoryview | mmap


class StreamError(ValueError):
    """The root of everything that can be wrong with a stream, read or about to be written."""


class TruncatedStream(StreamError):
    """The stream ends before its last part does."""


class DamagedStream(StreamError):
    """A checksum differs, two fields contradict each other, or something follows the end."""


class ForeignStream(StreamError):
    """Not one of our streams, or one whose version, profile or coder is not known here."""


class ModelMismatch(StreamError):
    """Made by another model, or by a machine that computes other probabilities than this one."""


class StreamLimit(StreamError):
    """What the header announces is more than the caller allows."""


def check_crc(part: memoryview, where: str) -> None:
    """Raise `DamagedStream` unless `part` ends in the checksum of what comes before it."""
    if crc32(part[: -CRC.size]) != CRC.unpack(part[-CRC.size :])[0]:
        raise DamagedStream(f"{where}: damaged (its checksum differs)")


def sealed(part: bytes) -> bytes:
    """`part` followed by its checksum."""
    return part + CRC.pack(crc32(part))


@dataclass(frozen=True)
class Header:
    """What a stream says about all of its chunks: `grid` (h, w), `image` (c, h, w), `model_id` 16 bytes.

    `answer` holds 8 bytes of the digest of the known-answer check, `named` says that names follow the chunks, and
    `lossless` that every chunk has pixels beside its tokens. Raises a `StreamError` that names a field out of range.
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
        for name, value, low, high in (
            ("vocab_size", self.vocab_size, 1, 1 << 20),
            ("num_images", self.num_images, 0, (1 << 32) - 1),
            ("chunk_images", self.chunk_images, 1, (1 << 16) - 1),
            *(("a side of grid", size, 1, (1 << 16) - 1) for size in self.grid),
            *(("a size of image", size, 1, (1 << 16) - 1) for size in self.image),
        ):
            if not low <= value <= high:
                raise DamagedStream(f"header: {name} is {value}, allowed are {low} to {high}")

    @property
    def num_tokens(self) -> int:
        """Number of tokens of one image."""
        return math.prod(self.grid)

    @property
    def num_pixels(self) -> int:
        """Number of pixels of one image, every channel counted."""
        return math.prod(self.image)

    @property
    def token_bits(self) -> int:
        """Number of bits of one id stored raw."""
        return (self.vocab_size - 1).bit_length()

    @property
    def num_chunks(self) -> int:
        """Number of chunks; every one but the last is full."""
        return -(-self.num_images // self.chunk_images)

    def images_in(self, index: int) -> int:
        """How many images chunk `index` holds."""
        return min(self.chunk_images, self.num_images - index * self.chunk_images)

    def symbols_in(self, count: int) -> tuple[int, ...]:
        """How many symbols `count` images have: tokens, and pixels in a lossless stream."""
        return (count * self.num_tokens, count * self.num_pixels)[: 1 + self.lossless]

    def pack(self) -> bytes:
        """`HEADER_BYTES` bytes."""
        packed = _HEADER.pack(
            MAGIC,
            VERSION,
            self.profile,
            self.coder,
            LOSSLESS * self.lossless | NAMED * self.named,
            self.model_id,
            self.vocab_size,
            *self.grid,
            *self.image,
            self.num_images,
            self.chunk_images,
            self.answer,
        )
        return sealed(packed)

    @classmethod
    def unpack(cls, data: Data) -> Header:
        """The header at the front of `data`. Raises a `StreamError`; it checks magic, length, version, checksum, and
        then the fields."""
        view = memoryview(data)[:HEADER_BYTES]
        if not MAGIC.startswith(bytes(view[: len(MAGIC)])):  # first, as a short file of another kind is not truncated
            raise ForeignStream(f"not a stream of ours: begins with {bytes(view[:4])!r}, expected {MAGIC!r}")
        if len(view) < HEADER_BYTES:
            raise TruncatedStream(f"header: the stream ends after {len(view)} bytes, a header takes {HEADER_BYTES}")
        _, version, profile, coder, flags, model_id, vocab_size, *sizes, answer = _HEADER.unpack(view[: _HEADER.size])
        if version != VERSION:
            raise ForeignStream(f"header: version {version} is unknown; this version of smalti reads {VERSION}")
        check_crc(view, "header")
        if flags & ~(LOSSLESS | NAMED):
            raise ForeignStream(f"header: flags {flags:#x} are unknown; this version reads {LOSSLESS | NAMED:#x}")
        *grid_and_image, num_images, chunk_images = sizes
        return cls(
            profile=profile,
            coder=coder,
            lossless=bool(flags & LOSSLESS),
            named=bool(flags & NAMED),
            model_id=model_id,
            vocab_size=vocab_size,
            grid=(grid_and_image[0], grid_and_image[1]),
            image=(grid_and_image[2], grid_and_image[3], grid_and_image[4]),
            num_images=num_images,
            chunk_images=chunk_images,
            answer=answer,
        )


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
    """Raise `ModelMismatch`, which names everything in which the stream's model differs from this one."""
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
