"""Rows that are added to a token dataset: augmentations, other images, one split alone, and what is refused."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
import torch
from failures.encodes import SHIFT, config, interrupted, write_classes
from folders import contents, files_in
from small import make_tokenizer

from pipelines.config import UserError
from pipelines.encode import run
from pipelines.tokens import load_tokens, pieces
from tokenizer.files import PathError


def test_augmentations_are_added_as_if_they_had_been_asked_for_at_once(tokenizer, images, tmp_path, counted):
    run(config(tokenizer, tmp_path / "grown", {**images, **SHIFT}, augmentations=1))
    counted.clear()
    run(config(tokenizer, tmp_path / "grown", {**images, **SHIFT}, augmentations=3, append=True))
    assert min(map(min, counted)) == 60 and sum(map(len, counted)) == 60  # what is there is not encoded again
    run(config(tokenizer, tmp_path / "whole", {**images, **SHIFT}, augmentations=3))
    grown, whole = load_tokens(tmp_path / "grown"), load_tokens(tmp_path / "whole")
    for name in ("train", "test"):
        assert torch.equal(grown.splits[name].tokens, whole.splits[name].tokens)
        assert torch.equal(grown.splits[name].labels, whole.splits[name].labels)
    assert whole.splits["train"].labels.tolist() == 4 * [k // 10 for k in range(30)]
    assert grown.augmentations == 3 and [part["rows"] for part in grown.parts] == [
        {"train": 60, "test": 30},
        {"train": 60},
    ]
    for asked in (1, 3):
        with pytest.raises(UserError, match="has these rows already"):
            run(config(tokenizer, tmp_path / "grown", {**images, **SHIFT}, augmentations=asked, append=True))
    run(config(tokenizer, tmp_path / "grown", {**images, **SHIFT}, augmentations=1, append=True, seed=5))
    data = load_tokens(tmp_path / "grown").splits["train"]
    assert len(data) == 150 and not torch.equal(data.tokens[120:], data.tokens[30:60])


@pytest.mark.parametrize("size", [None, 2])
def test_other_images_are_added_under_the_names_of_their_classes(tokenizer, tmp_path, monkeypatch, size):
    first, second = (
        write_classes(tmp_path / "a", ["cat", "dog", "eel"]),
        write_classes(tmp_path / "b", ["dog", "eel"], 4, 1),
    )
    run(config(tokenizer, tmp_path / "tokens", first, rows_per_shard=size))
    before = load_tokens(tmp_path / "tokens")
    run(config(tokenizer, tmp_path / "alone", second))
    alone = load_tokens(tmp_path / "alone").splits
    interrupted(monkeypatch, tokenizer, tmp_path / "tokens", second, after=1, append=True, rows_per_shard=size)
    assert torch.equal(load_tokens(tmp_path / "tokens").splits["train"].tokens, before.splits["train"].tokens)
    run(config(tokenizer, tmp_path / "tokens", second, append=True, rows_per_shard=size))
    after = load_tokens(tmp_path / "tokens", verify=True)
    for name, rows in (("train", 9), ("test", 9)):
        assert torch.equal(after.splits[name].tokens[:rows], before.splits[name].tokens)
        assert torch.equal(after.splits[name].labels[:rows], before.splits[name].labels)
        assert torch.equal(after.splits[name].tokens[rows:], alone[name].tokens)
        assert torch.equal(after.splits[name].labels[rows:], alone[name].labels + 1)  # dog and eel
    assert after.class_names == ["cat", "dog", "eel"] and after.source == before.source and len(after.parts) == 2
    names = [name for name in files_in(tmp_path / "tokens") if name.startswith("train")]
    assert len(names) == (1 if size is None else 5 + 4)
    assert not list(tmp_path.glob(".*"))


def test_rows_are_added_to_one_split_alone(tokenizer, tmp_path):
    first, second = write_classes(tmp_path / "a", ["cat"]), write_classes(tmp_path / "b", ["cat"], 4, 1)
    run(config(tokenizer, tmp_path / "tokens", first))
    run(config(tokenizer, tmp_path / "tokens", second, append=True, only="train"))
    assert [len(split) for split in load_tokens(tmp_path / "tokens").splits.values()] == [7, 3]
    run(config(tokenizer, tmp_path / "tokens", second, append=True))  # what is missing of it
    assert [len(split) for split in load_tokens(tmp_path / "tokens").splits.values()] == [7, 7]
    with pytest.raises(UserError, match="append=true"):
        run(config(tokenizer, tmp_path / "new", first, only="train"))


def test_what_can_not_be_added(tokenizer, tmp_path):
    first = write_classes(tmp_path / "a", ["cat", "dog"])
    run(config(tokenizer, tmp_path / "tokens", first))
    before = contents(tmp_path / "tokens")
    torch.manual_seed(9)
    make_tokenizer("vqvae", (28, 28), 1).eval().save_pretrained(tmp_path / "other")
    other = write_classes(tmp_path / "b", ["dog", "fox"])
    for options, needle in (
        ({"tokenizer": tmp_path / "other"}, "tokenizer: not the one that made"),
        ({"data": other}, "'fox' is not a class of the dataset, it has cat, dog"),
        ({"data": {**other, "label_column": None}}, "2 classes, and these images have no labels"),
        ({}, "has these rows already"),
        ({"out": tmp_path / "nowhere"}, "not a token dataset"),
    ):
        with pytest.raises((UserError, PathError), match=needle):
            run(
                config(**{"tokenizer": tokenizer, "out": tmp_path / "tokens", "data": first, "append": True, **options})
            )
    assert contents(tmp_path / "tokens") == before and not list(tmp_path.glob(".*"))
    run(config(tokenizer, tmp_path / "plain", {**first, "label_column": None}))
    with pytest.raises(UserError, match="it has none; data.label_column=null"):
        run(config(tokenizer, tmp_path / "plain", other, append=True))


def test_settings_that_choose_no_images_do_not_make_them_others(tokenizer, tmp_path, monkeypatch):
    """They were encoded once more, and images for validation became training images."""
    first = write_classes(tmp_path / "a", ["cat", "dog"], 10)
    run(config(tokenizer, tmp_path / "tokens", {**first, "validation_fraction": 0.2}))
    monkeypatch.chdir(tmp_path)
    for changes in (
        {"on_error": "skip"},
        {"max_bad_fraction": 0.5},
        {"shuffle_window": 7},
        {"source": "a"},
        {"source": f"{tmp_path}/a/../a/"},
    ):
        with pytest.raises(UserError, match="has these rows already"):
            data = {**first, "validation_fraction": 0.2, **changes}
            run(config(tokenizer, tmp_path / "tokens", data, append=True))
        with pytest.raises(UserError, match="images for validation would be trained on"):
            data = {**first, "validation_fraction": 0.4, **changes}
            run(config(tokenizer, tmp_path / "tokens", data, append=True))


def test_a_split_that_the_images_do_not_have_is_said_to_be_missing(tokenizer, tmp_path):
    first = write_classes(tmp_path / "a", ["cat"])
    run(config(tokenizer, tmp_path / "tokens", first))
    with pytest.raises(UserError, match="^only: of these images none are kept for validation"):
        run(config(tokenizer, tmp_path / "tokens", first, append=True, only="validation"))


def test_killed_after_its_last_step_rows_are_not_added_twice(tokenizer, tmp_path, monkeypatch):
    """The dataset has them, and the pieces are still there; nor do they stand in the way of others."""
    first, second, third = (write_classes(tmp_path / n, ["cat"], 3, k) for k, n in enumerate("abc"))
    run(config(tokenizer, tmp_path / "tokens", first))

    def interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "shutil", SimpleNamespace(rmtree=interrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config(tokenizer, tmp_path / "tokens", second, append=True))
    with pytest.raises(UserError, match="has these rows already"):
        run(config(tokenizer, tmp_path / "tokens", second, append=True))
    run(config(tokenizer, tmp_path / "tokens", third, append=True))
    assert len(load_tokens(tmp_path / "tokens").splits["train"]) == 9


def test_killed_while_the_names_change_the_dataset_is_found_again(tokenizer, tmp_path, monkeypatch):
    """Between the old one's leaving its name and the new one's taking it."""
    first, second = (write_classes(tmp_path / n, ["cat"], 3, k) for k, n in enumerate("ab"))
    run(config(tokenizer, tmp_path / "tokens", first))
    (tmp_path / "tokens").rename(tmp_path / ".del-tokens-0123abcd")
    run(config(tokenizer, tmp_path / "tokens", second, append=True))
    assert len(load_tokens(tmp_path / "tokens").splits["train"]) == 6


def test_files_are_copied_where_they_can_not_be_linked(tokenizer, tmp_path, monkeypatch):
    def no_links(*paths):
        raise OSError(errno.EXDEV, "not on this disk")

    images = write_classes(tmp_path / "a", ["cat"], 5)
    run(config(tokenizer, tmp_path / "linked", images, rows_per_shard=2))
    monkeypatch.setattr(pieces.os, "link", no_links)
    run(config(tokenizer, tmp_path / "copied", images, rows_per_shard=2))
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked")
