"""Tar shards (`tar`, and `tar_index`, which says what lies where): every dialect, and damaged and hostile ones.

Covers: pipelines/images/shards/tar_index.py.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from givens.image_files import identities, load, rows_of, write_tar

from pipelines.images.shards import tar as tar_shards
from pipelines.images.shards.tar_index import Member, TarError, scan


def header(name: bytes, size: int, kind: bytes = b"0", sparse: bytes = b"") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = size.to_bytes(12, "big") if size >= 8**11 else b"%011o\0" % size
    if size >= 8**11:
        block[124] |= 0x80
    block[136:148], block[156:157], block[257:263] = b"00000000000\0", kind, b"ustar\0"
    block[482 : 482 + len(sparse)] = sparse
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


END = bytes(1024)
PNG = rows_of(1)[0][1]


def members(data: bytes) -> list[Member]:
    return list(scan(io.BytesIO(data), len(data)))


def test_names_that_lead_out_are_only_names(tmp_path):
    names = ["../../escape.png", "/etc/passwd.png", "a/../../b.png", "c\x1b[31m\nred.png", "d" * 90 + ".png", "ok.png"]
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(b"".join(header(name.encode(), len(PNG)) + padded(PNG) for name in names) + END)
    before = sorted(tmp_path.rglob("*"))
    train = load(path, held_out_fraction=0.01).train
    assert len(train) == 5 and set(identities(train.pixels(range(5)))) == {0}
    assert sorted(tmp_path.rglob("*")) == before and not Path("/etc/passwd.png").exists()
    told = [train._rows.read([row])[0][0] for row in range(6)]
    assert told[0] == f"{path}: ../../escape.png" and told[3] == f"{path}: c\\x1b[31m\\nred.png"


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"V", b"S"])
def test_what_is_not_a_file_is_passed_over(kind):
    """Links, devices, folders, FIFOs, volume labels and sparse files, whose map may go on."""
    size = 1024 if kind in (b"1", b"V", b"S") else 0  # a link may have the size of what it leads to, and no data
    extra = bytes(504) + b"\1" + bytes(7) + bytes(512) if kind == b"S" else b""
    odd = header(b"a.png", size, kind, sparse=b"\1" if extra else b"") + extra + bytes(size if kind > b"9" else 0)
    found = members(odd + header(b"b.png", len(PNG)) + padded(PNG) + END)
    assert found == [Member("b.png", len(odd) + 512, len(PNG))]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "without an end mark"),
        (b"\1" * 1024, "no header of a tar at byte 0"),
        (header(b"a.png", 10**15) + END, "inside a file that goes on to byte"),
        (header(b"a.png", 5000) + bytes(1024), "inside a file"),
        (b"b" + header(b"a.png", 0)[1:] + END, "no header of a tar at byte 0"),
        (header(b"a.png", 512) + bytes(512), "without an end mark"),
        (header(b"x", 1 << 40, b"L") + END, "a header of 1099511627776 bytes"),
        (header(b"x", 1 << 33, b"x") + END, "a header of 8589934592 bytes"),
        (header(b"x", 20_000_000, b"x") + bytes(20_000_256), "a header of 20000256 bytes"),
        (header(b"x", 20_000_000, b"g") + bytes(20_000_256), "a header of 20000256 bytes"),
        (header(b"x", 0, b"x") * 10_000 + END, "no header of a tar at byte"),
        (header(b"x", 512, b"S", sparse=b"\1") + (bytes(504) + b"\1" + bytes(7)) * 10_000, "no header of a tar"),
        (header(b"a.png", 0) + b"\1" * 512 + END, "no header of a tar at byte 512"),
        (header(b"a.png", 512)[:124] + b"-0000000001\0" + header(b"a.png", 512)[136:] + END, "no header"),
        (header(b"a.png", 100, b"S", sparse=b"\1") + END[:512], "it ends at byte 1024"),
    ],
)
def test_damaged_tars_say_where(data, message):
    with pytest.raises(TarError, match=message):
        members(data)


def test_every_cut_of_a_tar_is_noticed(tmp_path):
    data = write_tar(tmp_path / "a.tar", rows_of(4)).read_bytes()
    whole = members(data)
    end = max(member.offset + member.size for member in whole)
    end += -end % 512
    for cut in [*range(0, end, 97), end]:
        with pytest.raises(TarError):
            members(data[:cut])


@pytest.mark.parametrize("seed", range(4))
def test_any_change_of_a_tar_gives_members_inside_of_it_or_an_error(tmp_path, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(write_tar(tmp_path / "a.tar", rows_of(3)).read_bytes())
    outcomes = set()
    for _ in range(300):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        try:
            found = members(bytes(changed))
        except TarError:
            outcomes.add("error")
            continue
        outcomes.add("members")
        assert all(m.offset >= 0 and m.offset + m.size <= len(data) for m in found) and len(found) <= len(data) // 512
    assert outcomes == {"error", "members"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_dialect_are_read_as_tarfile_reads_them(tmp_path, format):
    path, rng = tmp_path / "a.tar", np.random.default_rng(0)
    names = ["a.png", "b/c.png", "x" * 60 + "/" + "y" * 90 + ".png", "ü/ä.png"]
    names += ["z" * 150 + "/" + "w" * 120 + ".png"] if format != tarfile.USTAR_FORMAT else []
    with tarfile.open(path, "w", format=format, pax_headers={"comment": "all"}) as tar:
        for number, name in enumerate(names):
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            member = tarfile.TarInfo(name)
            member.size = int(rng.integers(0, 2000))
            member.mtime = 1.5  # which pax writes down
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    with tarfile.open(path) as tar:
        expected = [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert members(path.read_bytes()) == expected and len(expected) == len(names)


def test_a_huge_member_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_shards, "MAX_FILE", 3000)
    path = write_tar(tmp_path / "test.tar", rows_of(3)).with_name("train.tar")
    parts = [(b"a.png", PNG), (b"b.png", bytes(9000)), (b"c.png", PNG), *((b"%d.png" % k, PNG) for k in range(7))]
    path.write_bytes(b"".join(header(name, len(data)) + padded(data) for name, data in parts) + END)
    train = load(tmp_path, on_error="skip", max_bad_fraction=0.5).train
    assert len(train) == 10 and set(identities(train.pixels(range(10)))) == {0}
    assert [(p.row, p.reason) for p in train.report.problems] == [(1, "a file of 9000 bytes; the limit is 3000")]


def test_labels_may_be_numbers_and_words(tmp_path):
    """In one file; numbers come first."""
    rows = [(key, data, ("cat", 7, 3)[k % 3]) for k, (key, data, _) in enumerate(rows_of(12))]
    assert load(write_tar(tmp_path / "a.tar", rows)).train.class_names == ["3", "7", "cat"]
