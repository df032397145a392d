"""The header: what it may say, bombs that cost nothing, and the model that is expected."""

import time
import tracemalloc

import pytest
from made_streams import ANSWER, MODEL, chunk_bytes, make_header, make_stream, reseal

from pipelines.compression.header import (
    HEADER_BYTES,
    RAW,
    DamagedStream,
    ForeignStream,
    Limits,
    ModelMismatch,
    StreamError,
    StreamLimit,
    TruncatedStream,
    expect,
)
from pipelines.compression.streams import parse

# what it may say


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
