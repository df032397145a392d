"""Use with `datasets`: `map` with `pipe.encode`, conversion to tables and back, class names."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from givens.token_datasets import make_dataset
from launch import train_prior
from PIL import Image
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.config import UserError
from pipelines.tokens import TokenDataset, load_tokens

NAMES = ["eel", "cat", "dog"]  # not in sorted order


def pictures(count: int = 9, names: list[str] = NAMES) -> datasets.Dataset:
    """Make a table of PIL images with classes."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict(
        {"image": images, "label": [row % len(names) for row in range(count)]}, features=features
    )


# Dataset.map


@pytest.mark.parametrize("processes", [None, 2])
def test_a_table_of_pictures_is_mapped_to_tokens(processes: int | None) -> None:
    pipe, table = make_pipeline(size=(8, 8), labels=NAMES), pictures()
    mapped = table.map(
        lambda batch: {"tokens": pipe.encode(batch["image"])}, batched=True, batch_size=4, num_proc=processes
    )
    assert np.array_equal(np.array(mapped["tokens"][:]), pipe.encode(table["image"][:]).numpy())
    assert mapped.features["label"].names == NAMES and mapped.column_names == ["image", "label", "tokens"]


def test_a_map_is_found_in_the_cache_again() -> None:
    """`datasets` hashes a pipeline: use does not change the hash, and another pipeline has another hash."""
    torch.manual_seed(0)
    pipe = make_pipeline(size=(8, 8))
    before = Hasher.hash(pipe.encode)
    pipe.encode(pictures()["image"][:])
    assert Hasher.hash(pipe.encode) == before != Hasher.hash(make_pipeline(size=(8, 8)).encode)


def test_mapped_tables_become_a_token_dataset_on_which_a_prior_trains(tmp_path: Path) -> None:
    pipe = make_pipeline(size=(8, 8), labels=NAMES)
    tables = datasets.DatasetDict({"train": pictures(), "test": pictures(6)})
    mapped = tables.map(lambda batch: {"tokens": pipe.encode(batch["image"])}, batched=True)
    TokenDataset.from_datasets(mapped, pipe.tokenizer).save(tmp_path / "tokens")
    made = load_tokens(tmp_path / "tokens")
    assert made.class_names == NAMES and torch.equal(made.splits["test"].given.raw("label"), torch.arange(6) % 3)
    assert torch.equal(made.splits["train"].tokens[:].long(), pipe.encode(tables["train"]["image"][:]))
    run = train_prior(tmp_path / "run", tmp_path / "tokens", train__steps=1, train__batch_size=4)
    assert ImagePipeline.from_pretrained(run / "pipeline").labels == NAMES


# Token datasets as tables


@pytest.mark.sparse
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("kind", "dtype"), [("titok", "uint8"), ("fsq", "uint16"), ("frame_by_frame", "uint8")])
def test_tables_have_typed_columns(labelled: bool, kind: str, dtype: str) -> None:
    """Round trips of rows are tested in test_dataset.py."""
    wide = {"quantizer": {"kind": "fsq", "levels": (48, 48)}}
    data = make_dataset("vqvae", labelled, **wide) if kind == "fsq" else make_dataset(kind, labelled)
    tables = data.to_datasets()
    assert list(tables) == ["train", "test"] and tables["train"].num_rows == 6
    feature = tables["train"].features["tokens"]
    if len(data.grid.shape) > 1:
        array = datasets.Array2D if len(data.grid.shape) == 2 else datasets.Array3D
        assert isinstance(feature, array) and (feature.shape, feature.dtype) == (data.grid.shape, dtype)
    else:
        assert (feature.length, feature.feature.dtype) == (len(data.grid), dtype)
    assert tables["train"].column_names == (["tokens", "label"] if labelled else ["tokens"])
    if labelled:
        assert tables["train"].features["label"].names == data.class_names
    in_torch = tables.with_format("torch")
    assert torch.equal(in_torch["train"][3]["tokens"], data.splits["train"].tokens[3].long())
    back = TokenDataset.from_datasets(in_torch, data.tokenizer)
    assert torch.equal(back.splits["train"].tokens, data.splits["train"].tokens)


def refusal(table: datasets.Dataset) -> str:
    """Return the error for a table that cannot be a split."""
    data = make_dataset()
    with pytest.raises(UserError) as caught:
        TokenDataset.from_datasets({"train": table, "test": data.to_datasets()["test"]}, data.tokenizer)
    return str(caught.value)


def test_tables_that_do_not_fit_the_tokenizer_are_refused_in_a_line() -> None:
    table = make_dataset().to_datasets()["train"]
    rows, label = table.with_format(None), table.features["label"]
    large = rows.map(lambda row: {"tokens": [[99, 0], [0, 0]]}, features=None, remove_columns=["tokens"])
    missing = rows.map(lambda row, at: {"label": None if at == 2 else row["label"]}, with_indices=True)
    cases = {
        r"train: tokens: .*\[0, 32\)": large.cast_column("label", label),
        "train: .*'tokens'.*ids, label": table.rename_column("tokens", "ids"),
        r"train: label .*class_encode_column\('label'\)": table.cast_column("label", datasets.Value("int64")),
        "label: .*a, b, c.*cat, dog, eel": table.cast_column("label", datasets.ClassLabel(names=["a", "b", "c"])),
        "train: label: .*row 2": missing,
    }
    short = datasets.Dataset.from_dict({"tokens": [[1, 2]] * 6, "label": table["label"][:]})
    assert re.match("train: tokens: .*2x2", refusal(short.cast_column("label", label)))
    for pattern, wrong in cases.items():
        assert re.match(pattern, refusal(wrong)) and "\n" not in refusal(wrong), pattern
