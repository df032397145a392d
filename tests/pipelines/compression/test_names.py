"""Names of images: bad ones are neither written nor read, good ones come back in order."""

import io
import re
from zlib import crc32

import pytest
from givens.made_streams import make_chunks, make_header, packed, quick
from hypothesis import given
from hypothesis import strategies as st

from pipelines.compression.header import DamagedStream, StreamError, TruncatedStream
from pipelines.compression.names import check_names
from pipelines.compression.streams import parse, write_stream

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


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a" * 1025], f"name {'a' * 80!r}: takes 1025 bytes, allowed are 1 to 1024"),
        ([""], "name '': takes 0 bytes, allowed are 1 to 1024"),
        (["a\udc80"], "name 'a\\udc80': cannot be written as UTF-8"),
        (["a\\b"], "name 'a\\\\b': holds a backslash or a control character"),
        (["/a"], "name '/a': should be relative"),
        (["z:a"], "name 'z:a': should be relative"),
        (["Z:a"], "name 'Z:a': should be relative"),
        (["a/./b"], "name 'a/./b': should not hold an empty part, . or .."),
        (["b/a", "c", "b/a"], "name 'b/a': appears twice"),
        (["b/a/d", "b/a", "b/a.c"], "name 'b/a': is a file and a folder"),
        (["b" * 90 + "/c", "b" * 90], f"name {'b' * 80!r}: is a file and a folder"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[-30:],
)
def test_what_is_wrong_with_names_is_told_in_full(names, said):
    with pytest.raises(StreamError, match=f"^{re.escape(said)}$"):
        check_names(names)


def test_where_names_end_early_is_told_in_full():
    data, header = forged(["a", "bc"]), make_header(num_images=2, named=True)
    at = len(data) - 4 - 7
    assert header.num_chunks == 1
    for end in (at + 1, at + 2, at + 5, at + 8):
        said = f"names (at byte {at}): the stream ends early, after {end} bytes"
        with pytest.raises(TruncatedStream, match=f"^{re.escape(said)}$"):
            parse(data[:end])
    damaged = bytearray(data)
    damaged[at + 2] ^= 1
    with pytest.raises(DamagedStream, match=rf"^names \(at byte {at}\): damaged \(its checksum differs\)$"):
        parse(bytes(damaged))
    with pytest.raises(StreamError, match=r"^names: b'\\xff\\xfe' is not UTF-8$"):
        parse(forged(["good", b"\xff\xfe"]))
    with pytest.raises(StreamError, match=rf"^names: {re.escape(repr(b'x' * 79 + b'_'))} is not UTF-8$"):
        parse(forged([b"x" * 79 + b"_" + b"\xff" * 20]))
