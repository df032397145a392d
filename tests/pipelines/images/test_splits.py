"""Which images are trained on, which are kept for validation, and which are held out."""

import os
from itertools import product

import numpy as np
import pytest
import torch
from givens.image_files import noise, rows_of, write_shards
from givens.image_folders import PNGS, bytes_of_each, config, write_folder, write_image, write_splits, write_table
from hypothesis import given
from hypothesis import strategies as st
from optional import needs_digits

from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from pipelines.images.dataset import carve, validation_count
from pipelines.images.unseen import require_unseen

# A part of one split


def test_held_out_part_is_carved_out_deterministically(tmp_path):
    write_folder(tmp_path, count=25)
    first, again = (load_images(config(tmp_path, held_out_fraction=0.2)) for _ in range(2))
    assert (len(first.train), len(first.held_out)) == (40, 10)
    for part in ("train", "held_out"):
        a, b = getattr(first, part), getattr(again, part)
        assert torch.equal(a.pixels(range(len(a))), b.pixels(range(len(b)))) and torch.equal(a.labels, b.labels)
    everything = torch.cat([part.pixels(range(len(part))) for part in (first.train, first.held_out)])
    assert len({image.numpy().tobytes() for image in everything}) == 50
    assert len(load_images(config(tmp_path, limit=7)).train) == 7


# Which splits


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev"])
def test_a_folder_for_validation_is_held_out_where_there_is_none_for_testing(tmp_path, capsys, name):
    splits = load_images(config(write_splits(tmp_path, "train", name)))
    assert (len(splits.train), len(splits.held_out)) == (10, 3)
    told = capsys.readouterr().err
    assert told == f"data.held_out: {tmp_path}: there is no 'test', so '{name}' is held out\n"
    load_images(config(tmp_path, held_out=name))
    assert capsys.readouterr().err == ""  # as was asked


DIVISIONS = [
    {},
    {"validation_fraction": 0.0},
    {"validation_fraction": 0.2},
    {"validation_fraction": 0.5},
    {"held_out": "test"},
    {"held_out": "test", "held_out_fraction": 0.4, "validation_fraction": 0.3},
    {"held_out": "more"},
    {"held_out": "val"},
    {"held_out": "train", "split": "val"},
    {"split": "more", "held_out": "val", "validation_fraction": 0.5},
    {"limit": 5},
    {"limit": 5, "validation_fraction": 0.5},
]


@pytest.mark.parametrize("part", ["validation", "held_out"])
def test_images_that_were_trained_on_are_not_taken_for_new_ones(tmp_path, capsys, part):
    """Whichever settings divide them: refused are exactly the divisions that share an image with the training split."""
    for seed, (name, count) in enumerate((("train", 30), ("val", 12), ("more", 10))):
        for k in range(count):
            write_image(tmp_path / f"{name}/{k:02}.png", noise(12, 12, seed=100 * seed + k))
    settings = [config(tmp_path, **options) for options in DIVISIONS]
    loaded = [
        {name: bytes_of_each(images) for name, images in load_images(each).by_name().items()} for each in settings
    ]
    again = [config(f"{tmp_path}/../{tmp_path.name}", **options) for options in DIVISIONS]
    capsys.readouterr()
    refused = 0
    for (then, before), (now, after) in product(zip(settings, loaded, strict=True), zip(again, loaded, strict=True)):
        images = after.get(part, [])
        if seen := len(set(before["train"]).intersection(images)):
            told = rf"^data\..*: {seen} of these {len(images)} {part.replace('_', '-')} images were trained on"
            with pytest.raises(UserError, match=told):
                require_unseen(now, then, part)
            refused += 1
        else:
            require_unseen(now, then, part)
    assert 10 < refused < 100 and capsys.readouterr().err == ""
    now = config(tmp_path, split="val", held_out="train", validation_fraction=0.5)
    for unknown in (None, config(tmp_path / "elsewhere")):
        require_unseen(now, unknown, part)


def test_a_stream_is_divided_by_its_files_and_nothing_else_is_called_new(tmp_path):
    write_shards(tmp_path, "parquet", rows_of(40), 4)
    stream, copied = (config(tmp_path, streaming=streaming) for streaming in (True, False))
    for now, then in ((stream, copied), (copied, stream)):
        for part in ("validation", "held_out"):
            with pytest.raises(UserError, match="^data.streaming: some of these "):
                require_unseen(now, then, part)
        require_unseen(now, now, "held_out")
    write_shards(tmp_path, "parquet", rows_of(4), 1, split="test")
    for now, then in ((stream, copied), (copied, stream)):
        require_unseen(now, then, "held_out")


@pytest.mark.parametrize(
    ("split", "held_out"), [(".", None), (".", "test"), ("", None), ("all", None), ("link", "test")]
)
def test_a_split_within_another_is_not_held_out_of_it(tmp_path, split, held_out):
    """Else images would be trained on and held out."""
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


def test_only_the_first_process_tells(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert len(load_images(config(write_splits(tmp_path, "train", "val"))).held_out) == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("folders", "options", "sizes", "told"),
    [
        (("train", "test"), {}, (10, 3), ""),
        (("train", "test", "val"), {}, (10, 3), "'test' is held out; not used: val (data.held_out=NAME takes another)"),
        (("train", "test", "val"), {"held_out": "val"}, (10, 4), ""),
        (
            ("train", "val", "dev"),
            {},
            (9, 1),
            "there is no 'test', so 10% of 'train' is held out; not used: val, dev (data.held_out=NAME takes another)",
        ),
        (
            ("train", "val", "testing"),
            {},
            (10, 3),
            "there is no 'test', so 'val' is held out; not used: testing (data.held_out=NAME takes another)",
        ),
        (
            ("train", "val"),
            {"held_out": "test"},
            (9, 1),
            "there is no 'test', so 10% of 'train' is held out; not used: val (data.held_out=NAME takes another)",
        ),
        (
            ("val", "train"),
            {"split": "val"},
            (9, 1),
            "there is no 'test', so 10% of 'val' is held out; not used: train (data.held_out=NAME takes another)",
        ),
        (
            ("test", "train"),
            {"split": "test"},
            (9, 1),
            "there is no 'test', so 10% of 'test' is held out; not used: train (data.held_out=NAME takes another)",
        ),
        (
            ("train", "holdout"),
            {},
            (9, 1),
            "there is no 'test', so 10% of 'train' is held out; not used: holdout (data.held_out=NAME takes another)",
        ),
        (("train", "holdout"), {"held_out": "holdout"}, (10, 3), ""),
        (
            ("train", "test", "cat", "bus"),
            {},
            (10, 3),
            "'test' is held out; not used: bus, cat (data.held_out=NAME takes another)",
        ),
        (("my-split", "val"), {"split": "my-split"}, (10, 3), "there is no 'test', so 'val' is held out"),
    ],
)
def test_what_is_left_over_is_told_in_a_line(tmp_path, capsys, folders, options, sizes, told):
    splits = load_images(config(write_splits(tmp_path, *folders), **options))
    assert (len(splits.train), len(splits.held_out)) == sizes
    assert capsys.readouterr().err == (f"data.held_out: {tmp_path}: {told}\n" if told else "")


@pytest.mark.parametrize("classes", [("cat", "dog"), ("val", "dev"), ("valid", "training"), ("validation", "apple")])
def test_classes_may_be_called_like_splits(tmp_path, capsys, classes):
    splits = load_images(config(write_folder(tmp_path, classes=classes) and tmp_path))
    assert splits.train.class_names == sorted(classes) and (len(splits.train), len(splits.held_out)) == (36, 4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("folders", "held_out", "message"),
    [
        (
            ("train", "val"),
            "vla",
            "has no split 'vla'; it has train, val; did you mean 'val'? (data.held_out=test holds out part of 'train')",
        ),
        (("train", "val"), "validation", "it has train, val; did you mean 'val'? (data.held_out=test holds"),
        (("train", "validation"), "vla", "it has train, validation; did you mean 'validation'? (data"),
        (("train", "test", "val"), "tset", "it has train, test, val; did you mean 'test'?"),
        (("train", "val"), "other", "it has train, val (data.held_out=test holds"),
    ],
)
def test_a_split_that_is_not_there_is_no_reason_to_carve(tmp_path, folders, held_out, message):
    with pytest.raises(UserError) as caught:
        load_images(config(write_splits(tmp_path, *folders), held_out=held_out))
    assert f"data.held_out: {tmp_path} has no split '{held_out}'" in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("folders", [("train",), ("cat", "dog")])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_misspelt_split_is_refused_where_there_is_only_one(tmp_path, folders, streaming):
    options = {"streaming": streaming}
    write_splits(tmp_path, *folders)
    with pytest.raises(UserError, match="^data.held_out: .* no split 'vla'; it has train .data.held_out=test holds"):
        load_images(config(tmp_path, held_out="vla", **options))
    for held_out in (None, "test"):
        assert len(load_images(config(tmp_path, held_out=held_out, **options)).held_out) == 1


def test_a_folder_without_images_is_no_split(tmp_path, capsys):
    write_splits(tmp_path, "train", "test")
    write_image(tmp_path / "notes/a.txt", b"hello")
    write_image(tmp_path / ".cache/a.png", PNGS[0])
    load_images(config(tmp_path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_have_splits_for_validation(tmp_path, capsys, streaming):
    """Which `datasets` calls so, whatever their files are called."""
    write_table(tmp_path / "train-00000-of-00001.parquet", PNGS, [0, 1] * 5)
    write_table(tmp_path / "val-00000-of-00001.parquet", PNGS[:4], [1, 1, 0, 0])
    splits = load_images(config(tmp_path, streaming=streaming))
    assert (len(splits.train), len(splits.held_out)) == (10, 4)
    assert "there is no 'test', so 'validation' is held out\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="no split 'val'; it has train, validation; did you mean 'validation'"):
        load_images(config(tmp_path, streaming=streaming, held_out="val"))


@given(st.data())
def test_carving_is_a_partition_of_which_no_part_depends_on_the_size_of_another(data):
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


# Images for validation


@pytest.mark.parametrize(
    ("size", "fraction", "expected"),
    [
        (4000, None, 200),
        (60_000, None, 2000),
        (1_281_167, None, 2000),
        (200, None, 10),
        (180, None, 0),
        (7, None, 0),
        (60_000, 0.1, 6000),
        (7, 0.01, 1),
        (7, 0, 0),
        (4000, 0.0, 0),
    ],
)
def test_how_many_images_are_for_validation(size, fraction, expected):
    assert validation_count(size, fraction) == expected


@needs_digits
def test_images_for_validation_are_training_images_that_are_not_trained_on():
    every = load_images(DataConfig(validation_fraction=0))
    splits = load_images(DataConfig())
    assert (len(splits.train), len(splits.validation), len(splits.held_out)) == (3800, 200, 1000)
    train, validation, held_out = (
        bytes_of_each(splits.by_name()[name]) for name in ("train", "validation", "held_out")
    )
    assert sorted(train + validation) == sorted(bytes_of_each(every.train)) and not set(train) & set(validation)
    assert held_out == bytes_of_each(every.held_out)
    assert splits.validation.labels.bincount().min() > 5
    again = load_images(DataConfig(limit=30, augment={"shift": 2}, image_size=28))  # none of which chooses others
    assert bytes_of_each(again.validation) == validation[:30] and bytes_of_each(again.train) == train[:30]
    more = load_images(DataConfig(validation_fraction=0.1)).validation
    assert set(validation) <= set(bytes_of_each(more)) and len(more) == 400


def test_images_for_validation_do_not_depend_on_what_is_held_out(tmp_path):
    write_splits(tmp_path, "train", "test")
    found = [
        bytes_of_each(load_images(config(tmp_path, validation_fraction=0.2, **options)).validation)
        for options in ({}, {"held_out": "test"}, {"limit": 5})
    ]
    assert len(found[0]) == 2 and found[1:] == [found[0]] * 2
    (tmp_path / "test").rename(tmp_path / "other")
    assert bytes_of_each(load_images(config(tmp_path, validation_fraction=0.2)).validation) == found[0]
    assert load_images(config(tmp_path)).validation is None  # of ten images, none is spared
    with pytest.raises(UserError, match="no images for 'train'"):
        load_images(config(tmp_path, validation_fraction=0.95))


def test_one_image_can_not_be_divided(tmp_path):
    write_image(tmp_path / "a.png", noise(12, 12))
    with pytest.raises(UserError, match="no images for 'train'"):
        load_images(config(tmp_path))
