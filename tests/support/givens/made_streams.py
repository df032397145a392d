"""Streams that are made of chance, and forged ones."""

import io
from zlib import crc32

import numpy as np
from hypothesis import settings

from pipelines.compression.chunks import Chunk, digest, pack_bits
from pipelines.compression.header import GUARD, RAW, Header
from pipelines.compression.streams import write_stream

MODEL, ANSWER = bytes(range(16)), b"answered"
quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def make_header(**fields):
    sizes = {"vocab_size": 300, "grid": (3, 4), "image": (1, 6, 8), "num_images": 8, "chunk_images": 3}
    kind = {"profile": GUARD, "coder": 1, "lossless": False, "named": False, "model_id": MODEL, "answer": ANSWER}
    return Header(**{**kind, **sizes, **fields})


def make_chunk(header, index, rng, raw=None, exceptions=None):
    """Chunk `index` with what it decodes to; coded payloads are noise, for the container does not look into them."""
    count = header.images_in(index)
    tokens = rng.integers(0, header.vocab_size, (count, *header.grid))
    pixels = rng.integers(0, 256, (count, *header.image), dtype=np.uint8) if header.lossless else None
    if header.profile == RAW or (raw if raw is not None else rng.random() < 0.3):
        raw_pixels = pixels.tobytes() if header.lossless else None
        packed = pack_bits(tokens, header.token_bits)
        return Chunk(count, RAW, (), packed, raw_pixels, digest(tokens, pixels)), tokens, pixels
    symbols = sum(header.symbols_in(count))
    if exceptions is None:
        exceptions = tuple(sorted(rng.choice(symbols, size=min(symbols, int(rng.integers(0, 4))), replace=False)))
    coded = [rng.bytes(int(rng.integers(0, 40))) for _ in header.symbols_in(count)]
    exceptions = tuple(map(int, exceptions))
    chunk = Chunk(count, GUARD, exceptions, coded[0], coded[1] if header.lossless else None, digest(tokens, pixels))
    return chunk, tokens, pixels


def make_chunks(header, seed=0):
    rng = np.random.default_rng(seed)
    return [make_chunk(header, index, rng)[0] for index in range(header.num_chunks)]


def make_names(number):
    return [f"größe/{k:03}.png" for k in range(number)]


def packed(header, chunks, names=None):
    file = io.BytesIO()
    assert write_stream(file, header, chunks, names) == len(file.getvalue())
    return file.getvalue()


def make_stream(seed=0, **fields):
    header = make_header(**fields)
    return packed(header, make_chunks(header, seed), make_names(header.num_images) if header.named else None)


def reseal(data, start, end):
    """As someone who wants to harm would: `data` with the checksum of data[start:end] put right."""
    return data[: end - 4] + crc32(data[start : end - 4]).to_bytes(4, "little") + data[end:]


def chunk_bytes(count=3, profile=GUARD, size=0, exceptions=b"\0", payload=b""):
    body = count.to_bytes(2, "little") + bytes([profile]) + size.to_bytes(4, "little") + exceptions + payload + bytes(4)
    return body + crc32(body).to_bytes(4, "little")
