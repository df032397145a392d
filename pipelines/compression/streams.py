"""The container of compressed images: a header, chunks of coded tokens, the names of the images.

stream  header | chunk ... chunk | names (where the header says so)
header  "VQC1" | version u8 | profile u8 | coder u8 | flags u8 | model_id 16 B | vocab_size u32 | grid h, w u16 |
        image c, h, w u16 | num_images u32 | chunk_images u16 | answer 8 B | CRC-32 u32
chunk   count u16 | profile u8 | bytes of tokens u32 | bytes of pixels u32 (lossless only) | exceptions varint ... |
        tokens | pixels | CRC-32 of what it decodes to u32 | CRC-32 of the chunk u32
names   (length u16 | UTF-8) ... | CRC-32 u32

Numbers are little-endian. The version is 2; version 1 had CRC-32C in place of CRC-32 (that of zlib), and is refused.

`parse` trusts nothing: it checks bounds, then the exact length, then every checksum, before it decodes a payload or
sets memory aside for what the header claims. A CRC finds damage, not malice; tokens that decode to others than were
coded pass it once in 2^32. It covers the pixels of a lossless stream only: those of any other are made from the tokens
afterwards, in float32, and differ by one grey level here and there between machines.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from .chunks import Chunk, Reader, read_chunk
from .header import DEFAULT_LIMITS, HEADER_BYTES, DamagedStream, Data, Header, Limits, StreamError, check_crc
from .names import check_names, decode_names, pack_names, read_names


@dataclass(frozen=True)
class Stream:
    """A stream whose bytes were all checked. Iterating yields its chunks in order, one in memory at a time.

    `names` are those of the images, or None. The bytes are not copied: keep a memory-mapped file open meanwhile.
    """

    header: Header
    names: list[str] | None
    _view: memoryview
    _starts: Sequence[int]

    def chunk(self, index: int) -> Chunk:
        """Chunk `index`, checked again: a mapped file may have changed since."""
        start, end = self._starts[index : index + 2]
        check_crc(self._view[start:end], f"chunk {index}")
        return read_chunk(Reader(self._view, start), self.header, index)

    def __iter__(self) -> Iterator[Chunk]:
        return map(self.chunk, range(self.header.num_chunks))


def parse(data: Data, *, limits: Limits = DEFAULT_LIMITS) -> Stream:
    """Check a whole stream (bytes or a memory-mapped file) and return it, ready to be decoded chunk by chunk.

    Raises a `StreamError` that says where and what. `expect` checks whether the stream is of this model, `verify`
    whether a chunk decoded well.
    """
    view = memoryview(data).toreadonly()
    header = Header.unpack(view)
    limits.check(header)
    reader = Reader(view, HEADER_BYTES)
    starts = array("Q", [HEADER_BYTES])
    for index in range(header.num_chunks):
        read_chunk(reader, header, index)
        starts.append(reader.at)
    encoded_names = read_names(reader, header.num_images) if header.named else []
    if reader.at < len(view):
        raise DamagedStream(f"{len(view) - reader.at} bytes follow the end, at byte {reader.at}")
    for index, (start, end) in enumerate(pairwise(starts)):
        check_crc(view[start:end], f"chunk {index} (at byte {start})")
    if not header.named:
        return Stream(header, None, view, starts)
    check_crc(view[starts[-1] :], f"names (at byte {starts[-1]})")
    return Stream(header, decode_names(encoded_names), view, starts)


def write_stream(file: BinaryIO, header: Header, chunks: Iterable[Chunk], names: Sequence[str] | None = None) -> int:
    """Write a stream, one chunk in memory at a time, and return its number of bytes.

    Raises a `StreamError` where the chunks or the names do not fit the header or each other; bad names are refused
    before anything is written.
    """
    expected = header.num_images if header.named else 0
    if len(names or ()) != expected:
        raise StreamError(f"names: {expected} expected, got {len(names or ())}")
    check_names(names or ())
    size = file.write(header.pack())
    written = 0
    for index, chunk in enumerate(chunks):
        if index == header.num_chunks:
            raise StreamError(f"more than the {header.num_chunks} chunks that the header announces")
        size += file.write(chunk.pack(header, index))
        written += 1
    if written < header.num_chunks:
        raise StreamError(f"{written} chunks, the header announces {header.num_chunks}")
    if header.named:
        size += file.write(pack_names(names or ()))
    return size
