"""The container format: streams round-trip, and anything wrong is one error before decoding."""

import io
from zlib import crc32

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.compression.container import (
    Chunk,
    DamagedStream,
    Header,
    StreamError,
    pack_section,
    read_stream,
    write_stream,
)

quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)
PARTS = ["a", "b.png", "größe", "日本", "...", "..a", "12:30", "x" * 255]


def make_header(images=8, chunk_images=3, lossless=False, names=(), condition=b""):
    return Header(bytes(range(16)), (1, 6, 8), images, chunk_images, lossless, tuple(names), condition)


def make_chunks(header, seed=0):
    """Payloads are noise: the container does not interpret them."""
    rng = np.random.default_rng(seed)

    def chunk():
        positions = np.sort(rng.choice(100, rng.integers(4), replace=False)).astype(np.uint32)
        pixels = rng.bytes(rng.integers(40)) if header.lossless else b""
        return Chunk(positions, rng.bytes(rng.integers(40)), pixels, int(rng.integers(1 << 32)), bool(rng.integers(2)))

    return [chunk() for _ in range(header.num_chunks)]


def packed(header, chunks):
    file = io.BytesIO()
    assert write_stream(file, header, chunks) == len(file.getvalue())
    return file.getvalue()


def make_stream(**fields):
    header = make_header(**fields)
    return packed(header, make_chunks(header))


def plain(chunk):
    return chunk.exceptions.tolist(), bytes(chunk.tokens), bytes(chunk.pixels), chunk.digest, chunk.classes


def replaced(data, number, content):
    """Return `data` with other content in section `number`, under a valid checksum."""
    at = 8
    for _ in range(number):
        at += 8 + int.from_bytes(data[at : at + 4], "little")
    end = at + 8 + int.from_bytes(data[at : at + 4], "little")
    return data[:at] + pack_section(content) + data[end:]


names = st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("/".join), unique=True, max_size=6)


@quick
@given(
    st.builds(
        Header,
        st.binary(min_size=16, max_size=16),
        st.tuples(*[st.integers(0, 65535)] * 3),
        st.integers(0, 12),
        st.integers(1, 5) | st.just(65535),
        st.booleans(),
        st.just(()),
        st.just(b"") | st.binary(min_size=8, max_size=8),
        st.none(),
    ),
    names,
    st.integers(0, 1000),
)
def test_streams_round_trip(header, names, seed):
    assume(not any(other.startswith(f"{name}/") for name in names for other in names))  # a file and a folder
    if names:
        header = header._replace(images=len(names), names=tuple(names))
    chunks = make_chunks(header, seed)
    found, read = read_stream(packed(header, chunks))
    assert found == header and list(map(plain, read)) == list(map(plain, chunks))


def test_the_bytes_of_a_stream_are_these():
    header = Header(b"0123456789abcdef", (3, 256, 258), 2, 7, True, ("a", "b/c"))
    data = packed(header, [Chunk(np.array([5, 600], np.uint32), b"tokens", b"pixels", 0x01020304, True)])
    parts = (
        b"smalti\x00\x01",
        b"\x1d\x00\x00\x000123456789abcdef\x03\x00\x00\x01\x02\x01\x02\x00\x00\x00\x07\x00\x01",
        b"\x05\x00\x00\x00a\x00b/c",
        b"\x21\x00\x00\x00\x04\x03\x02\x01\x02\x00\x00\x00\x06\x00\x00\x00\x01\x05\x00\x00\x00\x58\x02\x00\x00"
        b"tokenspixels",
    )
    sections = [part + crc32(part[4:]).to_bytes(4, "little") for part in parts[1:]]
    assert data == b"".join([parts[0], *sections])


def test_the_bytes_of_a_condition_are_these():
    """A header without a condition has version 1, and is read only as version 1."""
    without, given = (make_stream(condition=condition) for condition in (b"", b"12345678"))
    assert without[7:12] == b"\1\x1d\0\0\0" and given[7:12] == b"\2\x25\0\0\0"
    assert given[12:49] == without[12:41] + b"12345678" and given[53:] == without[45:]
    for wrong in (without[:7] + b"\2" + without[8:], given[:7] + b"\1" + given[8:]):
        with pytest.raises(DamagedStream):
            read_stream(wrong)


def test_every_prefix_and_every_bit_matters():
    usual, empty = {"lossless": True, "names": [f"a/{k}.png" for k in range(8)]}, {"images": 0}
    for fields in (usual, empty, {"condition": b"12345678"}):
        data = make_stream(**fields)
        for size in range(len(data)):
            with pytest.raises(StreamError):
                read_stream(data[:size])
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(StreamError):
                read_stream(bytes(damaged))
        for more in (b"\0", data):
            with pytest.raises(DamagedStream):
                read_stream(data + more)


@quick
@given(st.integers(0, 4), st.binary(max_size=60), st.sampled_from([b"", b"12345678"]))
def test_garbage_is_one_error(number, garbage, condition):
    """With a valid checksum it may be accepted, but then it can be read throughout."""
    data = make_stream(names=[f"{k}" for k in range(8)], condition=condition)
    for wrong in (garbage, b"smalti\0\1" + garbage, b"smalti\0\2" + garbage):
        with pytest.raises(StreamError):
            read_stream(wrong)
    try:
        header, chunks = read_stream(replaced(data, number, garbage))
    except StreamError as error:
        assert "\n" not in str(error) and str(error).isprintable()
    else:
        assert len(chunks) == header.num_chunks and all(plain(chunk) for chunk in chunks)


def test_impossible_counts_in_a_header_are_refused_without_allocating():
    data = make_stream()
    for images, of_a_chunk in ((2**32 - 1, 1), (8, 0)):
        fields = data[12:34] + images.to_bytes(4, "little") + of_a_chunk.to_bytes(2, "little") + b"\0"
        with pytest.raises(DamagedStream):
            read_stream(replaced(data, 0, fields))


def test_another_version_is_not_damage():
    data = make_stream()
    with pytest.raises(StreamError) as caught:
        read_stream(data[:7] + b"\4" + data[8:])
    assert type(caught.value) is StreamError


@pytest.mark.parametrize(
    "name",
    [
        *("", "/etc/passwd", "c:a", "a/../../b", "./a", "a//b", "a\\b"),
        *("a\nb", "\x1b[2J", "a\x85b", "é" * 128, "\udcff", "good", "good/a"),
    ],
    ids=repr,
)
def test_bad_names_are_neither_written_nor_read(name):
    """Each beside another image called `good`; and one name is missing."""
    file, header = io.BytesIO(), make_header(images=2, names=["good", name])
    with pytest.raises(StreamError) as caught:
        write_stream(file, header, make_chunks(header))
    assert not file.getvalue() and str(caught.value).isprintable() and len(str(caught.value)) < 400
    with pytest.raises(StreamError):
        write_stream(io.BytesIO(), header._replace(names=("a",)), [])
    with pytest.raises(StreamError):
        read_stream(replaced(make_stream(images=2), 1, b"good\0" + name.encode(errors="surrogateescape")))
