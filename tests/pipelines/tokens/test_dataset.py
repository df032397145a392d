"""Token datasets: what is written comes back, and what is damaged is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from folders import files_in
from givens.token_datasets import edit_split, make_dataset, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small import TOKENIZERS

from pipelines.tokens import TokenDataset, TokenSplit, load_tokens
from pipelines.tokens.shards import smallest_type
from tokenizer.files import FormatError, IntegrityError, PathError

META = "meta.json"


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


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 40),
    st.one_of(st.none(), st.integers(1, 50)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(5, 4, 3), (48, 48), (48, 48, 48)]),
)
def test_rows_come_back_from_files_and_from_tables(tmp_path_factory, rows, rows_per_shard, labelled, mapped, levels):
    """Ids of one, two and four bytes."""
    data = make_dataset(labelled=labelled, rows=rows, quantizer={"kind": "fsq", "levels": levels})
    folder = tmp_path_factory.mktemp("round") / "tokens"
    data.save(folder, rows_per_shard)
    loaded = load_tokens(folder, mapped=mapped)
    for found in (loaded, TokenDataset.from_datasets(loaded.to_datasets(), loaded.tokenizer)):
        assert found.class_names == data.class_names and list(found.splits) == list(data.splits)
        for name, split in data.splits.items():
            assert torch.equal(found.splits[name].tokens[:], split.tokens)
            assert found.splits[name].tokens.dtype == split.tokens.dtype
            labels = found.splits[name].labels
            assert torch.equal(labels, split.labels) if labelled else labels is None


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
    assert not any(tmp_path.iterdir())


# Damage


@pytest.fixture
def folder(tmp_path):
    make_dataset().save(tmp_path / "tokens")
    return tmp_path / "tokens"


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
