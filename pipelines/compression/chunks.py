"""A chunk of a stream: the coded tokens of some images, and the pixels that go with them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from .header import CRC, RAW, DamagedStream, Data, Header, ModelMismatch, StreamError, TruncatedStream, sealed

# No coder needs more: an id below 2^20 costs at most 24 bits under 24-bit counts, and a coder flushes a few words.
SYMBOL_BYTES, FLUSH_BYTES = 8, 64
_LOSSY_CHUNK, _LOSSLESS_CHUNK, _SUMS = struct.Struct("<HBI"), struct.Struct("<HBII"), struct.Struct("<II")
Ids = NDArray[np.integer[Any]]
Pixels = NDArray[np.uint8]


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(values: Ids, bits: int) -> bytes:
    """Values in `[0, 2**bits)`, flattened, lowest bit first, the last byte filled up with zeros. `bits` may be 0."""
    flat = np.asarray(values).reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >> bits):
        raise StreamError(f"values of {bits} bits lie in [0, {1 << bits}), got {int(flat.min())} to {int(flat.max())}")
    planes = np.empty((flat.size, bits), dtype=np.uint8)
    for bit in range(bits):
        planes[:, bit] = flat >> bit & 1
    return np.packbits(planes, bitorder="little").tobytes()


def unpack_bits(data: Data, count: int, bits: int) -> NDArray[np.int64]:
    """The inverse of `pack_bits`: (count,). Raises `DamagedStream` unless the length is exact and the last bits 0."""
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
        return sealed(body + CRC.pack(self.digest))


def digest(tokens: Ids, pixels: Pixels | None = None) -> int:
    """CRC-32 of what a chunk decodes to: ids `(n, ...)` as u32, then pixels `(n, c, h, w)`."""
    content = np.asarray(tokens).astype("<u4").tobytes()
    return crc32(content if pixels is None else content + np.asarray(pixels, dtype=np.uint8).tobytes())


def verify(header: Header, index: int, chunk: Chunk, tokens: Ids, pixels: Pixels | None = None) -> None:
    """Check what chunk `index` was decoded to, ids `(n, ...)` and pixels `(n, c, h, w)`, before it is used.

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


class Reader:
    """Takes bytes of `view` in turn, from byte `at`. Raises `TruncatedStream` where they end early."""

    def __init__(self, view: memoryview, at: int) -> None:
        self.view = view
        self.at = at

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


def read_chunk(reader: Reader, header: Header, index: int) -> Chunk:
    """The next chunk, its checksum unchecked."""
    where = f"chunk {index} (at byte {reader.at})"
    count, profile, *sizes = reader.fields(_LOSSLESS_CHUNK if header.lossless else _LOSSY_CHUNK, where)
    allowed = _check_sizes(where, header, index, count, profile, sizes)
    number = reader.varint(where)
    if number > allowed:
        raise DamagedStream(f"{where}: {number} exceptions, at most {allowed} make sense")
    exceptions: list[int] = []
    position = -1
    for _ in range(number):
        position += 1 + reader.varint(where)
        exceptions.append(position)
    if position >= allowed:
        raise DamagedStream(f"{where}: an exception at position {position}, there are {allowed}")
    parts = [bytes(reader.take(size, where)) for size in sizes]
    of_content, _ = reader.fields(_SUMS, where)
    return Chunk(count, profile, tuple(exceptions), parts[0], parts[1] if header.lossless else None, of_content)
