"""Damaged and hostile images among good ones, in folders, sheets, parquet and tar files, copied and streamed.

Covers: pipelines/images/checking.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from givens.images import BAD, Row, config, identities, load, rows_of, write_image, write_shards, write_table
from ranks import of_ranks

from pipelines.config import UserError
from pipelines.images import checking, load_images
from pipelines.images.checking import BAD_IMAGES, PixelCache
from pipelines.images.sources import Source

GOOD = 40
KINDS = ["sheet", "parquet", "tar", "parquet stream", "tar stream"]
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
@pytest.mark.parametrize(
    ("kind", "damage"), [*(("folder", damage) for damage in BAD), *((kind, "truncated") for kind in KINDS)]
)
def test_damaged_images_end_the_run_or_are_left_out(tmp_path, capsys, kind, damage):
    write_source(tmp_path / "data", kind, damage)
    options: dict[str, Any] = {**OPTIONS, "streaming": kind.endswith("stream")}
    with pytest.raises(UserError, match=BAD[damage][1]) as caught:
        read_stream(load(tmp_path / "data", **options).train, GOOD)
    assert "data.on_error=skip" in str(caught.value)
    if not options["streaming"]:
        with pytest.raises(UserError, match="max_bad_fraction=0.06"):  # 3 of 47
            load(tmp_path / "data", on_error="skip", max_bad_fraction=0.06, **options)
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


def test_a_split_of_only_bad_images_ends_the_run(tmp_path):
    write_table(tmp_path / "a.parquet", [b"not an image %d" % k for k in range(3)], [0, 1, 2])
    with pytest.raises(UserError, match="^3 of 3 images"):
        load_images(config(tmp_path / "a.parquet", on_error="skip", max_bad_fraction=1))


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


@pytest.mark.parametrize("room", [0, 5000, 10**6])
def test_images_at_their_own_size_are_held_by_all_processes_or_checked_by_one(monkeypatch, room):
    """The first images that fit in the room are in memory, whoever decodes the others, and whatever is bad."""
    checked = list[int]()
    monkeypatch.setattr(checking, "CHUNK", 4)
    monkeypatch.setattr(checking, "AHEAD", 2)
    sides = [4 if k % 2 else 16 for k in range(60)]  # a small one would fit after a large one that does not
    source = Source(60, lambda rows: list(rows), "image {}".format)

    def decode(k: int) -> Any:
        checked.append(k)
        return "bad" if k % 9 == 5 else np.full((1, sides[k], sides[k]), k, np.uint8)

    def check(rank: int) -> tuple[list[int], list[int], list[int | None]]:
        memory = PixelCache(60, room)
        good, bad = checking.decode_all(source, np.arange(60), decode, memory, distributed=True)
        return (
            good.tolist(),
            [each.row for each in bad],
            [None if i is None else int(i[0, 0, 0]) for i in memory.images],
        )

    (good, bad, held), *others = of_ranks(3, check)
    assert all(other == (good, bad, held) for other in others)
    assert bad == [k for k in range(60) if k % 9 == 5] and sorted({*good, *bad}) == list(range(60))
    sizes = np.cumsum([sides[k] ** 2 for k in good])
    count = int((sizes <= room).sum())
    assert held == [*good[:count], *[None] * (len(good) - count)]
    beyond = 60 - good[count - 1] if 0 < count < len(good) else 60 if not count else 0
    assert len(checked) <= 3 * 60 - 2 * beyond + 2 * 4 * 4  # a few tasks are begun before the memory is full
