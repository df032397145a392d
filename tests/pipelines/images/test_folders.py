"""Folders of images: in which order they are read, which are classes, and what is refused."""

import os
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from givens.image_files import noise
from givens.image_folders import config, write_folder, write_image
from hypothesis import given
from hypothesis import strategies as st
from ordinary import as_others

from pipelines.config import UserError
from pipelines.images import load_images


def test_folder_with_splits_and_classes_is_read_in_path_order(tmp_path):
    for split, classes in (("train", ("b", "a", "B")), ("test", ("a", "c"))):
        write_folder(tmp_path / split, count=3, classes=classes)
    write_image(tmp_path / "train/a/.hidden.png", b"")
    write_image(tmp_path / "train/a/notes.txt", b"")
    splits = load_images(config(tmp_path))
    assert splits.train.class_names == ["B", "a", "b", "c"]
    assert splits.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert splits.held_out.labels.tolist() == [1] * 3 + [3] * 3
    assert np.array_equal(splits.train.pixels([3])[0, 0], noise(12, 12, seed=1000))  # a/000.png


@given(st.data())
def test_each_image_of_a_folder_is_in_one_part_with_its_class(data):
    """Whatever splits and classes there are, and whatever they are called."""
    names = st.sampled_from(["train", "test", "val", "dev", "other", "a b", "test_01", "x.png"])
    split_names = data.draw(st.one_of(st.just([""]), st.sets(names).map(lambda found: sorted(found | {"train"}))))
    classes = data.draw(st.lists(names, min_size=1, max_size=3, unique=True))
    if split_names == [""]:
        classes = [name for name in classes if name not in ("train", "test")] or ["cat"]
    with tempfile.TemporaryDirectory() as folder:
        paths = set()
        for split, name in product(split_names, classes):
            for k in range(data.draw(st.integers(4, 5))):
                place = f"{split}/{name}/test_{k}.png".lstrip("/")
                write_image(Path(folder, place), b"")
                paths.add(place)
        splits = load_images(config(folder, streaming=True, validation_fraction=0.2))  # which reads none of them
        found = {name: part.names(range(len(part))) for name, part in splits.by_name().items()}
        for name, part in splits.by_name().items():
            labels = [part.class_names[k] for k in part.labels]
            assert labels == [path.split("/")[-2] for path in found[name]]
    together = [path for part in found.values() for path in part]
    assert len(together) == len(set(together)) and set(together) <= paths
    used = {path for path in paths if split_names == [""] or path.split("/")[0] == "train"}
    assert used <= set(together)


def test_folder_names_that_datasets_would_take_for_splits(tmp_path):
    for k in range(9):
        write_image(tmp_path / f"[1] {k}.png", noise(12, 12, seed=k))
    write_image(tmp_path / "test.png", noise(12, 12, seed=9))
    splits = load_images(config(tmp_path))
    assert (len(splits.train), len(splits.held_out)) == (9, 1)
    assert splits.train.labels is None and splits.train.class_names == []


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_without_its_folder_is_not_the_whole(tmp_path, streaming):
    write_folder(tmp_path)
    with pytest.raises(UserError, match=r"^data.split: the source has no split 'tarin'; it has train$"):
        load_images(config(tmp_path, split="tarin", streaming=streaming))


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("TRAIN", "Val"), ("Testing", "training"), ("training", "testing")]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_folders_that_must_be_splits_are_not_read_as_classes(tmp_path, names, streaming):
    """Else test images would be trained on."""
    for name in names:
        write_folder(tmp_path / name, count=3, classes=("a", "b"))
    told = f"^{tmp_path}: {names[0]}, {names[1]}|^{tmp_path}: {names[1]}, {names[0]}"
    with pytest.raises(UserError, match=told):
        load_images(config(tmp_path, streaming=streaming))
    splits = load_images(config(tmp_path, split=names[0], held_out=names[1], streaming=streaming))
    assert splits.train.class_names == splits.held_out.class_names == ["a", "b"]


def test_classes_may_be_called_as_splits_are(tmp_path):
    write_folder(tmp_path, count=3, classes=("Bus", "Train"))
    assert load_images(config(tmp_path)).train.class_names == ["Bus", "Train"]


@pytest.mark.parametrize("pair", [("Cat", "cat"), ("cat", "cat "), ("caf\u00e9", "cafe\u0301")])
@pytest.mark.parametrize("apart", [False, True])
def test_one_class_in_two_spellings_is_refused(tmp_path, pair, apart):
    """In one split, and in two."""
    if apart:
        write_folder(tmp_path / "train", count=3, classes=(pair[0], "dog"))
        write_folder(tmp_path / "test", count=3, classes=(pair[1], "dog"))
    else:
        write_folder(tmp_path, count=3, classes=pair)
    with pytest.raises(UserError, match="^the classes .* are one in two spellings; give both one name$"):
        load_images(config(tmp_path))
    assert load_images(config(tmp_path, label_column=None)).train.labels is None


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_within_a_class_are_said_to_be_of_it(tmp_path, capsys, streaming):
    write_folder(tmp_path / "animals", count=5, classes=("cats", "dogs"))
    write_folder(tmp_path, count=5, classes=("things",))
    assert load_images(config(tmp_path, streaming=streaming)).train.class_names == ["animals", "things"]
    told = capsys.readouterr().err
    assert told.startswith(f"data.source: {tmp_path}: ") and told.count("\n") == 1
    assert "'animals'" in told and "animals/cats, animals/dogs" in told and "things" not in told
    load_images(config(tmp_path, streaming=streaming, label_column=None))
    assert capsys.readouterr().err == ""


def test_one_folder_within_each_class_is_nothing_to_tell(tmp_path, capsys):
    for name in ("cat", "dog"):
        write_folder(tmp_path / name, count=5, classes=("images",))
    assert load_images(config(tmp_path)).train.class_names == ["cat", "dog"] and capsys.readouterr().err == ""


def test_folder_without_images(tmp_path):
    write_image(tmp_path / "notes.txt", b"hello")
    with pytest.raises(UserError, match=f"{tmp_path}: no images"):
        load_images(config(tmp_path))


def test_image_outside_of_the_class_folders_has_no_label(tmp_path):
    write_folder(tmp_path)
    stray = write_image(tmp_path / "stray.png", noise(12, 12))
    with pytest.raises(UserError, match=f"{stray}: no class, while other images have one: in folders, each"):
        load_images(config(tmp_path))
    assert load_images(config(tmp_path, label_column=None)).train.labels is None


def test_linked_folder_is_refused(tmp_path):
    write_folder(tmp_path / "data")
    (tmp_path / "data/loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="loop: links"):
        load_images(config(tmp_path / "data"))


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_without_end_are_told_in_a_line(tmp_path, streaming, monkeypatch):
    """Deeper than Python can follow, and than a path can be."""
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        os.mkdir("deep")
        os.chdir("deep")
    monkeypatch.undo()
    try:
        with pytest.raises(UserError, match=f"{tmp_path}: folders are nested more than 100 deep"):
            load_images(config(tmp_path, streaming=streaming))
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)  # which Python, hence pytest, cannot


def test_a_folder_in_it_that_cannot_be_read_is_named(tmp_path):
    """Its images would be missing without a word."""
    write_folder(tmp_path, count=3, classes=("a", "b"))
    (tmp_path / "b").chmod(0)
    with as_others(), pytest.raises(UserError, match=f"^{tmp_path / 'b'}: cannot be read .Permission denied.$"):
        load_images(config(tmp_path))
    (tmp_path / "b").chmod(0o755)
