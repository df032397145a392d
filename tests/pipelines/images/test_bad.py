"""Damaged and hostile images among good ones, in folders, sheets, parquet and tar files, copied and streamed.

Covers: pipelines/images/decoding.py.
"""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from givens.images import BAD, Row, config, identities, load, rows_of, write_image, write_shards, write_table

from pipelines.config import UserError
from pipelines.images import crops, decoding, load_images
from pipelines.images.dataset import BAD_IMAGES, list_bad
from pipelines.images.decoding import BadImage

GOOD = 40
KINDS = ["folder", "sheet", "parquet", "tar", "parquet stream", "tar stream"]
OPTIONS = {"held_out": "test", "validation_fraction": 0}


def write_source(folder: Path, kind: str, damage: str) -> None:
    """Write 40 good and three damaged images in `train`, and four good ones in `test`."""
    rows: list[Row] = rows_of(GOOD)
    for place in (4, 17, 40):
        rows.insert(place, (f"{place:05d}x", BAD[damage][0], place % 3))
    if kind in ("folder", "sheet"):
        for split, some in (("train", rows), ("test", rows_of(4))):
            for key, data, label in some:
                write_image(folder / split / ("" if kind == "sheet" else f"class{label}") / f"{key}.png", data)
            lines = [json.dumps({"file_name": f"{key}.png", "label": label}) for key, _, label in some]
            if kind == "sheet":
                (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    else:
        write_shards(folder, kind.split()[0], rows, 3)
        write_shards(folder, kind.split()[0], rows_of(4), 1, split="test")


def read_stream(train: Any, count: int) -> torch.Tensor:
    """Return the next `count` images of a stream, in steps of four."""
    return torch.cat([train.raw_batch(train.samples(4, 0, k)[0], 0, 0)[0] for k in range(count // 4)])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("damage", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images_end_the_run_or_are_left_out(tmp_path, capsys, kind, damage):
    write_source(tmp_path / "data", kind, damage)
    options: dict[str, Any] = {**OPTIONS, "streaming": kind.endswith("stream")}
    with pytest.raises(UserError, match=BAD[damage][1]) as caught:
        read_stream(load(tmp_path / "data", **options).train, GOOD)
    assert "data.on_error=skip" in str(caught.value)
    capsys.readouterr()
    splits = load(tmp_path / "data", on_error="skip", max_bad_fraction=0.5, **options)
    train = splits.train
    pixels = read_stream(train, GOOD) if options["streaming"] else train.pixels(range(len(train)))
    found = identities(pixels)
    assert sorted(found) == list(range(GOOD))
    if train.labels is not None:
        assert train.labels.tolist() == [k % 3 for k in found]
    assert len(train.bad) == 3 and all(BAD[damage][1] in image.reason for image in train.bad)
    warnings = [
        line for line in capsys.readouterr().err.splitlines() if " cannot be decoded" in line or "skipped" in line
    ]
    assert len(warnings) == 1 and train.bad[0].path in warnings[0]
    splits.write_bad_images(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / BAD_IMAGES).read_text().splitlines()]
    assert lines == [{"split": "train", **image._asdict()} for image in train.bad]


def test_a_bad_image_of_a_stream_is_listed_once(tmp_path):
    """It recurs in every epoch, and among the first images, which are read twice."""
    write_source(tmp_path, "tar stream", "text")
    train = load(tmp_path, on_error="skip", max_bad_fraction=0.5, streaming=True, **OPTIONS).train
    train.examples(20, 0)
    read_stream(train, 4 * GOOD)
    assert len(train.bad) == len({image.path for image in train.bad}) == 3


def test_a_stream_of_only_bad_images_ends(tmp_path):
    rows = [(key, b"not an image", label) for key, _, label in rows_of(6)]
    write_shards(tmp_path, "tar", rows, 2)
    write_shards(tmp_path, "tar", rows_of(4), 1, split="test")
    train = load(tmp_path, on_error="skip", max_bad_fraction=1, streaming=True, **OPTIONS).train
    with pytest.raises(UserError, match="^data.source: "):
        train.examples(4, 0)


def test_too_many_bad_images_end_the_run(tmp_path, capsys, monkeypatch):
    write_source(tmp_path, "folder", "empty")  # 3 of 47
    with pytest.raises(UserError, match=r"max_bad_fraction=0.06") as caught:
        load_images(config(tmp_path, on_error="skip", max_bad_fraction=0.06, **OPTIONS))
    assert "3 of 47" in str(caught.value) and str(caught.value).count("x.png: ") == 3
    monkeypatch.setenv("RANK", "1")
    load_images(config(tmp_path, on_error="skip", max_bad_fraction=0.07, **OPTIONS))
    assert capsys.readouterr().err == ""  # only rank 0 warns


def test_a_split_of_only_bad_images_ends_the_run(tmp_path):
    write_table(tmp_path / "a.parquet", [b"not an image %d" % k for k in range(3)], [0, 1, 2])
    for on_error, most in (("skip", 1), ("skip", 0.01), ("fail", 0.01)):
        with pytest.raises(UserError, match="^3 of 3 images") as caught:
            load_images(config(tmp_path / "a.parquet", on_error=on_error, max_bad_fraction=most))
        assert "data." not in str(caught.value)  # no setting helps


def test_too_many_bad_images_end_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.images.streaming.FEW", 30)
    write_source(tmp_path, "tar stream", "text")
    train = load(tmp_path, on_error="skip", max_bad_fraction=0.05, streaming=True, **OPTIONS).train
    with pytest.raises(UserError, match="max_bad_fraction=0.05"):
        read_stream(train, 80)


@pytest.mark.parametrize("streaming", [False, True])
def test_pipes_broken_links_and_huge_files_are_bad_images(tmp_path, monkeypatch, streaming):
    """Reading a pipe never ends, and a file may be larger than memory."""
    monkeypatch.setattr("pipelines.images.formats.MAX_FILE", 2000)
    for key, data, _ in rows_of(8):
        write_image(tmp_path / f"{key}.png", data)
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "huge.png").write_bytes(bytes(2001))
    options = {"on_error": "skip", "max_bad_fraction": 1, "held_out_fraction": 0.4, "streaming": streaming}
    splits = load_images(config(tmp_path, **options))
    reasons = {Path(bad.path).name: bad.reason for part in splits.by_name().values() for bad in part.bad}
    assert sorted(reasons) == ["fifo.png", "gone.png", "huge.png"] and "2000" in reasons["huge.png"]


def test_an_unchecked_folder_names_a_bad_image_on_access(tmp_path):
    write_source(tmp_path, "folder", "text")
    train = load_images(config(tmp_path, streaming=True, **OPTIONS)).train
    with pytest.raises(UserError, match=r"x\.png: not an image"):
        train.pixels(range(len(train)))


class Group:
    """A stand-in for `torch.distributed`, whose processes are threads."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.values = size, threading.Barrier(size, timeout=30), [None] * size
        self.local = threading.local()

    def is_initialized(self) -> bool:
        return hasattr(self.local, "rank")

    def get_rank(self) -> int:
        return self.local.rank

    def get_world_size(self) -> int:
        return self.size

    def all_gather_object(self, found: list[Any], value: Any) -> None:
        self.values[self.local.rank] = value
        self.barrier.wait()
        found[:] = self.values
        self.barrier.wait()

    def run(self, act: Any) -> list[Any]:
        """Return the result of `act` on each process."""

        def work(rank: int) -> Any:
            self.local.rank = rank
            return act()

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(work, range(self.size)))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("cache_mb", [0, 100])
@pytest.mark.parametrize("crop", [None, "random"])
def test_processes_share_the_check_of_images_that_they_do_not_keep(tmp_path, monkeypatch, size, cache_mb, crop):
    """Each image is decoded by one process, or by all if they keep it; all processes list all bad images."""
    write_source(tmp_path, "folder", "text")
    data = config(tmp_path, on_error="skip", max_bad_fraction=1, cache_mb=cache_mb, crop=crop, **OPTIONS)
    alone, checked, group = load_images(data), list[int](), Group(size)
    if crop is None:
        decode_rows = decoding.decode_rows
        monkeypatch.setattr(decoding, "decode_rows", lambda *given: checked.extend(given[2]) or decode_rows(*given))
    else:
        read_whole = crops.read_whole
        monkeypatch.setattr(crops, "read_whole", lambda *given: checked.append(given[1]) or read_whole(*given))
    for module in (decoding, crops):
        monkeypatch.setattr(module, "CHUNK", 3)
        monkeypatch.setattr(module, "dist", group)
    for splits in group.run(lambda: load_images(data, together=True)):
        for name, part in splits.by_name().items():
            other = alone.by_name()[name]
            assert part.bad == other.bad and np.array_equal(part._positions, other._positions)
            if crop is None:  # crops that are not kept would be decoded again, and counted
                assert torch.equal(part.pixels(range(len(part))), other.pixels(range(len(other))))
    once = GOOD + 3 + 4
    parts = 3 if crop else 0  # until an image does not fit, all processes decode: the first chunk of each part
    assert size * once * bool(cache_mb) <= len(checked) <= (size * once if cache_mb else once + (size - 1) * 3 * parts)


def test_names_are_escaped_and_a_list_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    assert list_bad([BadImage("a\nerror: forged\x1b[2J.png", 0, "the file is empty")]) == (
        "\n  a\\nerror: forged\\x1b[2J.png: the file is empty"
    )
    write_source(tmp_path / "data", "folder", "text")
    splits = load_images(config(tmp_path / "data", on_error="skip", max_bad_fraction=1, **OPTIONS))
    (tmp_path / "nowhere").touch()
    splits.write_bad_images(tmp_path / "nowhere")
    assert "bad_images.jsonl cannot be written" in capsys.readouterr().err
