"""Folders of images: their order, which folders are classes, and invalid folders."""

import tempfile
from itertools import product
from pathlib import Path

import pytest
from givens.images import config, write_folder, write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from ordinary import as_others

from pipelines.config import UserError
from pipelines.images import load_images


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_each_image_of_a_folder_is_in_one_split_with_the_class_of_its_folder(data):
    """Whatever the names of splits, classes and files."""
    names = st.sampled_from(["train", "test", "val", "dev", "other", "a b", "test_01", "x.png", "кошка", "宇宙"])
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
        splits = load_images(config(folder, streaming=True, validation_fraction=0.2))  # does not decode
        found = {name: part.names(range(len(part))) for name, part in splits.by_name().items()}
        for name, part in splits.by_name().items():
            labels = [part.class_names[k] for k in part.labels]
            assert labels == [path.split("/")[-2] for path in found[name]]
    together = [path for part in found.values() for path in part]
    assert len(together) == len(set(together)) and set(together) <= paths
    used = {path for path in paths if split_names == [""] or path.split("/")[0] == "train"}
    assert used <= set(together)


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing")])
def test_folders_that_look_like_splits_are_not_classes(tmp_path, names):
    """Otherwise test images would be trained on: capitalised names, and those of folders with classes."""
    classes = ["a", "b"] if names == ("training", "testing") else []
    for name in names:
        write_folder(tmp_path / name, count=3, classes=classes or [""])
    with pytest.raises(UserError, match=r"data\.split") as caught:
        load_images(config(tmp_path))
    assert all(name in str(caught.value) for name in names)
    splits = load_images(config(tmp_path, split=names[0], held_out=names[1]))
    assert splits.train.class_names == splits.held_out.class_names == classes
    write_folder(tmp_path / "others", count=3, classes=("Bus", "Train"))
    assert load_images(config(tmp_path / "others")).train.class_names == ["Bus", "Train"]


def test_nested_class_folders_are_merged_with_a_note(tmp_path, capsys):
    write_folder(tmp_path / "animals", count=5, classes=("cats", "dogs"))
    write_folder(tmp_path / "things", count=5, classes=("all",))
    assert load_images(config(tmp_path)).train.class_names == ["animals", "things"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.source: {tmp_path}: ")
    assert "'animals'" in line and "animals/cats, animals/dogs" in line and "things" not in line


def test_a_link_to_a_folder_is_refused(tmp_path):
    write_folder(tmp_path / "data")
    (tmp_path / "data/loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="data/loop: links"):
        load_images(config(tmp_path / "data"))


def test_an_unreadable_folder_is_named(tmp_path):
    """Otherwise its images would be missing silently."""
    write_folder(tmp_path, count=3, classes=("a", "b"))
    (tmp_path / "b").chmod(0)
    with as_others(), pytest.raises(UserError, match=f"^{tmp_path / 'b'}: .*Permission denied"):
        load_images(config(tmp_path))
    (tmp_path / "b").chmod(0o755)
