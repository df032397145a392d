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

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from .chunks import Chunk, _read_chunk, _Reader
from .crc32c import Data
from .header import DEFAULT_LIMITS, HEADER_BYTES, DamagedStream, Header, Limits, StreamError, _check_crc
from .names import _decode_names, _pack_names, _read_names, check_names

# checksums ----------------------------------------------------------------------------------------


# raw bits -----------------------------------------------------------------------------------------


# header -------------------------------------------------------------------------------------------


# chunks -------------------------------------------------------------------------------------------


# reading ------------------------------------------------------------------------------------------


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


# names --------------------------------------------------------------------------------------------


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
