"""The container: what goes in comes out, and whatever is wrong with a stream is said before anything is decoded.

Covers: pipelines/compression/chunks.py, pipelines/compression/header.py, pipelines/compression/names.py.
"""

import io
import mmap
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.compression import streams
from pipelines.compression.chunks import Chunk, digest, pack_bits, unpack_bits, verify
from pipelines.compression.header import (
    GUARD,
    HEADER_BYTES,
    RAW,
    DamagedStream,
    ForeignStream,
    Header,
    Limits,
    ModelMismatch,
    StreamError,
    StreamLimit,
    TruncatedStream,
    expect,
)
from pipelines.compression.names import check_names
from pipelines.compression.streams import parse, write_stream

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


VARIANTS = {
    "plain": {},
    "lossless, named": {"lossless": True, "named": True},
    "raw": {"profile": RAW, "coder": 0, "named": True},
    "empty": {"num_images": 0},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


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


# round trips

sides = st.integers(1, 4)
headers = st.builds(
    lambda raw, **fields: make_header(profile=RAW if raw else GUARD, coder=0 if raw else 1, **fields),
    raw=st.booleans(),
    lossless=st.booleans(),
    named=st.booleans(),
    model_id=st.binary(min_size=16, max_size=16),
    answer=st.binary(min_size=8, max_size=8),
    vocab_size=st.integers(1, 1 << 20),
    grid=st.tuples(sides, sides),
    image=st.tuples(sides, sides, sides),
    num_images=st.integers(0, 12),
    chunk_images=st.integers(1, 65535) | st.integers(1, 5),
)


@quick
@given(headers, st.integers(0, 1000))
def test_what_is_written_is_read(header, seed):
    chunks, names = make_chunks(header, seed), make_names(header.num_images) if header.named else None
    stream = parse(packed(header, chunks, names))
    assert Header.unpack(header.pack()) == header == stream.header and len(header.pack()) == HEADER_BYTES == 56
    assert list(stream) == chunks and stream.names == names
    assert sum(chunk.count for chunk in stream) == header.num_images


@pytest.mark.parametrize("lossless", [False, True])
def test_raw_chunks_decode_to_what_was_stored(lossless):
    header, rng = make_header(profile=RAW, coder=0, lossless=lossless), np.random.default_rng(0)
    made = [make_chunk(header, index, rng) for index in range(header.num_chunks)]
    stream = parse(packed(header, [chunk for chunk, _, _ in made]))
    for index, (_, tokens, pixels) in enumerate(made):
        chunk = stream.chunk(index)
        found = unpack_bits(chunk.tokens, tokens.size, header.token_bits).reshape(tokens.shape)
        assert np.array_equal(found, tokens)
        if lossless:
            assert np.array_equal(np.frombuffer(chunk.pixels, dtype=np.uint8).reshape(pixels.shape), pixels)
        verify(header, index, chunk, found, pixels)


def test_exceptions_may_be_all_symbols():
    header, rng = make_header(num_images=3, lossless=True), np.random.default_rng(0)
    everything = range(sum(header.symbols_in(3)))
    for exceptions in (everything, [everything[-1]], [0], []):
        chunk, _, _ = make_chunk(header, 0, rng, raw=False, exceptions=exceptions)
        assert parse(packed(header, [chunk])).chunk(0).exceptions == tuple(exceptions)


def test_a_mapped_file_is_read_in_place_and_checked_again(tmp_path):
    path = tmp_path / "images.smalti"
    path.write_bytes(make_stream(lossless=True, named=True))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        stream = parse(mapped)
        assert list(stream) == list(parse(path.read_bytes()))
        mapped[HEADER_BYTES + 12] ^= 1
        with pytest.raises(DamagedStream, match="chunk 0"):
            next(iter(stream))
        del stream


def test_memory_is_a_chunk():
    header = make_header(num_images=400, chunk_images=4, grid=(100, 100), vocab_size=1 << 16, profile=RAW, coder=0)
    tokens = np.zeros((4, 100, 100), dtype=np.int64)
    chunk = Chunk(4, RAW, (), pack_bits(tokens, 16), None, digest(tokens))
    data = packed(header, (chunk for _ in range(100)))
    tracemalloc.start()
    assert sum(found == chunk for found in parse(data)) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) > 8e6 and peak < 1e6


# damage


@every_variant
def test_every_prefix_is_truncated(variant):
    data = make_stream(**VARIANTS[variant])
    for size in range(len(data)):
        with pytest.raises(TruncatedStream):
            parse(data[:size])


@pytest.mark.parametrize("extra", [b"\0", b"VQC1", bytes(16)])
@every_variant
def test_nothing_may_follow(variant, extra):
    data = make_stream(**VARIANTS[variant])
    with pytest.raises(DamagedStream, match=f"{len(extra)} bytes follow the end, at byte {len(data)}"):
        parse(data + extra)
    with pytest.raises(DamagedStream, match="follow the end"):
        parse(data + data)


@every_variant
def test_every_bit_matters(variant):
    for seed in range(2):
        data = make_stream(seed, **VARIANTS[variant])
        for position in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[position // 8] ^= 1 << position % 8
            with pytest.raises(StreamError):
                parse(damaged)


def mutate(data, rng):
    """Bytes replaced, removed, inserted, or a stretch moved."""
    data, at = bytearray(data), int(rng.integers(len(data)))
    size, kind = int(rng.integers(1, 9)), rng.integers(4)
    if kind == 0:
        data[at : at + size] = rng.bytes(len(data[at : at + size]))
    elif kind == 1:
        del data[at : at + size]
    elif kind == 2:
        data[at:at] = rng.bytes(size)
    else:
        stretch = data[at : at + size]
        del data[at : at + size]
        to = int(rng.integers(len(data) + 1))
        data[to:to] = stretch
    return bytes(data)


def test_ten_thousand_mutations():
    rng = np.random.default_rng(0)
    streams_of = [make_stream(seed, **fields) for seed, fields in enumerate(VARIANTS.values())]
    refused = 0
    while refused < 10_000:
        data = streams_of[refused % len(streams_of)]
        damaged = mutate(data, rng)
        if damaged != data:
            with pytest.raises(StreamError):
                parse(damaged)
            refused += 1


def reseal(data, start, end):
    """As someone who wants to harm would: `data` with the checksum of data[start:end] put right."""
    return data[: end - 4] + crc32(data[start : end - 4]).to_bytes(4, "little") + data[end:]


def test_forged_headers_and_chunks_raise_nothing_else():
    """With checksums put right after the mutation, a stream may be accepted, but then it can be read throughout."""
    rng, accepted = np.random.default_rng(1), 0
    header = make_header(num_images=3, lossless=True, named=True)
    data = packed(header, [make_chunk(header, 0, rng, raw=False, exceptions=[3, 170])[0]], ["a", "b/c", "d"])
    names_at = len(data) - 4 - 3 * 2 - 5
    parts = [(0, HEADER_BYTES), (HEADER_BYTES, names_at), (names_at, len(data))]
    for trial in range(4000):
        start, end = parts[trial % 3]
        damaged = bytearray(data)
        for at in rng.integers(start, end - 4, rng.integers(1, 3)):
            damaged[at] = rng.integers(256)
        try:
            accepted += sum(chunk.count for chunk in parse(reseal(bytes(damaged), start, end))) > 0
        except StreamError as error:
            assert "\n" not in str(error) and str(error).isprintable()
    assert accepted


@quick
@given(st.binary(max_size=200))
def test_garbage(data):
    for garbage in (data, b"VQC1" + data, b"VQC1\2" + data):
        with pytest.raises(StreamError):
            parse(garbage)


def test_garbage_behind_a_sound_header():
    rng = np.random.default_rng(0)
    for fields in VARIANTS.values():
        front = make_header(**{"num_images": 3, **fields}).pack()
        for _ in range(300):
            with pytest.raises(StreamError):
                parse(front + rng.bytes(int(rng.integers(1, 300))))


def test_damage_is_placed():
    header = make_header()
    chunks = make_chunks(header)
    start = len(packed(replace(header, num_images=6), chunks[:2]))
    data = bytearray(packed(header, chunks))
    data[start + 9] ^= 1
    with pytest.raises(DamagedStream, match=rf"^chunk 2 \(at byte {start}\): damaged"):
        parse(data)


@pytest.mark.parametrize(
    ("at", "value", "message"), [(4, 9, "version 9"), (5, 2, "profile 2"), (6, 7, "coder 7"), (7, 4, "flags 0x4")]
)
def test_a_stream_of_the_future_is_foreign(at, value, message):
    data = bytearray(make_stream())
    data[at] = value
    with pytest.raises(ForeignStream, match=f"header: {message} .*reads"):
        parse(reseal(bytes(data), 0, HEADER_BYTES))


def test_a_stream_of_version_1_says_what_reads_it():
    data = bytearray(make_stream())
    data[4] = 1
    with pytest.raises(ForeignStream, match=r"^header: version 1, which only smalti 0\.1 reads; .* reads version 2: "):
        parse(data)


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n", b"P", bytes(100), b"vqc1" + bytes(60)])
def test_another_file_is_foreign(data):
    with pytest.raises(ForeignStream, match="not a stream of ours"):
        parse(data)


def test_an_empty_file_is_truncated():
    with pytest.raises(TruncatedStream, match="after 0 bytes"):
        parse(b"")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0, allowed are 1 to 1048576"),
        ({"vocab_size": (1 << 20) + 1}, "vocab_size"),
        ({"grid": (0, 4)}, "a side of grid is 0"),
        ({"image": (1, 6, 1 << 16)}, "a size of image is 65536"),
        ({"num_images": -1}, "num_images"),
        ({"chunk_images": 0}, "chunk_images"),
        ({"chunk_images": 1 << 16}, "chunk_images"),
        ({"profile": 3}, "profile 3 is unknown"),
        ({"coder": 2}, "coder 2 is unknown"),
        ({"coder": 0}, "profile 1 does not go with coder 0"),
        ({"model_id": b"short"}, "16 bytes"),
        ({"answer": b""}, "answer 8"),
        ({"grid": (4,)}, "two sizes"),
    ],
)
def test_headers_out_of_range(fields, message):
    with pytest.raises(StreamError, match=message):
        make_header(**fields)


@pytest.mark.parametrize(("at", "size"), [(24, 4), (28, 2), (32, 2), (42, 2)])
def test_zero_in_a_header_is_damage(at, size):
    data = bytearray(make_stream())
    data[at : at + size] = bytes(size)
    with pytest.raises(DamagedStream, match="header: .* is 0"):
        parse(reseal(bytes(data), 0, HEADER_BYTES))


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


def chunk_bytes(count=3, profile=GUARD, size=0, exceptions=b"\0", payload=b""):
    body = count.to_bytes(2, "little") + bytes([profile]) + size.to_bytes(4, "little") + exceptions + payload + bytes(4)
    return body + crc32(body).to_bytes(4, "little")


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


def test_as_many_chunks_as_announced():
    header = make_header()
    chunks = make_chunks(header)
    with pytest.raises(StreamError, match="2 chunks, the header announces 3"):
        write_stream(io.BytesIO(), header, chunks[:2])
    with pytest.raises(StreamError, match="more than the 3 chunks"):
        write_stream(io.BytesIO(), header, [*chunks, chunks[0]])


# bombs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_images": (1 << 24) + 1, "grid": (1, 1)}, "16777217 images, at most 16777216"),
        ({"num_images": (1 << 32) - 1}, "images"),
        ({"num_images": 1 << 24}, "tokens, at most 67108864"),
        ({"num_images": 1, "grid": (65535, 65535)}, "tokens"),
        ({"num_images": 20000, "image": (3, 500, 500), "grid": (1, 1)}, "15000000000 pixels, at most 4294967296"),
        ({"num_images": 1, "image": (65535, 65535, 65535), "grid": (1, 1)}, "pixels"),
        ({"num_images": 60000, "chunk_images": 60000, "image": (3, 64, 64), "grid": (4, 4)}, "in a chunk"),
    ],
)
def test_bombs_cost_nothing(fields, message):
    data = make_header(profile=RAW, coder=0, **fields).pack() + bytes(1000)
    assert_cheap(data, StreamLimit, message)


@pytest.mark.parametrize("named", [False, True])
def test_what_is_allowed_but_absent_costs_nothing(named):
    """One bit an image: the header may announce 16 million images, and the chunks are not there."""
    header = make_header(num_images=1 << 24, chunk_images=65535, grid=(1, 1), vocab_size=2, named=named)
    assert_cheap(header.pack() + bytes(1000), DamagedStream, "holds 0 images")
    for size, exceptions in ((65535, b"\0"), (0, b"\xff\xff\3")):
        chunk = chunk_bytes(count=65535, size=size, exceptions=exceptions, payload=bytes(900))
        assert_cheap(header.pack() + chunk, TruncatedStream, "ends early")


def assert_cheap(data, error, message):
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(error, match=message):
        parse(data)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 0.05 and peak < 1 << 17


def test_limits_are_the_callers():
    data = make_stream()
    for name, exact in (("max_images", 8), ("max_tokens", 96), ("max_pixels", 384), ("max_chunk", 180)):
        parse(data, limits=Limits(**{name: exact}))
        with pytest.raises(StreamLimit, match=f"at most {exact - 1} are allowed"):
            parse(data, limits=Limits(**{name: exact - 1}))
    parse(make_stream(num_images=3, chunk_images=60000), limits=Limits(max_chunk=180))


# the model


def test_the_model_is_the_one_expected():
    header = make_header()
    right = {"model_id": MODEL, "vocab_size": 300, "grid": (3, 4), "image": (1, 6, 8), "answer": ANSWER}
    expect(header, **right)
    expect(header, **{**right, "grid": [3, 4]})
    wrong = {"model_id": bytes(16), "vocab_size": 301, "grid": (4, 3), "image": (3, 6, 8), "answer": bytes(8)}
    for name, value in wrong.items():
        with pytest.raises(ModelMismatch, match=name if name != "answer" else "known-answer check"):
            expect(header, **{**right, name: value})
    with pytest.raises(ModelMismatch, match="grid is .3, 4. in the stream, .4, 3. here; .*vocab_size.*model_id"):
        expect(header, **wrong)


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


# names

BAD_NAMES = {
    "": "takes 0 bytes",
    "a" * 1025: "takes 1025 bytes",
    "é" * 513: "takes 1026 bytes",
    "/etc/passwd": "relative",
    "C:/a": "relative",
    "c:a": "relative",
    "..": r"empty part, \. or \.\.",
    "../a": r"\.\.",
    "a/../../b": r"\.\.",
    "a/..": r"\.\.",
    "./a": r"\.",
    "a//b": "empty part",
    "a/": "empty part",
    "a\\b": "backslash",
    "..\\a": "backslash",
    "a\0b": "control",
    "a\nb": "control",
    "\x1b[2J": "control",
    "a\x85b": "control",
}
GOOD_NAMES = ["a", "a.png", "a b/c.png", "...", "..a", "d/..b/c", "é" * 512, "日本/絵.png", "x" * 1024, "12:30.png"]


def forged(names):
    """A stream of one chunk with a table of whatever names."""
    header = make_header(num_images=len(names), named=True)
    encoded = [name.encode("utf-8", "surrogatepass") if isinstance(name, str) else name for name in names]
    table = b"".join(len(name).to_bytes(2, "little") + name for name in encoded)
    chunks = b"".join(chunk.pack(header, index) for index, chunk in enumerate(make_chunks(header)))
    return header.pack() + chunks + table + crc32(table).to_bytes(4, "little")


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name[:12]))
def test_bad_names_are_neither_written_nor_read(name):
    file = io.BytesIO()
    header = make_header(num_images=2, named=True)
    with pytest.raises(StreamError, match=f"^name .*{BAD_NAMES[name]}") as caught:
        write_stream(file, header, make_chunks(header), ["good", name])
    assert not file.getvalue() and str(caught.value).isprintable() and len(str(caught.value)) < 400
    with pytest.raises(StreamError, match=f"^name .*{BAD_NAMES[name]}"):
        parse(forged(["good", name]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "a"], "'a': appears twice"),
        (["a/b", "c", "a"], "'a': is a file and a folder"),
        (["x/a/b/c", "x/a.png", "x/a", "x/a-b"], "'x/a': is a file and a folder"),
    ],
)
def test_names_are_files_of_their_own(names, message):
    header = make_header(num_images=len(names), named=True)
    with pytest.raises(StreamError, match=message):
        write_stream(io.BytesIO(), header, make_chunks(header), names)
    with pytest.raises(StreamError, match=message):
        parse(forged(names))


def test_good_names_come_back_in_order():
    header = make_header(num_images=len(GOOD_NAMES), named=True)
    assert parse(packed(header, make_chunks(header), GOOD_NAMES)).names == GOOD_NAMES
    assert parse(forged(GOOD_NAMES)).names == GOOD_NAMES


def test_names_are_utf8():
    with pytest.raises(StreamError, match="is not UTF-8"):
        parse(forged(["good", b"\xff\xfe"]))
    with pytest.raises(StreamError, match="cannot be written as UTF-8"):
        check_names(["a\udc80"])


@pytest.mark.parametrize(
    ("named", "names"),
    [(True, None), (True, ["a"]), (True, list("abcdefghi")), (False, ["a"]), (False, list("abcdefgh"))],
)
def test_a_name_for_every_image(named, names):
    header = make_header(named=named)
    with pytest.raises(StreamError, match="^names: "):
        write_stream(io.BytesIO(), header, make_chunks(header), names)


@quick
@given(st.lists(st.text("aé/.\\\0", min_size=1, max_size=5), max_size=3))
def test_any_names_are_refused_or_come_back(names):
    header = make_header(num_images=len(names), named=True)
    try:
        data = packed(header, make_chunks(header), names)
    except StreamError:
        with pytest.raises(StreamError):
            parse(forged(names))
        return
    assert parse(data).names == names and data == forged(names)


# the module


def test_needs_neither_torch_nor_ours():
    code = (
        "import sys, types\n"
        "sys.modules |= dict.fromkeys(['torch', 'tokenizer', 'prior'])\n"
        "package = sys.modules['pipelines'] = types.ModuleType('pipelines')\n"
        f"package.__path__ = [{str(Path(streams.__file__).parent)!r}]\n"
        "from pipelines.streams import parse\n"
        f"print(len(list(parse({make_stream()!r}))))"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "3", result.stderr
