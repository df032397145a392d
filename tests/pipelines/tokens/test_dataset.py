"""Token datasets: round trips, and invalid tokens and labels (see also tests/project/test_load_errors.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from folders import files_in
from givens.token_datasets import add_columns, edit_split, make_dataset, refused, same_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from small import TOKENIZERS

from pipelines.tokens import TokenDataset, load_tokens
from pipelines.tokens.meta import label_column
from tokenizer.base import smallest_type
from tokenizer.files import PathError, PipelineLoadError


@pytest.mark.sparse
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_saved_dataset_is_loaded_unchanged(name, labelled, tmp_path):
    data = make_dataset(name, labelled)
    data.save(tmp_path / "tokens")
    loaded = load_tokens(str(tmp_path / "tokens"))
    assert loaded.grid == data.grid and loaded.class_names == data.class_names and loaded.augmentations == 1
    assert loaded.source == data.source and loaded.num_classes == (3 if labelled else 0)
    assert loaded.tokenizer.fingerprint() == data.tokenizer.fingerprint()
    assert list(loaded.splits) == ["train", "test"]
    for key, split in data.splits.items():
        assert torch.equal(loaded.splits[key].tokens, split.tokens)
        assert loaded.splits[key].tokens.dtype == smallest_type(data.grid.vocab_size)
        assert same_rows(loaded.splits[key].given, split.given)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 40),
    st.one_of(st.none(), st.integers(1, 50)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(5, 4, 3), (48, 48), (48, 48, 48)]),
)
def test_rows_survive_files_and_tables(tmp_path_factory, rows, rows_per_shard, labelled, others, mapped, levels):
    """With ids of one, two and four bytes, and columns of all kinds."""
    data = make_dataset(labelled=labelled, rows=rows, quantizer={"kind": "fsq", "levels": levels})
    data = add_columns(data, seed=rows) if others else data
    if rows:
        data.splits["train"].tokens[0] = data.grid.vocab_size - 1
    folder = tmp_path_factory.mktemp("round") / "tokens"
    data.save(folder, rows_per_shard)
    loaded = load_tokens(folder, mapped=mapped)
    assert loaded.condition_sources.get("age") == ({"column": "years"} if others else None)
    assert {name: one.fingerprint() for name, one in loaded.condition_tokenizers.items()} == (
        {"outline": data.columns["outline"].tokenizer} if others else {}
    )
    options = {"columns": loaded.columns, "condition_tokenizers": loaded.condition_tokenizers}
    for found in (loaded, TokenDataset.from_datasets(loaded.to_datasets(), loaded.tokenizer, **options)):
        assert found.columns == data.columns and list(found.splits) == list(data.splits)
        for name, split in data.splits.items():
            assert torch.equal(found.splits[name].tokens[:], split.tokens)
            assert found.splits[name].tokens.dtype == split.tokens.dtype
            for some in (slice(None), [-1, 0, 0] if len(split) else []):
                assert same_rows(found.splits[name].given[some], split.given[some])


@pytest.mark.parametrize(
    ("changes", "split", "options", "named"),
    [
        ({}, "a/b", {}, "a/b"),
        ({"columns": label_column(["a\n", "b", "c"])}, "train", {}, "classes"),
        ({"columns": label_column(["cat"])}, "train", {}, r"train: labels.*\[0, 1\)"),
        ({}, "train", {"rows_per_shard": 0}, "rows_per_shard"),
    ],
)
def test_a_dataset_that_could_not_be_loaded_is_not_saved(tmp_path, changes, split, options, named):
    data = make_dataset()
    data = replace(data, **changes, splits={split: data.splits["train"]})
    with pytest.raises(ValueError, match=named):
        data.save(tmp_path / "tokens", **options)
    data = make_dataset()
    data.splits["train"].tokens[3, 0, 1] = 32
    with pytest.raises(ValueError, match=r"\[0, 32\)"):
        data.save(tmp_path / "tokens")
    assert not any(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    make_dataset().save(tmp_path / "tokens")
    return tmp_path / "tokens"


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": torch.zeros(5, 2, 2, dtype=torch.uint8)},
        {"tokens": torch.zeros(6, 2, 2)},
        {"labels": None},
        {"labels": torch.zeros(6)},
        {"labels": torch.tensor([0, 1, 2, 3, 1, 0])},
    ],
)
def test_tokens_and_labels_of_another_form_are_refused(folder, changes):
    edit_split(folder, **changes)
    assert refused(folder, PipelineLoadError, folder / "train.safetensors", next(iter(changes)))


def test_an_older_dataset_is_replaced_and_a_foreign_folder_is_not(folder, tmp_path):
    make_dataset(rows=9).save(folder, rows_per_shard=3)
    assert len(load_tokens(folder).splits["train"]) == 9 and "train.safetensors" not in files_in(folder)
    (folder / "validation.safetensors").write_bytes(b"mine")
    with pytest.raises(PathError, match="validation"):
        make_dataset().save(folder)
    assert (folder / "validation.safetensors").read_bytes() == b"mine"
