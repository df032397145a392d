"""Splits: which images are trained on, used for validation, and held out.

Covers: pipelines/images/unseen.py.
"""

import os
import re
from itertools import product

import numpy as np
import pytest
from givens.images import (
    PNGS,
    bytes_of_each,
    config,
    noise,
    rows_of,
    write_folder,
    write_image,
    write_shards,
    write_splits,
    write_table,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import needs_digits

from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from pipelines.images.dataset import carve, validation_count
from pipelines.images.unseen import require_unseen


def images_by_split(settings):
    """The images of each split, as bytes."""
    return {name: bytes_of_each(part) for name, part in load_images(settings).by_name().items()}


# Parts of one split


@settings(deadline=None)
@given(st.data())
def test_parts_are_a_stable_partition(data):
    """No part depends on the size of another, and each added image moves at most one other image."""
    size = data.draw(st.integers(1, 300))
    held_out, validation = (data.draw(st.integers(0, size)) for _ in range(2))
    parts = carve(size, held_out, validation)
    assert list(parts) == ["train", "validation", "held_out"]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(size))
    assert all(np.array_equal(part, np.sort(part)) for part in parts.values())
    assert np.array_equal(parts["held_out"], carve(size, held_out, 0)["held_out"])
    if held_out + validation <= size:
        assert np.array_equal(parts["validation"], carve(size, 0, validation)["validation"])
        assert set(parts["validation"]) <= set(carve(size, 0, min(size, validation + 1))["validation"])
    added = data.draw(st.integers(0, 20))
    for name, part in carve(size + added, held_out, validation).items():
        if name != "train" and held_out + validation <= size:
            assert len(set(parts[name]) - set(part)) <= added


@pytest.mark.parametrize(
    ("size", "fraction", "expected"),
    [
        (4000, None, 200),
        (1_281_167, None, 2000),
        (200, None, 10),
        (180, None, 0),
        (60_000, 0.1, 6000),
        (7, 0.01, 1),
        (7, 0.0, 0),
    ],
)
def test_number_of_validation_images(size, fraction, expected):
    assert validation_count(size, fraction) == expected


@needs_digits
def test_digits_are_stratified_and_their_validation_images_come_from_the_training_split():
    every = images_by_split(DataConfig(validation_fraction=0))
    splits = load_images(DataConfig())
    parts = {name: bytes_of_each(part) for name, part in splits.by_name().items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 3800, "validation": 200, "held_out": 1000}
    assert sorted(parts["train"] + parts["validation"]) == sorted(every["train"])
    assert len(set().union(*parts.values())) == 5000 and parts["held_out"] == every["held_out"]
    assert splits.held_out.labels.bincount().tolist() == [100] * 10 and splits.validation.labels.bincount().min() > 5
    limited = images_by_split(DataConfig(limit=30, augment={"shift": 2}))  # the first of the same images
    assert limited["validation"] == parts["validation"][:30] and limited["train"] == parts["train"][:30]


def test_validation_images_do_not_depend_on_the_held_out_ones(tmp_path):
    write_splits(tmp_path, "train", "test")
    found = [
        images_by_split(config(tmp_path, validation_fraction=0.2, **options))["validation"]
        for options in ({}, {"held_out": "test"}, {"limit": 5})
    ]
    (tmp_path / "test").rename(tmp_path / "other")
    found.append(images_by_split(config(tmp_path, validation_fraction=0.2))["validation"])
    assert len(found[0]) == 2 and found[1:] == [found[0]] * 3
    assert load_images(config(tmp_path)).validation is None  # ten images are too few


def test_too_few_images_to_divide_are_refused(tmp_path):
    write_image(tmp_path / "a.png", noise(12, 12))
    with pytest.raises(UserError, match="'train'"):
        load_images(config(tmp_path))
    write_image(tmp_path / "b.png", noise(12, 12))
    with pytest.raises(UserError, match="'train'"):
        load_images(config(tmp_path, validation_fraction=0.95))


# Several splits


@pytest.mark.parametrize(
    ("folders", "options", "sizes", "noted"),
    [
        (("train", "test"), {}, (10, 3), []),
        (("train", "test", "val"), {}, (10, 3), ["'test' is held out", "val"]),
        (("train", "test", "val"), {"held_out": "val"}, (10, 4), []),
        *((("train", name), {}, (10, 3), [f"'{name}' is held out"]) for name in ("val", "valid", "validation", "dev")),
        (("train", "val", "dev"), {}, (9, 1), ["10% of 'train' is held out", "val, dev"]),
        (("train", "val", "testing"), {}, (10, 3), ["'val' is held out", "testing"]),
        (("train", "val"), {"held_out": "test"}, (9, 1), ["10% of 'train' is held out", "val"]),
        (("val", "train"), {"split": "val"}, (9, 1), ["10% of 'val' is held out", "train"]),
        (("test", "train"), {"split": "test"}, (9, 1), ["10% of 'test' is held out", "train"]),
        (("train", "holdout"), {}, (9, 1), ["10% of 'train' is held out", "holdout"]),
        (("train", "holdout"), {"held_out": "holdout"}, (10, 3), []),
        (("my-split", "val"), {"split": "my-split"}, (10, 3), ["'val' is held out"]),
    ],
)
def test_unusual_choices_and_unused_splits_are_noted(tmp_path, capsys, monkeypatch, folders, options, sizes, noted):
    splits = load_images(config(write_splits(tmp_path, *folders), **options))
    assert (len(splits.train), len(splits.held_out)) == sizes
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(noted) and all(each in lines[0] for each in noted)
    assert ("not used: " in "".join(lines)) == (len(noted) == 2)
    monkeypatch.setenv("RANK", "1")
    load_images(config(tmp_path, **options))
    assert capsys.readouterr().err == ""  # only the first process prints


@pytest.mark.parametrize("classes", [("cat", "dog"), ("val", "dev"), ("valid", "training"), ("validation", "apple")])
def test_classes_may_be_named_like_splits(tmp_path, capsys, classes):
    write_folder(tmp_path, classes=classes)
    splits = load_images(config(tmp_path))
    assert splits.train.class_names == sorted(classes) and (len(splits.train), len(splits.held_out)) == (36, 4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("folders", "options", "named"),
    [
        (("train", "val"), {"held_out": "vla"}, ["data.held_out", "'vla'", "'val'?"]),
        (("train", "val"), {"held_out": "validation"}, ["data.held_out", "'val'?"]),
        (("train", "validation"), {"held_out": "vla"}, ["data.held_out", "'validation'?"]),
        (("train", "test", "val"), {"held_out": "tset"}, ["data.held_out", "'test'?"]),
        (("cat", "dog"), {"held_out": "vla"}, ["data.held_out", "'vla'", "data.held_out=test"]),
        (("cat", "dog"), {"split": "tarin"}, ["data.split", "'tarin'", "train"]),
    ],
)
def test_a_missing_split_is_refused_with_the_nearest_name(tmp_path, streaming, folders, options, named):
    with pytest.raises(UserError) as caught:
        load_images(config(write_splits(tmp_path, *folders), streaming=streaming, **options))
    assert all(each in str(caught.value) for each in named) and "\n" not in str(caught.value)


def test_folders_without_images_and_hidden_folders_are_not_splits(tmp_path, capsys):
    write_splits(tmp_path, "train", "test")
    write_image(tmp_path / "notes/a.txt", b"hello")
    write_image(tmp_path / ".cache/a.png", PNGS[0])
    load_images(config(tmp_path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_have_validation_splits(tmp_path, capsys, streaming):
    """`datasets` calls them `validation`, whatever their files are called."""
    write_table(tmp_path / "train-00000-of-00001.parquet", PNGS, [0, 1] * 5)
    write_table(tmp_path / "val-00000-of-00001.parquet", PNGS[:4], [1, 1, 0, 0])
    splits = load_images(config(tmp_path, streaming=streaming))
    assert (len(splits.train), len(splits.held_out)) == (10, 4)
    assert "'validation' is held out\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="'validation'"):
        load_images(config(tmp_path, streaming=streaming, held_out="val"))


# No image is trained on and evaluated on


@pytest.mark.parametrize(
    ("split", "held_out"), [(".", None), (".", "test"), ("", None), ("all", None), ("link", "test")]
)
def test_a_split_inside_another_is_not_held_out_of_it(tmp_path, split, held_out):
    write_splits(tmp_path / "all", "test", "train")
    write_splits(tmp_path, "test", "train")
    (tmp_path / "link").symlink_to(tmp_path / "test")
    options = {"split": split, "held_out": held_out or ("all/test" if split == "all" else None)}
    try:
        splits = load_images(config(tmp_path / "all" if split in (".", "") else tmp_path, **options))
    except UserError as error:
        assert str(error).startswith("data.")
    else:
        names = {name: part.names(range(len(part))) for name, part in splits.by_name().items()}
        where = [os.path.realpath(tmp_path / path) for part in names.values() for path in part]
        assert len(where) == len(set(where)) and all(names.values())


DIVISIONS = [
    {},
    {"validation_fraction": 0.0},
    {"validation_fraction": 0.5},
    {"held_out": "test"},
    {"held_out": "test", "held_out_fraction": 0.4, "validation_fraction": 0.3},
    {"held_out": "val"},
    {"held_out": "train", "split": "val"},
    {"split": "more", "held_out": "val", "validation_fraction": 0.5},
    {"limit": 5},
]


@pytest.mark.parametrize("part", ["validation", "held_out"])
def test_evaluation_on_training_images_is_refused(tmp_path, capsys, part):
    """For every pair of settings: exactly if the part shares an image with the training split."""
    for seed, (name, count) in enumerate((("train", 30), ("val", 12), ("more", 10))):
        for k in range(count):
            write_image(tmp_path / f"{name}/{k:02}.png", noise(12, 12, seed=100 * seed + k))
    settings = [config(tmp_path, **options) for options in DIVISIONS]
    loaded = [images_by_split(each) for each in settings]
    again = [config(f"{tmp_path}/../{tmp_path.name}", **options) for options in DIVISIONS]
    capsys.readouterr()
    refused = 0
    for (then, before), (now, after) in product(zip(settings, loaded, strict=True), zip(again, loaded, strict=True)):
        images = after.get(part, [])
        if seen := len(set(before["train"]).intersection(images)):
            with pytest.raises(UserError, match=rf"^data\..*: {seen} of these {len(images)} "):
                require_unseen(now, then, part)
            refused += 1
        else:
            require_unseen(now, then, part)
    assert 10 < refused < 60 and capsys.readouterr().err == ""
    now = config(tmp_path, split="val", held_out="train", validation_fraction=0.5)
    for unknown in (None, config(tmp_path / "elsewhere")):
        require_unseen(now, unknown, part)


def test_a_stream_and_its_copy_are_divided_differently(tmp_path):
    """A stream by files, a copy by images."""
    write_shards(tmp_path, "parquet", rows_of(40), 4)
    stream, copied = (config(tmp_path, streaming=streaming) for streaming in (True, False))
    for now, then in ((stream, copied), (copied, stream)):
        for part in ("validation", "held_out"):
            with pytest.raises(UserError, match="^data.streaming: "):
                require_unseen(now, then, part)
        require_unseen(now, now, "held_out")
    write_shards(tmp_path, "parquet", rows_of(4), 1, split="test")
    for now, then in ((stream, copied), (copied, stream)):
        require_unseen(now, then, "held_out")


# Objects


def write_objects(folder, objects=range(20), views=6):
    """Write photographs of objects; the names put the views of an object far apart."""
    for view, number in product(range(views), objects):
        write_image(folder / f"view{view}_tile{number:03}.png", noise(12, 12, seed=100 * view + number))


def objects_by_split(splits):
    return {
        name: [re.search(r"tile(\d+)", path)[1] for path in part.names(range(len(part)))]
        for name, part in splits.by_name().items()
    }


@pytest.mark.parametrize("pattern", [r"tile(\d+)", r"tile\d+", r"(?<=tile)(\d+)"])
def test_objects_are_held_out_whole(tmp_path, pattern):
    write_objects(tmp_path / "all")
    options = {"held_out_fraction": 0.2, "validation_fraction": 0.1}
    found = objects_by_split(load_images(config(tmp_path / "all", group=pattern, **options)))
    assert {name: len(set(part)) for name, part in found.items()} == {"train": 14, "validation": 2, "held_out": 4}
    assert all(part.count(number) == 6 for part in found.values() for number in part)
    assert len(set().union(*found.values())) == 20
    divided = objects_by_split(load_images(config(tmp_path / "all", **options)))
    assert set(divided["train"]) & set(divided["held_out"])
    with pytest.raises(UserError, match="^data.group: "):
        require_unseen(
            config(tmp_path / "all", **options), config(tmp_path / "all", group=pattern, **options), "held_out"
        )


def test_an_object_may_be_a_folder_within_the_source(tmp_path):
    """The path begins at the source, whatever is above it."""
    for number in range(10):
        write_objects(tmp_path / "tile999" / f"tile{number:03}", range(3), 2)
    splits = load_images(config(tmp_path / "tile999", group=r"^tile(\d+)/", held_out_fraction=0.3))
    names = {
        part: {path.split("/")[0] for path in images.names(range(len(images)))}
        for part, images in splits.by_name().items()
    }
    assert len(names["held_out"]) == 3 and len(names["train"]) == 7 and not names["train"] & names["held_out"]


def test_settings_without_groups_are_written_as_before():
    assert not {"group", "clips"} & set(DataConfig().model_dump())
    assert DataConfig(group="a").model_dump()["group"] == "a" and "clips" not in DataConfig(group="a").model_dump()
    assert "held_out" in DataConfig().model_dump()  # other settings are written even when they are null


def test_bad_groups_are_one_line(tmp_path):
    write_objects(tmp_path / "all")
    with pytest.raises(ValueError, match="invalid regular expression"):
        config(tmp_path, group="tile(")
    with pytest.raises(ValueError, match="clips and group"):
        config(tmp_path, group="tile", clips=True)
    for pattern in (r"part(\d+)", r"x*", r"tile(x)?"):
        with pytest.raises(UserError, match=r"^data\.group: .* finds no object in view0_tile000.png[^\n]*$"):
            load_images(config(tmp_path / "all", group=pattern))
    with pytest.raises(UserError, match=r"whole objects are held out, and it has 1\)$"):
        load_images(config(tmp_path / "all", group="tile"))
    write_shards(tmp_path / "table", "parquet", rows_of(40), 4)
    for streaming in (False, True):
        with pytest.raises(UserError, match="^data.group: needs a folder of images$"):
            load_images(config(tmp_path / "table", group="tile", streaming=streaming))


def test_objects_in_two_given_splits_are_reported(tmp_path, capsys):
    write_objects(tmp_path / "train", range(8))
    write_objects(tmp_path / "test", range(6, 12), 1)
    load_images(config(tmp_path, group=r"tile(\d+)"))
    assert "2 of 6 objects of 'test' are also in 'train'" in capsys.readouterr().err
