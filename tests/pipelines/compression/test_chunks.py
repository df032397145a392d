"""Chunks: bits of any values, and a chunk that contradicts itself, its header, or what was coded."""

import io
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from givens.made_streams import chunk_bytes, make_chunk, make_header, quick
from hypothesis import given
from hypothesis import strategies as st

from pipelines.compression.chunks import Chunk, Reader, digest, pack_bits, read_chunk, unpack_bits, verify
from pipelines.compression.header import GUARD, RAW, DamagedStream, ModelMismatch, StreamError, TruncatedStream
from pipelines.compression.streams import parse, write_stream

# bits


def test_bits_of_every_vocabulary():
    rng = np.random.default_rng(0)
    for vocab_size in range(1, 4097):
        bits, count = (vocab_size - 1).bit_length(), vocab_size % 19
        values = rng.integers(0, vocab_size, count)
        values[-1:] = vocab_size - 1
        data = pack_bits(values, bits)
        assert len(data) == -(-count * bits // 8)
        found = unpack_bits(data, count, bits)
        assert found.dtype == np.int64 and np.array_equal(found, values)


@quick
@given(st.integers(0, 32), st.data())
def test_bits_of_any_values(bits, data):
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=50))
    assert unpack_bits(pack_bits(np.array(values, dtype=np.int64), bits), len(values), bits).tolist() == values


def test_bits_are_strict():
    data = pack_bits(np.array([5, 6, 7]), 3)
    for wrong in (b"", data[:-1], data + b"\0"):
        with pytest.raises(DamagedStream, match="3 values of 3 bits take 2 bytes"):
            unpack_bits(wrong, 3, 3)
    for bit in range(1, 8):
        with pytest.raises(DamagedStream, match="after the last value"):
            unpack_bits(bytes([data[0], data[1] | 1 << bit]), 3, 3)
    for values in ([-1], [-1, 3], [8], [0, 9]):
        with pytest.raises(StreamError, match=r"lie in \[0, 8\)"):
            pack_bits(np.array(values), 3)


# a chunk that contradicts itself, or its header


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 2}, "holds 2 images, should hold 3"),
        ({"profile": 2}, "profile 2 in a stream of profile 1"),
        ({"profile": RAW, "tokens": bytes(40)}, "40 bytes of raw tokens, should be 41"),
        ({"profile": RAW, "tokens": bytes(41), "exceptions": (0,)}, "ascend"),
        ({"tokens": bytes(3 * 12 * 8 + 65)}, "353 bytes for 36 tokens, at most 352 make sense"),
        ({"exceptions": (3, 3)}, "ascend"),
        ({"exceptions": (3, 2)}, "ascend"),
        ({"exceptions": (-1,)}, "ascend"),
        ({"exceptions": (36,)}, r"ascend through \[0, 36\)"),
        ({"pixels": b""}, "lossless"),
    ],
)
def test_chunks_that_do_not_fit_are_not_written(fields, message):
    header = make_header(num_images=3)
    chunk = replace(Chunk(3, GUARD, (1, 35), bytes(20), None, 7), **fields)
    with pytest.raises(StreamError, match=f"^chunk 0: .*{message}"):
        write_stream(io.BytesIO(), header, [chunk])


@pytest.mark.parametrize(
    ("chunk", "error", "message"),
    [
        (chunk_bytes(), None, None),
        (chunk_bytes(count=2), DamagedStream, "holds 2 images"),
        (chunk_bytes(profile=5), DamagedStream, "profile 5"),
        (chunk_bytes(profile=RAW, size=3, payload=bytes(3)), DamagedStream, "raw tokens, should be 41"),
        (chunk_bytes(profile=RAW, size=41, payload=bytes(41), exceptions=b"\1\0"), DamagedStream, "1 exceptions"),
        (chunk_bytes(size=353, payload=bytes(353)), DamagedStream, "at most 352 make sense"),
        (chunk_bytes(size=(1 << 32) - 1), DamagedStream, "at most 352 make sense"),
        (chunk_bytes(size=300), TruncatedStream, "ends early"),
        (chunk_bytes(exceptions=b"\x25" + bytes(37)), DamagedStream, "37 exceptions, at most 36"),
        (chunk_bytes(exceptions=b"\x24" + bytes(36)), None, None),
        (chunk_bytes(exceptions=b"\2\0\x23"), DamagedStream, "an exception at position 36, there are 36"),
        (chunk_bytes(exceptions=b"\1" + b"\xff" * 5 + b"\0"), DamagedStream, "does not end"),
        (chunk_bytes(exceptions=b"\1\xff\xff\xff\xff\x0f"), DamagedStream, "an exception at position 4294967295"),
    ],
    ids=lambda value: "chunk" if isinstance(value, bytes) else None,
)
def test_chunks_that_do_not_fit_are_not_read(chunk, error, message):
    data = make_header(num_images=3).pack() + chunk
    if error is None:
        assert parse(data).chunk(0).count == 3
        return
    with pytest.raises(error, match=rf"^chunk 0 \(at byte 56\): .*{message}"):
        parse(data)


# the model


@pytest.mark.parametrize(("raw", "error"), [(False, ModelMismatch), (True, DamagedStream)])
def test_what_was_decoded_is_what_was_coded(raw, error):
    header = make_header(lossless=True)
    chunk, tokens, pixels = make_chunk(header, 1, np.random.default_rng(0), raw=raw)
    verify(header, 1, chunk, tokens.reshape(3, 12).astype(np.uint16), pixels)
    other, paler = tokens.copy(), pixels.copy()
    other[2, 1, 3] ^= 1
    paler[0, 0, 5, 5] ^= 128
    for decoded in ((other, pixels), (tokens, paler), (tokens, None), (tokens[:2], pixels)):
        with pytest.raises(error, match="^chunk 1: "):
            verify(header, 1, chunk, *decoded)


@pytest.mark.parametrize("bad", [-1, 300, 511])
def test_ids_out_of_range_are_not_handed_on(bad):
    """Nine bits hold 512 values, the vocabulary 300: one may forge a chunk whose digest agrees."""
    header = make_header(num_images=1)
    tokens = np.full((1, 3, 4), bad)
    with pytest.raises(DamagedStream):
        verify(header, 0, Chunk(1, RAW, (), b"", None, digest(tokens)), tokens)


def test_what_was_coded_is_known_by_its_values_whatever_their_type():
    """Tokens that are all alike, the least or the largest, or none at all, are tokens like any others."""
    header = make_header(num_images=2, vocab_size=300)
    pixels = np.arange(96).reshape(2, 1, 6, 8)
    for tokens in (np.zeros((2, 12)), np.full((2, 12), 299), np.tile([0, 299], (2, 6)), np.zeros((0, 12))):
        for values in (None, pixels):
            told = digest(tokens.astype(np.int64), values)
            kinds = [np.uint8, np.int32] if values is not None else [np.int64]
            for kind, of_pixels in itertools.product((np.uint16, np.int32, np.int64), kinds):
                given = None if values is None else values.astype(of_pixels)
                assert digest(tokens.astype(kind), given) == told
                verify(header, 0, Chunk(2, GUARD, (), b"", None, told), tokens.astype(kind), given)
    assert digest(np.array([1, 0])) != digest(np.array([0, 1])) != digest(np.array([1])) != 0


def test_the_two_ways_in_which_something_else_was_decoded_are_told_apart():
    header, tokens = make_header(num_images=1), np.ones((1, 12), dtype=np.int64)
    for profile, error, said in (
        (RAW, DamagedStream, "chunk 3: damaged (intact bytes, but not the ids that were stored)"),
        (
            GUARD,
            ModelMismatch,
            "chunk 3: intact, but decodes to other tokens here than where it was made; the probabilities of the two "
            "machines differ (other versions of torch, another device, or lower precision)",
        ),
    ):
        with pytest.raises(error, match=f"^{re.escape(said)}$"):
            verify(header, 3, Chunk(1, profile, (), b"", None, digest(tokens) ^ 1), tokens)


# what is said, in full


def words(text):
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"count": 4}, "holds 4 images, should hold 3"),
        ({"profile": 2}, "profile 2 in a stream of profile 1"),
        ({"profile": RAW, "tokens": bytes(42), "exceptions": ()}, "42 bytes of raw tokens, should be 41"),
        ({"pixels": bytes(1217)}, "1217 bytes for 144 pixels, at most 1216 make sense"),
        ({"tokens": bytes(353)}, "353 bytes for 36 tokens, at most 352 make sense"),
        ({"profile": RAW, "tokens": bytes(41), "pixels": bytes(143)}, "143 bytes of raw pixels, should be 144"),
        ({"exceptions": (180,)}, "exceptions should ascend through [0, 180)"),
        ({"exceptions": (5, 5)}, "exceptions should ascend through [0, 180)"),
        ({"exceptions": (-1, 5)}, "exceptions should ascend through [0, 180)"),
        ({"pixels": None}, "a lossless stream has pixels in every chunk, another stream in none"),
    ],
)
def test_what_does_not_fit_is_told_in_full(fields, said):
    header = make_header(num_images=3, lossless=True)
    fine = Chunk(3, GUARD, (0, 179), bytes(352), bytes(1216), 7)
    assert fine.pack(header, 0)
    assert replace(fine, profile=RAW, tokens=bytes(41), pixels=bytes(144), exceptions=()).pack(header, 0)
    with pytest.raises(StreamError, match=words(f"chunk 5: {said}")):
        replace(fine, **fields).pack(replace(header, num_images=18), 5)


def test_what_cannot_be_read_is_told_in_full():
    front, where = make_header(num_images=3).pack(), "chunk 0 (at byte 56): "
    for chunk, error, said in (
        (chunk_bytes(exceptions=b"\1" + b"\xff" * 5), DamagedStream, "a number among the exceptions does not end"),
        (chunk_bytes(exceptions=b"\x25" + bytes(37)), DamagedStream, "37 exceptions, at most 36 make sense"),
        (chunk_bytes(exceptions=b"\1\x24"), DamagedStream, "an exception at position 36, there are 36"),
        (chunk_bytes()[:-1], TruncatedStream, "the stream ends early, after 71 bytes"),
        (b"", TruncatedStream, "the stream ends early, after 56 bytes"),
        (chunk_bytes()[:7], TruncatedStream, "the stream ends early, after 63 bytes"),
    ):
        with pytest.raises(error, match=words(where + said)):
            parse(front + chunk)
    with pytest.raises(StreamError, match=words("values of 3 bits lie in [0, 8), got -1 to 8")):
        pack_bits(np.array([-1, 8]), 3)
    with pytest.raises(DamagedStream, match=words("3 values of 3 bits take 2 bytes, got 3")):
        unpack_bits(bytes(3), 3, 3)
    with pytest.raises(DamagedStream, match=words("3 values of 3 bits: the bits after the last value should be 0")):
        unpack_bits(b"\0\2", 3, 3)


@pytest.mark.parametrize("gap", [0, 1, 127, 128, 16383, 16384, 2097151, 2097152, 268435456])
def test_exceptions_may_lie_at_any_distance(gap):
    header = make_header(num_images=1, grid=(32768, 32768), image=(1, 1, 1))
    chunk = Chunk(1, GUARD, (gap, 2 * gap + 1), b"", None, 0)
    data = chunk.pack(header, 0)
    assert read_chunk(Reader(memoryview(data), 0), header, 0) == chunk
    size = max(1, -(-gap.bit_length() // 7))
    assert len(data) == 7 + 1 + 2 * size + 8
