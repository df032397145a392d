"""Images read from shards when they are due: where they come from, their index, and what bad and changed ones do.

Covers: pipelines/images/hub.py, pipelines/images/shards/parquet.py, pipelines/images/shards/places.py,
pipelines/images/shards/shard.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
from fake_hub import Handler, commit, serve
from image_files import (
    CHANGED,
    CHANGES,
    KINDS,
    change,
    identities,
    load,
    noise,
    read_epochs,
    rows_of,
    small_blocks,
    two_files,
    write_parquet,
    write_shards,
    write_tar,
)
from launch import (
    assert_equal_tensors,
    exact,
    losses,
    output_of,
    start,
    tensors,
    tokenizer_arguments,
    train_tokenizer,
    two_processes,
)
from one_process import begin_anew
from small import make_tokenizer

from pipelines.config import UserError
from pipelines.images import to_float
from pipelines.images.bad import REPORT, read_report
from pipelines.images.base import Rows
from pipelines.images.loading import carve
from pipelines.images.shards import parquet as parquet_shards
from pipelines.images.shards import places as shard_sources
from pipelines.images.shards import reader as image_shards
from pipelines.images.shards import shard as one_shard
from pipelines.images.shards import tar as tar_shards
from pipelines.images.stamps import FileChanged
from pipelines.train_tokenizer import TokenizerTask

TEXT = b"this is not an image"


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


# Files that change


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_changes_ends_the_run(tmp_path, monkeypatch, kind, how):
    """Two epochs of blocks that are not kept, and then none of the other file's images. A changed file is no bad image;
    and a further run has its images."""
    small_blocks(monkeypatch)
    path, other = two_files(tmp_path, kind)
    assert kind == "parquet" or path.stat().st_size == other.stat().st_size
    train = load(path, cache_mb=0, on_error="skip", max_bad_fraction=1.0).train
    assert len(train._rows.blocks) > 5
    read_epochs(train, seed=0)
    change(path, other, how)
    for index in (0, 20, 35):
        with pytest.raises(FileChanged, match=f"^{path}: {CHANGED}$"):
            train.pixels([index])
    assert not train.report.problems
    later = load(path, cache_mb=0).train
    expected = later._positions if how == "touched" else 39 - later._positions
    assert identities(later.pixels(range(36))) == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_changes_while_it_is_indexed_ends_the_run(tmp_path, monkeypatch, kind):
    path, other = two_files(tmp_path, kind)
    at_first = shard_sources.shard_at

    def found(file: str) -> Any:
        shard = at_first(file)
        change(path, other, "replaced")
        return shard

    monkeypatch.setattr(shard_sources, "shard_at", found)
    with pytest.raises(FileChanged, match=f"^{path}: {CHANGED}$"):
        load(path)
    assert not image_shards.cache_folder().exists()  # no index of one file is kept under the other's stamp


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_is_rewritten_during_a_read_ends_the_run(tmp_path, monkeypatch, kind):
    """The file is opened, found to be the right one, and then written over."""
    small_blocks(monkeypatch)
    path, other = two_files(tmp_path, kind)
    train = load(path, cache_mb=0).train

    class Rewritten(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            change(path, other, "rewritten")
            return super().read(size)

    monkeypatch.setattr(one_shard.Shard, "open", lambda shard, ahead=0: Rewritten(shard.path))
    with pytest.raises(FileChanged, match=f"^{path}: {CHANGED}$"):
        train.pixels([0, 1])


def test_threads_tell_a_changed_shard_among_others(tmp_path, monkeypatch):
    """Many blocks are read at once, of which those of one shard are other ones by now."""
    small_blocks(monkeypatch)
    monkeypatch.setattr(image_shards, "WORKERS", 8)
    write_shards(tmp_path, "tar", rows_of(40), 4)
    train = load(tmp_path, cache_mb=0, on_error="skip").train
    train.pixels(range(36))
    train._rows.read.__self__.cache.clear()
    path = tmp_path / "train-00002-of-00004.tar"
    write_tar(path, rows_of(20)[:10])
    assert identities(train.pixels(range(15))) == train._positions[:15].tolist()
    with pytest.raises(FileChanged, match=f"^{path}: {CHANGED}$"):
        train.pixels(range(36))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_changes_in_an_object_store_ends_the_run(tmp_path, monkeypatch, kind):
    """One that keeps listings and answers from them, as those of `fsspec` do; its ETag is asked after each block."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        cachable, store, pseudo_dirs, listed = False, dict[str, Any](), [""], dict[str, Any]()

        def info(self, path: str, refresh: bool = False, **options: Any) -> dict[str, Any]:
            if refresh or path not in self.listed:
                found = super().info(path)
                self.listed[path] = {**found, "ETag": hashlib.md5(self.cat_file(path)).hexdigest()}
            return self.listed[path]

    small_blocks(monkeypatch)
    store = Store()
    path, other = two_files(tmp_path, kind)
    store.pipe_file(str(path), path.read_bytes())
    monkeypatch.setattr(shard_sources, "file_system", lambda url: (store, str(path)))
    monkeypatch.setattr(shard_sources, "remote_files", lambda url: [url])
    train = load(f"s3://bucket/a.{kind}", cache_mb=0).train
    read_epochs(train, seed=0)
    store.pipe_file(str(path), other.read_bytes())
    with pytest.raises(FileChanged, match=rf"^s3://bucket/a\.{kind}: {CHANGED}$"):
        train.pixels([0])


# Bad images


def damaged(rows, *which):
    return [(key, TEXT if k in which else data, label) for k, (key, data, label) in enumerate(rows)]


def bad_shards(folder: Path, kind: str) -> Path:
    """60 images in 3 classes, of which 3, 6, 9 and 10 are bad."""
    write_shards(folder, kind, rows_of(20), 1, split="test")
    return write_shards(folder, kind, damaged(rows_of(60), 3, 6, 9, 10), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_replaced_by_the_next_good_one_of_its_class(tmp_path, kind, capsys):
    train = load(bad_shards(tmp_path, kind), on_error="skip").train
    expected = list(range(60))
    for bad, good in ((3, 12), (6, 12), (9, 12), (10, 13)):
        expected[bad] = good
    for order in (range(60), [10, 9, 3, 6], [9, 9, 10]):  # what was met before makes no difference
        fresh = load(tmp_path, on_error="skip").train
        assert identities(fresh.pixels(order)) == [expected[k] for k in order]
        assert identities(fresh.pixels(order)) == [expected[k] for k in order]
    assert all(k % 3 == train.labels[j] for j, k in enumerate(expected))
    capsys.readouterr()
    train.pixels(range(60))
    shard = tmp_path / f"train-00000-of-00003.{kind}"
    called = {k: f"{shard}: " + (f"{k:05d}.png" if kind == "tar" else f"row {k}") for k in (3, 6, 9, 10, 12, 13)}
    found = [(p.path, p.row, p.replaced_by) for p in sorted(train.report.problems, key=lambda p: p.row)]
    assert found == [(called[b], b, called[g]) for b, g in ((3, 12), (6, 12), (9, 12), (10, 13))]
    assert all("not an image" in problem.reason for problem in train.report.problems)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and called[3] in warning


def test_the_last_of_a_class_goes_round_and_a_class_of_bad_ones_ends(tmp_path):
    write_tar(tmp_path / "train.tar", damaged(rows_of(60), 57, 59, *range(1, 60, 3)))
    write_tar(tmp_path / "test.tar", rows_of(3))
    train = load(tmp_path, on_error="skip", max_bad_fraction=0.5).train
    assert identities(train.pixels([57, 59])) == [0, 2]
    with pytest.raises(UserError, match=r"00001\.png: not an image.*no other image of its class"):
        train.pixels([1])


def test_a_bad_image_ends_the_run_by_default(tmp_path):
    train = load(bad_shards(tmp_path, "tar")).train
    assert identities(train.pixels([0, 1, 2])) == [0, 1, 2]
    with pytest.raises(UserError, match=r"train-00000-of-00003\.tar: 00003\.png: not an image.*data\.on_error=skip"):
        train.pixels([4, 3])


def test_too_many_bad_images_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.images.streamed.FEW", 30)
    options = {"on_error": "skip", "max_bad_fraction": 0.1}
    train = load(bad_shards(tmp_path, "parquet"), **options).train
    train.pixels([3, 6, 9])  # three of thirty
    with pytest.raises(UserError, match=r"4 of \d+ images so far.*max_bad_fraction=0.1(.|\n)*row 3: not an image"):
        train.pixels([10])
    train = load(tmp_path, **options).train
    train.pixels(range(11, 60))
    train.pixels([3, 6, 9, 10])  # four of more than forty
    assert train.report.found >= 53 and train.report.bad == 4


def test_the_report_has_each_bad_image_once(tmp_path):
    data = bad_shards(tmp_path / "data", "tar")
    for _ in range(2):  # as two processes, or two lives of a run
        splits = load(data, on_error="skip")
        splits.train.pixels(range(20))
        splits.write_report(tmp_path)
        splits.train.pixels(range(60))
        splits.write_report(tmp_path)
    lines = read_report(tmp_path)
    assert sorted(line["row"] for line in lines) == [3, 6, 9, 10]
    assert all(set(line) == {"split", "path", "row", "reason", "replaced_by"} for line in lines)
    assert json.loads((tmp_path / REPORT).read_text().splitlines()[0])["split"] == "train"


def test_bad_found_beforehand_are_reported_too(tmp_path):
    """Of a run that reads all images first: the same file, from the first process alone."""
    data = bad_shards(tmp_path / "data", "parquet")
    options = {
        "data__source": str(data),
        "data__image_size": 12,
        "data__limit": 60,
        "train__steps": 2,
        "data__on_error": "skip",
        "data__max_bad_fraction": 0.1,
    }
    run = train_tokenizer(tmp_path / "run", **options)
    lines = read_report(run)
    assert [(line["row"], line["replaced_by"]) for line in lines] == [(3, None), (6, None), (9, None), (10, None)]
    assert lines[0]["path"].startswith("row 3 of train") and lines[0]["reason"].startswith("not an image")


def test_a_token_dataset_is_encoded_from_shards(tmp_path):
    """Each row has the tokens of its image, or of the one that stands in for it, and the label of both."""
    from pipelines.encode import EncodeConfig
    from pipelines.encode import run as encode
    from pipelines.tokens import load_tokens

    tokenizer = make_tokenizer("vqvae", (12, 12), 1).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = {
        "source": str(bad_shards(tmp_path / "data", "tar")),
        "streaming": True,
        "image_size": 12,
        "on_error": "skip",
    }
    folder = encode(
        EncodeConfig(tokenizer=str(tmp_path / "tokenizer"), out=str(tmp_path / "t"), data=data, batch_size=7)
    )
    split, expected = load_tokens(folder).splits["train"], list(range(60))
    for bad, good in ((3, 12), (6, 12), (9, 12), (10, 13)):
        expected[bad] = good
    images = to_float(torch.from_numpy(np.stack([noise(1, 12, 12, seed=k) for k in expected])))
    found = torch.as_tensor(np.asarray(split.tokens[:])).long()
    assert torch.equal(found, tokenizer.encode(images)) and len(found.unique()) > 1
    assert torch.as_tensor(np.asarray(split.labels[:])).tolist() == [k % 3 for k in range(60)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shard_ends_the_run_with_its_path(tmp_path, kind):
    write_shards(tmp_path, kind, rows_of(20), 2)
    path = tmp_path / f"train-00001-of-00002.{kind}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{path}: (not a whole (tar|parquet) file|cannot be read)") as caught:
        load(tmp_path, on_error="skip")
    assert "\n" not in str(caught.value)


def test_a_row_group_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_shards, "MAX_GROUP", 1000)
    path = write_parquet(tmp_path / "a.parquet", rows_of(20), group=20)
    with pytest.raises(UserError, match=r"a\.parquet: a row group with \d+ bytes of images; the limit is 1000"):
        load(path)


# Training


def streamed_options(data: Path, **more: Any) -> dict[str, Any]:
    return {
        "data__source": str(data),
        "data__streaming": True,
        "data__image_size": 12,
        "data__limit": 60,
        "data__shuffle_window": 15,
        "data__augment__rotate": 8,
        **more,
    }


def test_training_does_not_depend_on_the_threads_nor_on_being_resumed(tmp_path, monkeypatch):
    data = bad_shards(tmp_path / "data", "tar")
    options = streamed_options(data, data__on_error="skip", train__steps=9, train__save_every=4)
    whole = train_tokenizer(tmp_path / "whole", **options)
    assert len(set(losses(whole))) == 9 and len(read_report(whole)) == 4
    for workers in (1, 2, 4):
        for module in ("images.dataset", "images.shards.reader"):
            monkeypatch.setattr(f"pipelines.{module}.WORKERS", workers)
        run = tmp_path / f"workers{workers}"
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(TokenizerTask, "loss", interrupted(TokenizerTask.loss, step=6 if workers > 1 else 99))
            begin_anew()
            train_tokenizer(run, **options)
        begin_anew()
        train_tokenizer(run, **options)  # goes on from step 4
        assert exact(run) == exact(whole)
        assert_equal_tensors(tensors(run / "tokenizer"), tensors(whole / "tokenizer"))


def interrupted(loss: Any, step: int) -> Any:
    """The loss, but for Ctrl-C at a step."""

    def interrupt(task: TokenizerTask, player: str, batch: Any, now: int) -> Any:
        if now == step:
            raise KeyboardInterrupt
        return loss(task, player, batch, now)

    return interrupt


def test_two_processes_meet_bad_images_and_end(tmp_path):
    """Both really run; the one that meets a bad image does not leave the other waiting."""
    data = bad_shards(tmp_path / "data", "tar")
    options = streamed_options(data, train__steps=6, train__evaluate_every=3)
    argv = tokenizer_arguments(tmp_path / "run", **options, data__on_error="skip")
    printed = output_of(start(two_processes("train_tokenizer", argv), HF_HOME=str(tmp_path / "home")))
    assert "2 process(es)" in printed
    assert sorted(line["row"] for line in read_report(tmp_path / "run")) == [3, 6, 9, 10]
    alone = train_tokenizer(tmp_path / "alone", **options, data__on_error="skip")
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.slow
def test_two_processes_end_when_one_meets_a_bad_image(tmp_path):
    data = bad_shards(tmp_path / "data", "tar")
    argv = tokenizer_arguments(tmp_path / "run", **streamed_options(data, train__steps=50), train__timeout=20)
    printed = output_of(start(two_processes("train_tokenizer", argv), HF_HOME=str(tmp_path / "home")), 120, code=None)
    assert re.search(r"error.*train-00000-of-00003\.tar: 000\d\d\.png: not an image", printed), printed


# The Hub


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("offline", [True, False])
def test_an_unknown_id_fails_at_once_where_there_is_no_hub(monkeypatch, offline, streaming):
    """For `datasets` it takes 23 seconds of retries. Nobody listens on port 9 of this machine."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("tokenizer.files.hub.getproxies", lambda: {})
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        load("nobody/nothing", streaming=streaming)
    assert time.monotonic() - began < 3
    why = "HF_HUB_OFFLINE forbids asking the Hub" if offline else "http://127.0.0.1:9 cannot be reached"
    assert str(caught.value).startswith("data.source=nobody/nothing: ") and str(caught.value).endswith(why)


class DatasetHandler(Handler):
    """Data sets instead of models, and parts of files."""

    def do_GET(self) -> None:
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        if re.search(r"/tree/[^/?]+/", self.path):
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})  # there are no folders
        super().do_GET()

    do_HEAD = do_GET  # type: ignore[assignment]

    def do_POST(self) -> None:
        """What is known of some paths."""
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        folder = self.server.root / "me" / "shards" / "main"
        found = [
            {"type": "file", "path": p, "oid": "0", "size": (folder / p).stat().st_size}
            for p in asked
            if (folder / p).is_file()
        ]
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    def send_file(self, folder: Path, name: str) -> None:
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not (folder / name).is_file():
            return super().send_file(folder, name)
        part = (folder / name).read_bytes()[int(asked[1]) : int(asked[2]) + 1]
        self.server.requests.append((f"{name} {len(part)}", None))
        self.answer(206, {"X-Repo-Commit": commit(folder), "ETag": '"1"'}, part)


HUB_CLIENT = """
import sys
from pipelines.images import DataConfig, load_images
for source in ("me/shards", "hf://datasets/me/shards/train*"):
    images = load_images(DataConfig(source=source, image_size=12, streaming=True))
    print(len(images.train), len(images.held_out), images.train.labels.tolist()[:3],
          images.train.pixels(range(18)).long().sum().item())
    print(images.train._rows.read([0])[0][0], file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["parquet", pytest.param("tar", marks=pytest.mark.slow)])
def test_a_data_set_on_the_hub_is_read_in_parts(tmp_path, kind):
    """huggingface_hub reads its endpoint when it is imported, so this has a process of its own."""
    folder = write_shards(tmp_path / "hub" / "me" / "shards" / "main", kind, rows_of(20), 2)
    expected = load(folder / "train*").train
    write_shards(folder, kind, rows_of(4), 1, split="test")
    with serve(tmp_path / "hub") as hub:
        hub.RequestHandlerClass = DatasetHandler
        done = output_of(
            start(
                [sys.executable, "-c", HUB_CLIENT],
                HF_ENDPOINT=hub.url,
                HF_HUB_OFFLINE="0",
                HF_HUB_DISABLE_XET="1",
                HF_HOME=str(tmp_path / "home"),
                NO_PROXY="127.0.0.1",
                HF_HUB_DISABLE_TELEMETRY="1",
            )
        )
        ranges = [path for path, _ in hub.requests if path.startswith("train")]
    every, carved = (line for line in done.splitlines() if re.match(r"\d+ \d+ \[", line))
    assert every.startswith("20 4 [0, 1, 2]"), done
    assert carved == f"18 2 [0, 1, 2] {expected.pixels(range(18)).long().sum()}"
    # By its id or by a URL, it is read at one commit, and not what is pushed later.
    places = re.findall(r"hf://datasets/me/shards@(\w+)/train-00000-of-00002", done)
    assert places == [commit(folder)] * 2
    assert ranges and not list((tmp_path / "home").rglob(f"*.{kind}"))  # read, and not downloaded
