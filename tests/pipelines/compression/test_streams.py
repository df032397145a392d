"""The container: what goes in comes out, and whatever is wrong with a stream is said before anything is decoded."""

import io
import mmap
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from givens.made_streams import make_chunk, make_chunks, make_header, make_names, make_stream, packed, quick, reseal
from hypothesis import given
from hypothesis import strategies as st

from pipelines.compression import streams
from pipelines.compression.chunks import Chunk, digest, pack_bits, unpack_bits, verify
from pipelines.compression.header import GUARD, HEADER_BYTES, RAW, DamagedStream, Header, StreamError, TruncatedStream
from pipelines.compression.streams import parse, write_stream

VARIANTS = {
    "plain": {},
    "lossless, named": {"lossless": True, "named": True},
    "raw": {"profile": RAW, "coder": 0, "named": True},
    "empty": {"num_images": 0},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)

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


def test_as_many_chunks_as_announced():
    header = make_header()
    chunks = make_chunks(header)
    with pytest.raises(StreamError, match="2 chunks, the header announces 3"):
        write_stream(io.BytesIO(), header, chunks[:2])
    with pytest.raises(StreamError, match="more than the 3 chunks"):
        write_stream(io.BytesIO(), header, [*chunks, chunks[0]])


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


@pytest.mark.parametrize("count", [2, 4])
def test_how_many_chunks_there_should_be_is_told_in_full(count):
    header = make_header()
    chunks = (make_chunks(header) * 2)[:count]
    said = "2 chunks, the header announces 3" if count == 2 else "more than the 3 chunks that the header announces"
    with pytest.raises(StreamError, match=f"^{said}$"):
        write_stream(io.BytesIO(), header, chunks)


def test_how_many_names_there_should_be_is_told_in_full():
    for named, names, said in ((True, None, "8 expected, got 0"), (False, ["a", "b"], "0 expected, got 2")):
        header, file = make_header(named=named), io.BytesIO()
        with pytest.raises(StreamError, match=f"^names: {said}$"):
            write_stream(file, header, make_chunks(header), names)
        assert not file.getvalue()


def test_damage_that_came_after_the_first_look_is_told_in_full():
    data = bytearray(make_stream())
    stream, start = parse(data), len(make_header().pack())
    assert [stream.chunk(index).count for index in (2, 0, 1)] == [2, 3, 3]
    data[start + 9] ^= 1
    with pytest.raises(DamagedStream, match=r"^chunk 0: damaged \(its checksum differs\)$"):
        stream.chunk(0)
    assert stream.chunk(1).count == 3
    with pytest.raises(DamagedStream, match=rf"^chunk 0 \(at byte {start}\): damaged \(its checksum differs\)$"):
        parse(data)
    with pytest.raises(DamagedStream, match=rf"^2 bytes follow the end, at byte {len(data)}$"):
        parse(make_stream() + b"ab")
