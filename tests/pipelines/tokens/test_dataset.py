"""Token datasets: what is written comes back, what is damaged is refused, and `smalti encode` writes what it says.

Covers: pipelines/encode.py, pipelines/stages/provenance.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import files_in
from givens.image_files import write_pictures
from givens.token_datasets import edit_split, make_dataset, refused
from launch import DIGITS as DIGITS_ONCE
from optional import needs_digits
from safetensors.torch import load_file
from small import TOKENIZERS, make_tokenizer

from pipelines import encode
from pipelines.config import UserError
from pipelines.encode import EncodeConfig, run
from pipelines.images import load_images, tables
from pipelines.stages.provenance import data_beside
from pipelines.tokens import TokenDataset, TokenSplit, load_tokens
from pipelines.tokens.shards import smallest_type
from tokenizer import Tokenizer
from tokenizer.files import FormatError, IntegrityError, PathError, PipelineLoadError

META = "meta.json"


@pytest.fixture(autouse=True)
def parsed_once(monkeypatch):
    """The digits, whatever the number of encodes."""
    monkeypatch.setattr(tables, "digits", DIGITS_ONCE)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_saved_is_what_is_loaded(name, labelled, tmp_path):
    data = make_dataset(name, labelled)
    data.save(tmp_path / "tokens")
    loaded = load_tokens(str(tmp_path / "tokens"))
    assert loaded.grid == data.grid and loaded.class_names == data.class_names and loaded.augmentations == 1
    assert loaded.source == data.source and loaded.num_classes == (3 if labelled else 0)
    assert loaded.tokenizer.fingerprint() == data.tokenizer.fingerprint()
    assert list(loaded.splits) == ["train", "test"] and [len(split) for split in loaded.splits.values()] == [6, 2]
    for key, split in data.splits.items():
        assert torch.equal(loaded.splits[key].tokens, split.tokens)
        assert loaded.splits[key].tokens.dtype == smallest_type(data.grid.vocab_size)
        assert (
            loaded.splits[key].labels is None if not labelled else torch.equal(loaded.splits[key].labels, split.labels)
        )
    assert files_in(tmp_path / "tokens") == [
        "manifest.json",
        META,
        "test.safetensors",
        "tokenizer/config.json",
        "tokenizer/model.safetensors",
        "train.safetensors",
    ]


@pytest.mark.parametrize(
    ("vocab_size", "bytes_each"), [(2, 1), (256, 1), (257, 2), (65536, 2), (65537, 4), (1 << 20, 4)]
)
def test_the_smallest_type_holds_every_id(vocab_size, bytes_each):
    dtype = smallest_type(vocab_size)
    assert dtype.itemsize == bytes_each
    assert torch.tensor([vocab_size - 1]).to(dtype).long().item() == vocab_size - 1


@pytest.mark.parametrize("levels", [(5, 4, 3), (8, 8, 8), (48, 48, 48)])
def test_ids_of_every_width_survive(levels, tmp_path):
    data = make_dataset(quantizer={"kind": "fsq", "levels": levels})
    tokens = torch.randint(data.grid.vocab_size, (9, *data.grid.shape))
    tokens[0] = data.grid.vocab_size - 1
    splits = {"train": TokenSplit(tokens, torch.zeros(9, dtype=torch.int32))}  # any type in, the smallest one out
    TokenDataset(data.grid, data.class_names, splits, data.tokenizer, {}).save(tmp_path / "tokens")
    loaded = load_tokens(tmp_path / "tokens").splits["train"]
    assert torch.equal(loaded.tokens.long(), tokens) and loaded.labels.dtype == torch.int64
    rows = torch.tensor([8, 0])
    assert torch.equal(loaded.tokens[rows].long(), tokens[rows])  # as training reads them
    size = (tmp_path / "tokens" / "train.safetensors").stat().st_size
    assert size < 9 * len(data.grid) * smallest_type(data.grid.vocab_size).itemsize + 9 * 8 + 300


@pytest.mark.parametrize(
    ("changes", "split", "options", "message"),
    [
        ({}, "train.clean", {}, "'train.clean' is not a name"),
        ({}, "a/b", {}, "'a/b' is not a name"),
        ({"class_names": ["a\n", "b", "c"]}, "train", {}, "should be a printable name"),
        ({"class_names": ["cat"]}, "train", {}, r"train: labels should lie in \[0, 1\)"),
        ({}, "train", {"rows_per_shard": 0}, "rows_per_shard should be at least 1"),
        ({}, "train", {"rows_per_shard": -1}, "rows_per_shard should be at least 1"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, changes, split, options, message):
    data = make_dataset()
    data = replace(data, **changes, splits={split: data.splits["train"]})
    with pytest.raises(ValueError, match=message):
        data.save(tmp_path / "tokens", **options)
    if not options:
        with pytest.raises(ValueError, match=message):
            data.to_parquet(tmp_path / "parquet")
    assert not any(tmp_path.iterdir())


# Damage


@pytest.fixture
def folder(tmp_path):
    make_dataset().save(tmp_path / "tokens")
    return tmp_path / "tokens"


def edit_meta(folder, **changes):
    data = json.loads((folder / META).read_text()) | changes
    (folder / META).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_folder_that_is_none(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert refused(path, PathError, path, "smalti encode", seal=False)


def test_every_flipped_or_missing_file_is_noticed(folder):
    for name in files_in(folder):
        data = (folder / name).read_bytes()
        for position in (0, len(data) // 2, len(data) - 2):
            (folder / name).write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            assert refused(folder, PipelineLoadError, folder, seal=False)
        (folder / name).unlink()
        assert refused(folder, PathError, seal=False)
        (folder / name).write_bytes(data)
    assert len(load_tokens(folder).splits["train"]) == 6


def test_tokenizer_of_another_dataset(folder, tmp_path):
    make_dataset(seed=1).save(tmp_path / "other")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tmp_path / "other" / "tokenizer", folder / "tokenizer")
    assert refused(folder, IntegrityError, "tokenizer", "fingerprint")


def test_ids_and_labels_out_of_range(folder):
    tokens = load_file(folder / "train.safetensors")["tokens"]
    edit_split(folder, tokens=torch.full_like(tokens, 32))
    assert refused(folder, IntegrityError, folder / "train.safetensors", "[0, 32)")
    edit_split(folder, tokens=tokens)
    for wrong in (-1, 3):
        edit_split(folder, labels=torch.tensor([0, 1, 2, wrong, 1, 0]))
        assert refused(folder, IntegrityError, folder / "train.safetensors", "labels", "[0, 3)", wrong)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": None},
        {"tokens": torch.zeros(5, 2, 2, dtype=torch.uint8)},
        {"tokens": torch.zeros(6, 2, 2, dtype=torch.int64)},
        {"tokens": torch.zeros(6, 2, 2)},
        {"tokens": torch.tensor(1, dtype=torch.uint8)},
        {"labels": None},
        {"labels": torch.zeros(5, dtype=torch.int64)},
        {"labels": torch.zeros(6, 1, dtype=torch.int64)},
        {"labels": torch.zeros(6)},
    ],
)
def test_split_of_another_form(folder, changes):
    edit_split(folder, **changes)
    assert refused(folder, FormatError, folder / "train.safetensors", next(iter(changes)))


def test_tokens_of_another_shape(folder):
    edit_split(folder, tokens=torch.zeros(6, 4, dtype=torch.uint8))
    assert refused(folder, IntegrityError, folder / "train.safetensors", "shape")


def test_missing_split_is_noticed_whatever_the_manifest_says(folder):
    (folder / "test.safetensors").unlink()
    assert refused(folder, PathError, "test.safetensors", seal=False)
    assert refused(folder, PipelineLoadError, folder / "test.safetensors")


def test_split_that_is_no_safetensors_file(folder):
    for data in (b"", b"tokens", (1 << 60).to_bytes(8, "little")):
        (folder / "train.safetensors").write_bytes(data)
        assert refused(folder, PipelineLoadError, folder / "train.safetensors")


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"format_version": 3}, "format_version"),
        ({"format_version": None}, "format_version"),
        ({"grid": None}, "grid"),
        ({"grid": {"shape": [0, 2], "vocab_size": 32}}, "positive"),
        ({"grid": {"shape": [2, 4], "vocab_size": 32}}, "(2, 4)"),
        ({"grid": {"shape": [2, 2], "vocab_size": 64}}, "64"),
        ({"splits": None}, "splits"),
        ({"splits": ["train"]}, META),
        ({"splits": {"train": [7]}}, "train.safetensors"),
        ({"splits": {"train": "many"}}, META),
        ({"splits": {"../outside": [2]}}, "is not a name"),
        ({"splits": {"train/../../outside": [2]}}, "is not a name"),
        ({"classes": None}, "classes"),
        ({"classes": [1, 2, 3]}, "classes"),
        ({"classes": []}, "labels"),
        ({"source": 3}, META),
        ({"augmentations": "few"}, META),
        ({"tokenizer": None}, "tokenizer"),
        ({"tokenizer": "0" * 64}, "fingerprint"),
    ],
)
def test_wrong_field_of_the_meta_file(folder, changes, needle):
    edit_meta(folder, **changes)
    assert refused(folder, PipelineLoadError, folder, needle)


def test_older_dataset_is_replaced_and_a_foreign_folder_is_not(folder, tmp_path):
    make_dataset(rows=9).save(folder, rows_per_shard=3)
    assert len(load_tokens(folder).splits["train"]) == 9 and "train.safetensors" not in files_in(folder)
    (folder / "validation.safetensors").write_bytes(b"of somebody")
    with pytest.raises(PathError, match="validation"):
        make_dataset().save(folder)
    assert (folder / "validation.safetensors").read_bytes() == b"of somebody"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(PathError, match="mine"):
        make_dataset().save(tmp_path / "mine")
    assert files_in(tmp_path / "mine") == ["thesis.tex"] and not list(tmp_path.glob(".tmp-*"))


# Encoding

LIMIT = 30
DIGITS = {"source": "digits", "limit": LIMIT}


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    make_tokenizer("vqvae", (28, 28), 1).eval().save_pretrained(tmp_path / "tokenizer")
    return Tokenizer.from_pretrained(tmp_path / "tokenizer")


def encoded_tokens(tmp_path, data=DIGITS, out="tokens", **options):
    options = {"tokenizer": str(tmp_path / "tokenizer"), "out": str(tmp_path / out), "data": data, **options}
    return load_tokens(run(EncodeConfig(**options)))


@needs_digits
def test_rows_are_the_images_in_order(tokenizer, tmp_path):
    data = encoded_tokens(tmp_path, batch_size=7)
    config = EncodeConfig(tokenizer="", out="", data=DIGITS).data
    images = load_images(config)
    for name, split in (("train", images.train), ("test", images.held_out)):
        expected = tokenizer.encode(split.batch(np.arange(LIMIT)))
        assert len(expected.unique()) > 1 and torch.equal(data.splits[name].tokens.long(), expected)
        assert torch.equal(data.splits[name].labels, split.labels)
    assert data.class_names == [str(digit) for digit in range(10)] and data.source["data"]["source"] == "digits"
    assert data.augmentations == 0 and data.tokenizer.fingerprint() == tokenizer.fingerprint()


@needs_digits
def test_variants_are_further_rows_that_can_be_made_again(tokenizer, tmp_path):
    augmented = {**DIGITS, "augment": {"shift": 3}}
    plain = encoded_tokens(tmp_path)
    data = encoded_tokens(tmp_path, augmented, out="augmented", augmentations=2, batch_size=64)
    assert data.augmentations == 2 and len(data.splits["train"]) == 3 * LIMIT and len(data.splits["test"]) == LIMIT
    assert torch.equal(data.splits["test"].tokens, plain.splits["test"].tokens)
    variants = data.splits["train"].tokens.long().split(LIMIT)
    assert torch.equal(variants[0], plain.splits["train"].tokens.long())
    assert not torch.equal(variants[1], variants[0]) and not torch.equal(variants[2], variants[1])
    assert torch.equal(data.splits["train"].labels, plain.splits["train"].labels.repeat(3))
    again = encoded_tokens(tmp_path, augmented, out="again", augmentations=2, batch_size=7)
    assert torch.equal(again.splits["train"].tokens, data.splits["train"].tokens)
    other = encoded_tokens(tmp_path, augmented, out="other", augmentations=2, seed=1)
    assert torch.equal(other.splits["train"].tokens[:LIMIT], data.splits["train"].tokens[:LIMIT])
    assert not torch.equal(other.splits["train"].tokens, data.splits["train"].tokens)


@needs_digits
def test_data_defaults_to_what_the_tokenizer_was_trained_on(tokenizer, tmp_path):
    facts = {"data": {"source": "digits", "limit": 12}, "tokenizer": {"steps": 5}}
    (tmp_path / "tokenizer" / "provenance.json").write_text(json.dumps(facts))
    encode.main([f"tokenizer={tmp_path / 'tokenizer'}", f"out={tmp_path / 'tokens'}"])
    data = load_tokens(tmp_path / "tokens")
    assert len(data.splits["train"]) == 12 and data.source["tokenizer"] == {"steps": 5}


@pytest.mark.parametrize("data", [True, None, "digits", [1]])
def test_data_that_is_no_object_of_settings_is_refused(data, tmp_path):
    path = tmp_path / "provenance.json"
    path.write_text(json.dumps({"data": data}))
    with pytest.raises(FormatError, match="provenance.json: data: expected an object of settings, found "):
        data_beside(path)


def test_images_without_classes_have_no_labels(tokenizer, tmp_path):
    for name in ("train", "test"):
        write_pictures(tmp_path / "images" / name)
    data = encoded_tokens(tmp_path, {"source": str(tmp_path / "images")})
    assert data.class_names == [] and all(split.labels is None for split in data.splits.values())


# Images for validation


@needs_digits
def test_images_for_validation_are_a_split_of_their_own(tokenizer, tmp_path):
    """As they are: their augmented variants are nowhere, in the dataset as it is made and as it grows."""
    source = {**DIGITS, "augment": {"shift": 3}}
    data = encoded_tokens(tmp_path, source, augmentations=1)
    images = load_images(EncodeConfig(tokenizer="", out="", data=source).data)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 60, "validation": 30, "test": 30}
    assert list(json.loads((tmp_path / "tokens" / META).read_text())["splits"]) == ["train", "validation", "test"]
    expected = tokenizer.encode(images.validation.batch(np.arange(30)))
    assert torch.equal(data.splits["validation"].tokens.long(), expected)
    assert torch.equal(data.splits["validation"].labels, images.validation.labels)
    grown = encoded_tokens(tmp_path, source, augmentations=3, append=True)
    assert {name: len(split) for name, split in grown.splits.items()} == {"train": 120, "validation": 30, "test": 30}
    every = np.arange(4 * 30)
    variants = torch.cat([images.train.prepare(*part) for part in encode.variants_of(images.train, every, 0)])
    assert torch.equal(grown.splits["train"].tokens.long(), tokenizer.encode(variants))
    assert len(load_tokens(tmp_path / "tokens").splits["validation"]) == 30


@needs_digits
def test_a_dataset_without_images_for_validation_grows_without(tokenizer, tmp_path):
    augmented = {**DIGITS, "augment": {"shift": 3}}
    before = encoded_tokens(tmp_path, {**augmented, "validation_fraction": 0})
    grown = encoded_tokens(tmp_path, augmented, append=True, augmentations=1)  # the same images
    assert {name: len(split) for name, split in grown.splits.items()} == {"train": 60, "test": 30}
    assert torch.equal(grown.splits["train"].tokens[:30], before.splits["train"].tokens)
    more = encoded_tokens(tmp_path, {**DIGITS, "limit": 40}, append=True, only="train")  # and others
    assert {name: len(split) for name, split in more.splits.items()} == {"train": 100, "test": 30}
    with pytest.raises(UserError, match=r"data.validation_fraction: 0.0 of these images before, 0.2 now"):
        encoded_tokens(tmp_path, {**augmented, "validation_fraction": 0.2}, append=True, augmentations=2)


@needs_digits
def test_a_dataset_grows_by_what_it_kept_for_validation(tokenizer, tmp_path):
    augmented = {**DIGITS, "augment": {"shift": 3}}
    encoded_tokens(tmp_path, {**augmented, "validation_fraction": 0.4})
    grown = encoded_tokens(tmp_path, augmented, append=True, augmentations=1)  # not said again
    assert {name: len(split) for name, split in grown.splits.items()} == {"train": 60, "validation": 30, "test": 30}
    assert [part["data"]["validation_fraction"] for part in grown.parts] == [0.4, 0.4]
    with pytest.raises(UserError, match="has these rows already"):
        encoded_tokens(tmp_path, augmented, append=True, only="validation")


@needs_digits
def test_the_images_for_validation_are_those_of_the_tokenizer(tokenizer, tmp_path):
    facts = {"data": {"source": "digits", "limit": 40, "validation_fraction": 0.02}}
    (tmp_path / "tokenizer" / "provenance.json").write_text(json.dumps(facts))
    encode.main([f"tokenizer={tmp_path / 'tokenizer'}", f"out={tmp_path / 'tokens'}", "data.limit=100"])
    data = load_tokens(tmp_path / "tokens")
    assert [len(split) for split in data.splits.values()] == [100, 80, 100]


@pytest.mark.parametrize("labelled", ["train", "test"])
def test_one_split_with_labels_and_one_without(tokenizer, tmp_path, labelled):
    for name in ("train", "test"):
        write_pictures(tmp_path / "images" / name / ("cat" if name == labelled else "."))
    source = {"source": str(tmp_path / "images")}
    with pytest.raises(UserError, match="label_column"):
        encoded_tokens(tmp_path, source)
    assert not (tmp_path / "tokens").exists()
    assert encoded_tokens(tmp_path, {**source, "label_column": None}).class_names == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"image_size": 32}}, r"data.image_size.*\(1, 28, 28\).*\(1, 32, 32\)"),
        ({"data": {"channels": 3}}, r"data.channels.*\(3, 28, 28\)"),
        ({"data": DIGITS, "augmentations": 2}, "augmentations.*data.augment"),
    ],
)
def test_settings_that_do_not_fit(tokenizer, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        encoded_tokens(tmp_path, **options)
    assert not (tmp_path / "tokens").exists()


def test_foreign_out_folder_is_refused_before_anything_is_read(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(encode, "load_images", lambda config: pytest.fail("images were read"))
    with pytest.raises(UserError, match="nothing was overwritten"):
        encoded_tokens(tmp_path)
    assert files_in(tmp_path / "tokens") == ["thesis.tex"]


LAST = "tokens.pieces.shutil"  # the dataset is there, the pieces have yet to go


@needs_digits
@pytest.mark.parametrize("place", ["encode.variants_of", "encode.publish", "tokens.meta.write_json", LAST])
def test_interrupted_encoding_leaves_what_was_there(tokenizer, tmp_path, monkeypatch, place):
    """Nothing that loads, or the older dataset; after the very last step, the new one. The same command ends it."""

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    def interrupted(data):
        monkeypatch.setattr(f"pipelines.{place}", SimpleNamespace(rmtree=interrupt) if place == LAST else interrupt)
        with pytest.raises(KeyboardInterrupt):
            encoded_tokens(tmp_path, data, batch_size=10)
        monkeypatch.undo()

    interrupted(DIGITS)
    if place != LAST:
        with pytest.raises(PathError):
            load_tokens(tmp_path / "tokens")
    assert len(encoded_tokens(tmp_path, batch_size=10).splits["train"]) == LIMIT
    interrupted({**DIGITS, "limit": 10})
    assert len(load_tokens(tmp_path / "tokens").splits["train"]) == (10 if place == LAST else LIMIT)
    assert len(encoded_tokens(tmp_path, {**DIGITS, "limit": 10}, batch_size=10).splits["train"]) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer", "tokens"]


def test_paths_are_taken_as_text_or_path(tmp_path):
    make_dataset().save(str(tmp_path / "tokens"))
    assert len(load_tokens(Path(tmp_path / "tokens")).splits["train"]) == 6
