"""Images read from shards when they are due: what is read, what shards hold, and their index.

Covers: pipelines/images/shards/parquet.py, pipelines/images/shards/places.py.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from givens.image_files import KINDS, identities, load, rows_of, write_parquet, write_shards, write_tar

from pipelines.config import UserError
from pipelines.images import DataConfig
from pipelines.images.base import Rows
from pipelines.images.loading import carve
from pipelines.images.shards import parquet as parquet_shards
from pipelines.images.shards import reader as image_shards
from pipelines.images.shards import tar as tar_shards
from pipelines.images.shards.shard import Shard, attempt
from pipelines.images.stamps import size_and_dates

# What is read, and when


def test_resuming_reads_nothing_of_what_came_before(tmp_path, monkeypatch):
    train = load(write_shards(tmp_path, "parquet", rows_of(200), 4), shuffle_window=20, held_out_fraction=0.005).train
    read: list[Any] = []
    monkeypatch.setattr(
        train._rows.read.__self__,
        "load",
        lambda number, load=train._rows.read.__self__.load: (read.append(number), load(number))[1],
    )
    indices, _ = train.samples(8, 0, 15)
    train.pixels(indices)
    assert len(read) == len(set(read)) <= 8 and len(train) == 189
    train.pixels(indices)
    assert len(read) <= 8  # kept


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5])
def test_carving_is_a_partition_by_blocks(fraction):
    for blocks in (np.array([0, 7]), np.arange(0, 1001, 10), np.cumsum([0, 3, 1, 200, 40])):
        size = int(blocks[-1])
        count = max(1, round(size * fraction))
        parts = carve(Rows(size, lambda _: [], None, None, blocks), count, count)
        assert sorted(np.concatenate(list(parts.values()))) == list(range(size))
        assert len(parts["held_out"]) == count == len(carve(Rows(size, lambda _: [], None), count, 0)["held_out"])
        for part in ("held_out", "validation"):
            assert len(parts[part]) == min(count, size - count * (part == "validation"))
            cut = [b for a, b in pairwise(blocks) if 0 < np.isin(np.arange(a, b), parts[part]).sum() < b - a]
            assert len(cut) <= 1


def test_images_for_validation_are_carved_by_blocks(tmp_path):
    path = write_shards(tmp_path, "tar", rows_of(60), 6)
    splits = load(path, validation_fraction=0.25, held_out_fraction=0.2)
    parts = {name: identities(part.pixels(range(len(part)))) for name, part in splits.named().items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 33, "validation": 15, "held_out": 12}
    assert sorted(sum(parts.values(), [])) == list(range(60))
    whole = load(path, validation_fraction=0, held_out_fraction=0.2)
    assert identities(whole.held_out.pixels(range(12))) == parts["held_out"] and whole.validation is None


# What shards hold


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_what_they_were_written_with(tmp_path, kind):
    write_shards(tmp_path, kind, rows_of(23), 3)
    write_shards(tmp_path, kind, rows_of(31)[23:], 1, split="test")
    splits = load(tmp_path, shuffle_window=7)
    assert (len(splits.train), len(splits.held_out)) == (23, 8)
    for images, first in ((splits.train, 0), (splits.held_out, 23)):
        assert identities(images.pixels(range(len(images)))) == list(range(first, first + len(images)))
        assert images.labels.tolist() == [k % 3 for k in range(first, first + len(images))]
    assert splits.train.class_names == ["0", "1", "2"]
    indices, epochs = splits.train.samples(10, 0, 4)
    assert torch.equal(splits.train.batch(indices), load(tmp_path).train.batch(indices)) and epochs.min() == 1


def test_streamed_equals_read_whole(tmp_path):
    """The other way to read parquet, which keeps pixels, is the reference; labels have their names."""
    names = ["cat", "dog", "eel"]
    write_shards(tmp_path, "parquet", rows_of(23), 2, names=names)
    write_shards(tmp_path, "parquet", rows_of(9), 1, split="test", names=names)
    options = {"channels": 3, "image_size": [10, 14], "limit": 20, "augment": {"flip": True, "rotate": 9.0}}
    streamed, whole = load(tmp_path, **options), load(tmp_path, streaming=False, **options)
    for a, b in ((streamed.train, whole.train), (streamed.held_out, whole.held_out)):
        assert len(a) == len(b) and torch.equal(a.labels, b.labels) and a.class_names == b.class_names == names
        choice = [3, 1, 8, 1]
        assert torch.equal(
            a.batch(choice, seed=2, epoch=3, augment=True), b.batch(choice, seed=2, epoch=3, augment=True)
        )


def test_a_folder_of_files_is_streamed_without_being_checked(tmp_path):
    for key, data, label in rows_of(20):
        path = tmp_path / f"class{label}" / f"{key}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    streamed, whole = load(tmp_path), load(tmp_path, streaming=False)
    assert torch.equal(streamed.train.batch(range(18)), whole.train.batch(range(18)))
    assert torch.equal(streamed.train.labels, whole.train.labels)
    assert all(
        (a == b).all() for a, b in zip(streamed.train.samples(7, 1, 2), whole.train.samples(7, 1, 2), strict=True)
    )


@pytest.mark.parametrize(
    ("label", "value", "options", "expected"),
    [
        ("cls", "7", {}, 7),
        ("cls", " owl\n", {}, "owl"),
        ("json", '{"label": 3, "x": 1}', {}, 3),
        ("json", '{"cls": "owl"}', {}, "owl"),
        ("json", '{"x": 5, "label": 3}', {"label_column": "x"}, 5),
        ("species", "owl", {"label_column": "species"}, "owl"),
        ("json", "{broken", {}, None),
        ("json", "[" * 100_000, {}, None),
        ("cls", "x" * (2 << 20), {}, None),
        ("cls", "7", {"label_column": None}, None),
    ],
)
def test_labels_of_a_tar(tmp_path, label, value, options, expected):
    rows = [(key, data, value) for key, data, _ in rows_of(4)]
    train = load(write_tar(tmp_path / "a.tar", rows, label=label), **options).train
    assert train.class_names == ([] if expected is None else [str(expected)])
    assert (train.labels is None) == (expected is None)


def test_the_image_of_a_sample_is_chosen_by_its_suffix(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for key, data, _ in rows_of(10):
            for name in (f"x/{key}.PNG", f"x/{key}.seg.png", f"x/{key}.txt", f"x/.{key}.png"):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert len(load(path).train) == len(load(path, image_column="seg.png").train) == 9
    with pytest.raises(UserError, match=r"a\.tar: no images in it with the suffix \.jpg"):
        load(path, image_column="jpg")
    two = write_tar(tmp_path / "b.tar", [(key, data, "x") for key, data, _ in rows_of(3)], label="webp")
    with pytest.raises(UserError, match=r"00000 has the images png, webp; data\.image_column chooses one"):
        load(two)


def test_sources_that_cannot_be_streamed_are_named(tmp_path):
    write_tar(tmp_path / "mixed/train/a.tar", rows_of(3))
    write_parquet(tmp_path / "mixed/train/b.parquet", rows_of(3))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/a.tar.gz").write_bytes(b"")
    for source, message in (
        ("digits", "digits are in memory"),
        (tmp_path / "nothing-*.tar", "no file is called like"),
        (tmp_path / "absent", "there is no such folder here|HFValidationError|no file or folder"),
        ("ftp://somewhere/a.tar", "URLs begin with one of hf, http"),
        ("simplecache::http://somewhere/a.tar", "URLs begin with one of hf, http"),
        (tmp_path / "packed/a.tar.gz", r"kind \.gz.*reads \.parquet or \.tar"),
    ):
        with pytest.raises(UserError, match=message):
            load(source)
    with pytest.raises(UserError, match="no split 'validation'; it has train"):
        load(write_shards(tmp_path / "a", "tar", rows_of(9), 1), split="validation")
    with pytest.raises(UserError, match=r"no column 'pixels'; there are \['image', 'label'\]"):
        load(write_parquet(tmp_path / "c.parquet", rows_of(3)), image_column="pixels")
    with pytest.raises(UserError, match="'label' does not hold images"):
        load(tmp_path / "c.parquet", image_column="label")
    with pytest.raises(UserError, match="label_column: 'image' holds struct.*strings or whole numbers"):
        load(tmp_path / "c.parquet", label_column="image")


# The index


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_made_once_for_each_file_as_it_is(tmp_path, monkeypatch, kind):
    made: list[str] = []
    for module in (parquet_shards, tar_shards):
        monkeypatch.setattr(
            module,
            "make_index",
            lambda shard, config, make=module.make_index: (made.append(Path(shard.path).name), make(shard, config))[1],
        )
    folder = write_shards(tmp_path / "data", kind, rows_of(20), 2)
    first = load(folder)
    assert len(made) == 2
    again = load(folder)
    assert len(made) == 2 and torch.equal(again.train.pixels(range(18)), first.train.pixels(range(18)))
    assert torch.equal(again.train.labels, first.train.labels) and again.train.class_names == first.train.class_names
    load(folder, label_column=None)
    assert len(made) == 4  # other choices, another index
    changed = sorted(folder.iterdir())[1]
    (write_tar if kind == "tar" else write_parquet)(changed, rows_of(13)[:9])
    assert len(load(folder).train) == 17 and made[4:] == [changed.name]
    for path in image_shards.cache_folder().iterdir():
        path.write_bytes(path.read_bytes()[:-7])  # as a disk leaves it that is full
    assert len(load(folder).train) == 17 and len(made) == 7


def test_no_place_for_the_index_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "home").write_bytes(b"a file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    assert len(load(write_shards(tmp_path / "data", "tar", rows_of(20), 2)).train) == 18


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded_by_the_cache(tmp_path, kind):
    """Blocks of some 100 kB; what they hold together never exceeds a mebibyte by more than the block that is read."""
    rows = [(key, data + bytes(50_000), label) for key, data, label in rows_of(60)]
    train = load(
        write_shards(tmp_path, kind, rows, 12, **({"group": 2} if kind == "parquet" else {})),
        cache_mb=1,
        shuffle_window=4,
    ).train
    reader = train._rows.read.__self__
    for step in range(20):
        train.pixels(train.samples(8, 0, step)[0])
        assert sum(reader.weights[number] for number in reader.cache) <= 2**20
        assert sum(len(image) for block in reader.cache.values() for image in block) <= 2**20
    assert len(reader.cache) > 1


def test_a_window_that_does_not_fit_is_announced(tmp_path, capsys):
    rows = [(key, data + bytes(100_000), label) for key, data, label in rows_of(30)]
    load(write_shards(tmp_path, "tar", rows, 2), cache_mb=1)
    assert re.search(r"shuffle_window: 27 of these images take 2 MiB.*cache_mb=1", capsys.readouterr().err)


# Shards that cannot be read


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shard_ends_the_run_with_its_path(tmp_path, kind):
    write_shards(tmp_path, kind, rows_of(20), 2)
    path = tmp_path / f"train-00001-of-00002.{kind}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{path}: (not a whole (tar|parquet) file|cannot be read)") as caught:
        load(tmp_path, on_error="skip")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="what would end the process is tried in a fork")
def test_no_byte_of_a_parquet_file_ends_the_process(tmp_path):
    """As pyarrow does where a footer's entry of a column is wrong."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array([b"x", b"y"], pa.binary())}), path, store_schema=False)
    good, config = path.read_bytes(), DataConfig(source=str(path))
    child = os.fork()
    if child == 0:
        ends = Counter[str]()
        for place in range(len(good)):
            path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
            shard = Shard(str(path), *size_and_dates(os.stat(path)))
            try:
                index = attempt(shard, partial(parquet_shards.make_index, shard, config))
                attempt(shard, partial(parquet_shards.read_block, shard, index, 0, "image"))
                ends["read"] += 1
            except UserError:
                ends["refused"] += 1
        os._exit(0 if min(ends["read"], ends["refused"]) > 9 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_negative_size_of_a_row_group_is_damage(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", rows_of(4), group=2)
    groups = [SimpleNamespace(num_rows=2, total_byte_size=size) for size in (90, -1)]
    footer = SimpleNamespace(num_row_groups=2, row_group=groups.__getitem__)
    schema = parquet_shards.opened(path, Shard(str(path), 0)).schema_arrow
    file = SimpleNamespace(schema_arrow=schema, metadata=footer)
    monkeypatch.setattr(parquet_shards, "opened", lambda *_: file)
    with pytest.raises(UserError, match=r"a\.parquet: damaged: a row group of a negative size$"):
        load(path)


def test_a_row_group_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_shards, "MAX_GROUP", 1000)
    path = write_parquet(tmp_path / "a.parquet", rows_of(20), group=20)
    with pytest.raises(UserError, match=r"a\.parquet: a row group with \d+ bytes; the limit is 1000"):
        load(path)


def test_names_of_a_damaged_index_are_told(tmp_path, monkeypatch):
    """It is a file of this machine, of which nothing depends but what a bad image is called."""
    path = write_shards(tmp_path, "tar", rows_of(4), 1)
    load(path)
    kept = image_shards.load_index

    def damaged(found):
        index = kept(found)
        return index and replace(index, names=np.where(index.names == ord("0"), 0xB0, index.names).astype(np.uint8))

    monkeypatch.setattr(image_shards, "load_index", damaged)
    train = load(path).train
    names = [name for name, _ in train._rows.read([0, 1])]
    assert all("\ufffd" in name for name in names)
