"""The header: what it may say, bombs that cost nothing, and the model that is expected."""

import re
import time
import tracemalloc

import pytest
from givens.made_streams import ANSWER, MODEL, chunk_bytes, make_header, make_stream, reseal

from pipelines.compression.header import (
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


# what it says


def words(text):
    """A pattern of this text and nothing else."""
    return f"^{re.escape(text)}$"


RANGES = {
    "vocab_size": ("vocab_size", 1, 1 << 20),
    "num_images": ("num_images", 0, (1 << 32) - 1),
    "chunk_images": ("chunk_images", 1, (1 << 16) - 1),
    "grid": ("a side of grid", 1, (1 << 16) - 1),
    "image": ("a size of image", 1, (1 << 16) - 1),
}


@pytest.mark.parametrize("field", RANGES)
def test_a_range_is_to_its_ends_and_told_in_full(field):
    name, low, high = RANGES[field]

    def headers(value):
        if field not in ("grid", "image"):
            return [{field: value}]
        sides = (2, 3) if field == "grid" else (1, 2, 3)
        return [{field: (*sides[:at], value, *sides[at + 1 :])} for at in range(len(sides))]

    for value in (low, high):
        assert all(Header.unpack(make_header(**fields).pack()) == make_header(**fields) for fields in headers(value))
    for value in (low - 1, high + 1):
        said = words(f"header: {name} is {value}, allowed are {low} to {high}")
        for fields in headers(value):
            with pytest.raises(DamagedStream, match=said):
                make_header(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"profile": 3}, ForeignStream, "header: profile 3 is unknown; this version reads 0 and 1"),
        ({"coder": 2}, ForeignStream, "header: coder 2 is unknown; this version reads 0, 1"),
        ({"coder": 0}, DamagedStream, "header: profile 1 does not go with coder 0"),
        ({"profile": 0}, DamagedStream, "header: profile 0 does not go with coder 1"),
        *(
            (wrong, DamagedStream, "header: model_id takes 16 bytes, answer 8, grid two sizes and image three")
            for wrong in ({"model_id": bytes(15)}, {"answer": bytes(9)}, {"grid": (1,)}, {"image": (1, 2)})
        ),
    ],
)
def test_what_is_wrong_with_a_header_is_told_in_full(fields, error, said):
    with pytest.raises(error, match=words(said)):
        make_header(**fields)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ((0, b"\x89PNG"), ForeignStream, "not a stream of ours: begins with b'\\x89PNG', expected b'VQC1'"),
        ((4, b"\3"), ForeignStream, "header: version 3 is unknown; this version of smalti reads 1"),
        ((7, b"\6"), ForeignStream, "header: flags 0x6 are unknown; this version reads 0x3"),
        ((9, b"?"), DamagedStream, "header: damaged (its checksum differs)"),
    ],
)
def test_what_cannot_be_read_is_told_in_full(change, error, said):
    at, value = change
    data = bytearray(make_stream())
    data[at : at + len(value)] = value
    with pytest.raises(error, match=words(said)):
        parse(bytes(data) if "damaged" in said else reseal(bytes(data), 0, HEADER_BYTES))


def test_how_far_a_header_goes_is_told_in_full():
    data = make_stream()
    for size in (0, 1, 4, HEADER_BYTES - 1):
        said = f"header: the stream ends after {size} bytes, a header takes 56"
        with pytest.raises(TruncatedStream, match=words(said)):
            parse(data[:size])


def test_what_is_too_much_is_told_in_full():
    header = make_header(num_images=5, chunk_images=3)
    for fields, said in (
        ({"max_images": 4}, "5 images, at most 4"),
        ({"max_tokens": 59}, "60 tokens, at most 59"),
        ({"max_pixels": 239}, "240 pixels, at most 239"),
        ({"max_chunk": 179}, "180 tokens and pixels in a chunk, at most 179"),
    ):
        with pytest.raises(StreamLimit, match=words(f"header: announces {said} are allowed")):
            Limits(**fields).check(header)
    Limits(max_images=5, max_tokens=60, max_pixels=240, max_chunk=180).check(header)


def test_another_model_is_told_in_full():
    header = make_header()
    right = {"model_id": MODEL, "vocab_size": 300, "grid": [3, 4], "image": [1, 6, 8], "answer": ANSWER}
    wrong = {"model_id": bytes(16), "vocab_size": 301, "grid": [4, 3], "image": [3, 6, 8], "answer": bytes(8)}
    told = {
        "image": "image (c, h, w) is (1, 6, 8) in the stream, (3, 6, 8) here",
        "grid": "grid is (3, 4) in the stream, (4, 3) here",
        "vocab_size": "vocab_size is 300 in the stream, 301 here",
        "model_id": f"model_id is {MODEL.hex()} in the stream, {'00' * 16} here",
    }
    for name, said in told.items():
        with pytest.raises(ModelMismatch, match=words(f"made by another model: {said}")):
            expect(header, **{**right, name: wrong[name]})
    with pytest.raises(ModelMismatch, match=words(f"made by another model: {'; '.join(told.values())}")):
        expect(header, **wrong)
    said = (
        "known-answer check: this machine computes other probabilities than the one that made the stream "
        f"({'00' * 8} here, {ANSWER.hex()} there)"
    )
    with pytest.raises(ModelMismatch, match=words(said)):
        expect(header, **{**right, "answer": bytes(8)})


def test_a_header_counts_what_its_chunks_hold():
    header = make_header(num_images=8, chunk_images=3, vocab_size=256)
    assert (header.num_tokens, header.num_pixels, header.token_bits, header.num_chunks) == (12, 48, 8, 3)
    assert [header.images_in(index) for index in range(3)] == [3, 3, 2]
    assert header.symbols_in(2) == (24,) and make_header(lossless=True).symbols_in(2) == (24, 96)
    assert [make_header(vocab_size=size).token_bits for size in (1, 2, 3, 257)] == [0, 1, 2, 9]
    assert [make_header(num_images=count).num_chunks for count in (0, 1, 3, 4, 6)] == [0, 1, 1, 2, 2]
