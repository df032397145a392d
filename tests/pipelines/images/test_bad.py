"""Images as they come: damaged, hostile and unusual ones among plain ones, in a folder, in parquet and in a tar.

Of eight kinds, four are bad (truncated, empty, text, bomb) and four are read (CMYK, 16 bits, animated, EXIF).

Covers: pipelines/images/decoding.py, pipelines/images/streamed.py.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import re
import struct
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from givens.image_files import Row, encoded, noise, write_parquet, write_tar
from PIL import Image

from pipelines.images import DataConfig, Splits, decoding, load_images
from pipelines.images.bad import REPORT, Problem, Report, append_report, judge, listed, read_report

SIDE = 16
SHAPE = (3, SIDE, SIDE)
TRUNCATED = noise(40, 40, 3)


def bomb(seed: int) -> bytes:
    """A PNG of 8 kB whose 9000 x 9000 pixels are all there: it would take 240 MB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    row = b"\0" + bytes(9000 // 8)
    pixels = b"".join(compressor.compress(row) for _ in range(9000)) + compressor.flush()
    header = struct.pack(">IIBBBBB", 9000, 9000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"tEXt", b"n\0%d" % seed)
        + chunk(b"IDAT", pixels)
        + (chunk(b"IEND", b""))
    )


BOMB = bomb(0)


def marked(seed: int) -> np.ndarray:
    """Pixels that say which image they are, in blocks that JPEG keeps: 12 bits of the seed in the upper half, and the
    lower half black so that one sees which way is up."""
    bits = [seed >> k & 1 for k in range(12)] + [1, 1, 0, 1]
    upper = np.array(bits, np.uint8).reshape(2, 8).repeat(4, 0).repeat(2, 1) * 255
    return np.concatenate([upper, np.zeros_like(upper)])


def upright(pixels: np.ndarray) -> int:
    """Which image these pixels (C, H, W) are of, -1 for one that is none of ours."""
    bits = pixels.astype(int).mean(0).reshape(4, 4, 8, 2).mean((1, 3))
    certain = np.abs(bits - 127.5).min() > 60 and np.ptp(pixels.astype(int), axis=0).max() < 40
    values = (bits[:2] > 127.5).flatten().astype(int)
    if not certain or values[12:].tolist() != [1, 1, 0, 1] or (bits[2:] > 127.5).any():
        return -1
    return int(sum(value << k for k, value in enumerate(values[:12])))


def make(kind: str, seed: int) -> bytes:
    """The file of image `seed`."""
    pixels = marked(seed)
    image = Image.fromarray(pixels)
    if kind == "truncated":
        return encoded(TRUNCATED, ("PNG", "JPEG")[seed % 2])[: 400 + seed % 50]
    if kind == "cmyk":
        return encoded(Image.merge("CMYK", [Image.new("L", image.size)] * 3 + [Image.fromarray(255 - pixels)]), "JPEG")
    if kind == "16-bit":
        levels = 40 + pixels.astype(np.uint16) // 255 * 175  # which would be white if they were cut off at 255
        return encoded(Image.fromarray(levels * 257))
    if kind == "animated":
        frames = [Image.fromarray(marked(seed + step)) for step in (1, 2)]
        format, options = (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}))[seed % 3]
        return encoded(image, format, save_all=True, append_images=frames, **options)
    if kind == "exif":
        turned = {1: 0, 3: 2, 6: 1, 8: 3}  # orientation -> quarter turns that undo it
        orientation = (3, 6, 8)[seed % 3]
        exif = Image.Exif()
        exif[0x0112] = orientation
        return encoded(Image.fromarray(np.rot90(pixels, turned[orientation])), "JPEG", exif=exif, quality=95)
    fixed = {"empty": b"", "text": b"<html>404</html> %d" % seed, "bomb": BOMB}
    return fixed.get(kind, encoded(image, ("PNG", "JPEG", "WEBP", "BMP")[seed % 4]))


BAD = {
    "truncated": "truncated|broken|cannot identify|not an image",
    "empty": "empty",
    "text": "not an image",
    "bomb": "9000 x 9000 pixels; the limit is",
}
READ = ("cmyk", "16-bit", "animated", "exif")


def collection(of_each: int, plain: int) -> list[tuple[str, int]]:
    """(kind, seed) of images in a random order that is always the same."""
    kinds = [kind for kind in (*BAD, *READ) for _ in range(of_each)] + ["plain"] * plain
    return [(kinds[k], k) for k in np.random.default_rng(0).permutation(len(kinds)).tolist()]


def written(folder: Path, source: str, images: list[tuple[str, int]]) -> tuple[Path, list[str]]:
    """Where they are, and the name that each has in reports."""
    rows: list[Row] = [(f"{place:04d}", make(*image), 0) for place, image in enumerate(images)]
    if source == "folder":
        for key, data, _ in rows:
            (folder / "one").mkdir(parents=True, exist_ok=True)
            (folder / "one" / f"{key}.jpg").write_bytes(data)
        return folder, [str(folder / "one" / f"{key}.jpg") for key, _, _ in rows]
    if source == "tar":
        path = write_tar(folder / "a.tar", rows, suffix="jpg")
        return path, [f"{path}: {key}.jpg" for key, _, _ in rows]
    path = write_parquet(folder / "a.parquet", rows, group=50)
    return path, [
        f"{path}: row {place}" if source == "parquet" else f"row {place} of train ({key}.png)"
        for place, (key, _, _) in enumerate(rows)
    ]


SOURCES = {"folder": False, "folder, streamed": True, "parquet read whole": False, "parquet": True, "tar": True}


def check(folder: Path, source: str, images: list[tuple[str, int]]) -> Counter[str]:
    """Load them, and hold what is found against what was written; returns how many of each kind were read or bad."""
    path, names = written(folder / "data", source.split(",")[0], images)
    config = DataConfig(
        source=str(path),
        image_size=SIDE,
        channels=3,
        streaming=SOURCES[source],
        on_error="skip",
        max_bad_fraction=1,
        held_out_fraction=0.2,
    )
    splits = load_images(config)
    found = {part: part.pixels(range(len(part))).numpy() for part in splits.named().values()}
    counts: Counter[str] = Counter()
    problems = {p.row: p for part in found for p in part.report.problems}
    for part, pixels in found.items():
        for position, image in zip(part._positions.tolist(), pixels, strict=True):
            kind, seed = images[position]
            seen = upright(image)
            if position in problems:  # streamed: another one stands in
                stand_in = problems[position].replaced_by
                assert stand_in is not None and seen == images[names.index(stand_in)][1]
                assert images[names.index(stand_in)][0] not in BAD
                continue
            assert seen == seed, f"{kind} {seed} is read as {seen}"
            counts[kind] += 1
    for row, problem in problems.items():
        kind = images[row][0]
        assert kind in BAD and problem.path == names[row], problem
        assert re.search(BAD[kind], problem.reason, re.IGNORECASE), problem
        counts[kind] += 1
    assert len(problems) == sum(kind in BAD for kind, _ in images)
    verify_report(folder, splits, names, problems)
    return counts


def verify_report(folder: Path, splits: Splits, names: list[str], problems: dict[int, Any]) -> None:
    """The file that a run leaves has the same."""
    splits.write_report(folder)
    lines = read_report(folder)
    assert {line["row"]: (line["path"], line["reason"]) for line in lines} == {
        row: (names[row], problem.reason) for row, problem in problems.items()
    }
    assert len(lines) == len(problems)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("source", [pytest.param(name, marks=[pytest.mark.slow] * (" " in name)) for name in SOURCES])
def test_hundreds_of_which_a_quarter_are_altered(tmp_path, source):
    """12 of each kind and 304 plain ones: each is read, or reported with its path and the reason."""
    counts = check(tmp_path, source, collection(12, 304))
    assert counts == {**dict.fromkeys((*BAD, *READ), 12), "plain": 304}


class Watched:
    """The most memory that this process has while a block runs, above what it had before, in bytes."""

    def __enter__(self) -> Watched:
        with suppress(AttributeError, OSError):  # not glibc: give freed memory back to the system
            ctypes.CDLL(None).malloc_trim(0)
        self.process, self.done, self.most = psutil.Process(), threading.Event(), 0
        self.before = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.001):
            self.most = max(self.most, self.process.memory_info().rss - self.before)

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_take_no_memory(tmp_path):
    with Watched() as plain:  # the control: what one of them takes that is opened without a look at its size
        np.asarray(Image.open(written(tmp_path / "one", "folder", [("bomb", 0)])[0] / "one/0000.jpg").convert("RGB"))
    assert plain.most > 200e6
    path, _ = written(tmp_path / "all", "tar", [("bomb", k) for k in range(30)] + [("plain", k) for k in range(20)])
    config = DataConfig(
        source=str(path), image_size=SIDE, channels=3, streaming=True, on_error="skip", max_bad_fraction=1
    )
    with Watched() as all_of_them:
        train = load_images(config).train
        train.pixels(range(len(train)))
    assert train.report.bad >= 25 and all_of_them.most < 60e6


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_file_is_a_bad_image_and_not_waited_for(tmp_path, monkeypatch, streaming):
    """A FIFO never ends, and a file may be larger than memory; a link is followed, if it leads anywhere."""
    monkeypatch.setattr("pipelines.images.decoding.MAX_FILE", 2000)
    for seed in range(8):
        (tmp_path / f"{seed}.png").write_bytes(encoded(Image.fromarray(marked(seed))))
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "huge.png").write_bytes(bytes(2001))
    config = DataConfig(
        source=str(tmp_path),
        image_size=SIDE,
        channels=3,
        streaming=streaming,
        on_error="skip",
        max_bad_fraction=1,
        held_out_fraction=0.4,
    )
    splits = load_images(config)
    found = [p for part in splits.named().values() for p in (part.pixels(range(len(part))), part.report.problems)[1]]
    assert {(Path(p.path).name, p.reason) for p in found} == {
        ("fifo.png", "no such file, or not a regular one"),
        ("gone.png", "no such file, or not a regular one"),
        ("huge.png", "a file of more than 2000 bytes"),
    }


class Group:
    """A group of processes, each of them a thread, as `torch.distributed` shows it."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.told = size, threading.Barrier(size, timeout=30), [None] * size
        self.local = threading.local()

    def is_initialized(self) -> bool:
        return hasattr(self.local, "rank")

    def get_rank(self) -> int:
        return self.local.rank

    def get_world_size(self) -> int:
        return self.size

    def all_gather_object(self, found: list[Any], value: Any) -> None:
        self.told[self.local.rank] = value
        self.barrier.wait()
        found[:] = self.told
        self.barrier.wait()

    def run(self, act: Any) -> list[Any]:
        """What `act` returns to each."""

        def work(rank: int) -> Any:
            self.local.rank = rank
            return act()

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(work, range(self.size)))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("cache_mb", [0, 100])
def test_processes_share_the_check_of_what_they_cannot_keep(tmp_path, monkeypatch, size, cache_mb):
    """All of them know of every bad image, and each image is decoded by one of them; what they keep, by each."""
    folder, _ = written(tmp_path / "data", "folder", collection(2, 30))
    config = DataConfig(
        source=str(folder), image_size=SIDE, channels=3, on_error="skip", max_bad_fraction=1, cache_mb=cache_mb
    )
    alone, checked, group = load_images(config), [], Group(size)
    decode_chunk = decoding.decode_chunk
    monkeypatch.setattr(decoding, "decode_chunk", lambda *given: checked.extend(given[2]) or decode_chunk(*given))
    monkeypatch.setattr(decoding, "CHUNK", 3)
    monkeypatch.setattr(decoding, "dist", group)
    assert alone.train.report.bad > 4
    for splits in group.run(lambda: load_images(config, together=True)):
        for name, part in splits.named().items():
            other = alone.named()[name]
            assert part.report == other.report and np.array_equal(part._positions, other._positions)
            assert torch.equal(part.pixels(range(len(part))), other.pixels(range(len(other))))
    times = Counter(Counter(checked).values())
    assert times == {size if cache_mb else 1: sum(part.report.found for part in alone.named().values())}
    checked.clear()
    group.run(lambda: load_images(config))  # each for itself
    assert set(Counter(checked).values()) == {size}


@pytest.mark.parametrize(("kind", "count"), [(kind, 40) for kind in (*READ, "plain")])
def test_the_marks_can_be_read_and_would_tell(kind, count):
    """The instrument: every mark survives its format, and a wrong image, a turned or an inverted one is seen."""
    from pipelines.images.decoding import decode

    for seed in range(count):
        pixels = decode(make(kind, seed), SHAPE)
        assert upright(pixels) == seed
        for wrong in (255 - pixels, np.rot90(pixels, 1, (1, 2)), pixels[:, ::-1], pixels // 2, pixels * 0):
            assert upright(wrong) != seed


def test_a_name_forges_no_line_and_a_report_holds_lines_of_problems_alone(tmp_path):
    """Whatever is in the file: a line of a half, of another thing, of no text at all."""
    told = listed([Problem("a\nerror: forged\x1b[2J.png", 0, "the file is empty")])
    assert told == "\n  a\\nerror: forged\\x1b[2J.png: the file is empty"
    good = {"split": "train", "path": "a", "row": 0, "reason": "b", "replaced_by": None}
    lines = [json.dumps(good).encode(), b"\xff\xfe", b"[" * 5000, b"[]", b"3", b'{"split": "train"}', b'{"split":', b""]
    (tmp_path / REPORT).write_bytes(b"\n".join(lines))
    assert read_report(tmp_path) == [good]
    append_report(tmp_path, "train", [Problem("a", 0, "b"), Problem("c", 1, "d")])
    assert [line["row"] for line in read_report(tmp_path)] == [0, 1]


def test_what_cannot_be_reported_on_a_full_disk_is_left_at_that(tmp_path, monkeypatch):
    """Neither the report nor, as the log is on the same disk, the warning ends what goes on."""

    tried = []

    class Full(io.StringIO):
        def write(self, text):
            tried.append(text)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / REPORT).mkdir()
    monkeypatch.setattr(sys, "stderr", Full())
    append_report(tmp_path, "train", [Problem("a", 0, "b")])
    judge([Report(100, [Problem("a", 0, "b")])], DataConfig(on_error="skip", max_bad_fraction=0.5))
    assert f"{tmp_path / REPORT} cannot be written" in tried[0] and "1 of 100 images" in tried[1] and len(tried) == 2
