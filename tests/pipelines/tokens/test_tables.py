"""Habits of `datasets`: `map` with `pipe.encode`, token datasets as tables and back, and names of classes."""

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

from pipelines import ImagePipeline, encode
from pipelines.config import UserError
from pipelines.tokens import TokenDataset, load_tokens

NAMES = ["eel", "cat", "dog"]  # in no order that sorting would give


def pictures(count: int = 9, names: list[str] = NAMES) -> datasets.Dataset:
    """A table of PIL images and their classes."""
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
    """Which asks that a pipeline, used or not, is the same to `datasets`; and another pipeline is not."""
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
    assert made.class_names == NAMES and torch.equal(made.splits["test"].labels, torch.arange(6) % 3)
    assert torch.equal(made.splits["train"].tokens[:].long(), pipe.encode(tables["train"]["image"][:]))
    run = train_prior(tmp_path / "run", tmp_path / "tokens", train__steps=1, train__batch_size=4)
    assert ImagePipeline.from_pretrained(run / "pipeline").labels == NAMES


# Token datasets as tables


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("vqvae", {}),
        ("vqvae", {"quantizer": {"kind": "fsq", "levels": (48, 48)}}),
        ("vqvae", {"quantizer": {"kind": "fsq", "levels": (48, 48, 48)}}),
        ("titok", {}),
    ],
)
def test_a_token_dataset_becomes_tables_and_comes_back(labelled: bool, kind: str, config: dict) -> None:
    """Ids of one, two and four bytes, on grids and in a row."""
    data = make_dataset(kind, labelled, **config)
    tables = data.to_datasets()
    assert list(tables) == ["train", "test"] and tables["train"].num_rows == 6
    feature = tables["train"].features["tokens"]
    kinds = {"uint8": 1 << 8, "uint16": 1 << 16, "uint32": 1 << 32}
    wanted = next(name for name, limit in kinds.items() if data.grid.vocab_size <= limit)
    if len(data.grid.shape) == 2:
        assert isinstance(feature, datasets.Array2D) and (feature.shape, feature.dtype) == (data.grid.shape, wanted)
    else:
        assert (feature.length, feature.feature.dtype) == (len(data.grid), wanted)
    assert tables["train"].column_names == (["tokens", "label"] if labelled else ["tokens"])
    if labelled:
        assert tables["train"].features["label"].names == data.class_names
    for tables in (data.to_datasets(), data.to_datasets().with_format("torch")):
        back = TokenDataset.from_datasets(tables, data.tokenizer)
        assert back.class_names == data.class_names and back.grid == data.grid
        for name, split in data.splits.items():
            found = back.splits[name]
            assert found.tokens.dtype == split.tokens.dtype and torch.equal(found.tokens, split.tokens)
            assert (found.labels is None) == (split.labels is None)
            assert split.labels is None or torch.equal(found.labels, split.labels)


def test_a_table_in_torchs_format_has_the_shape_of_the_grid() -> None:
    data = make_dataset()
    row = data.to_datasets()["train"].with_format("torch")[3]
    assert torch.equal(row["tokens"], data.splits["train"].tokens[3].long()) and row["label"].ndim == 0


def test_a_split_on_the_disk_is_read_a_part_at_a_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.tokens.tables.chunks", lambda rows: [slice(0, 4), slice(4, rows)])
    data = make_dataset()
    data.save(tmp_path / "tokens", rows_per_shard=5)
    found = load_tokens(tmp_path / "tokens", mapped=True).to_datasets()["train"].with_format("numpy")["tokens"][:]
    assert np.array_equal(found, data.splits["train"].tokens.numpy())


def refusal(table: datasets.Dataset) -> str:
    """What is said of a table that is no split of a token dataset."""
    data = make_dataset()
    with pytest.raises(UserError) as caught:
        TokenDataset.from_datasets({"train": table, "test": data.to_datasets()["test"]}, data.tokenizer)
    return str(caught.value)


def test_tables_that_are_not_the_tokenizers_are_refused_in_a_line() -> None:
    table = make_dataset().to_datasets()["train"]
    rows, label = table.with_format(None), table.features["label"]
    large = rows.map(lambda row: {"tokens": [[99, 0], [0, 0]]}, features=None, remove_columns=["tokens"])
    missing = rows.map(lambda row, at: {"label": None if at == 2 else row["label"]}, with_indices=True)
    cases = {
        r"train: tokens: token ids should lie in \[0, 32\).*": large.cast_column("label", label),
        "train: no column is called 'tokens'; there are ids, label": table.rename_column("tokens", "ids"),
        r"train: label has no names of classes \(Value\); make a ClassLabel .*class_encode_column\('label'\).*": (
            table.cast_column("label", datasets.Value("int64"))
        ),
        r"label: splits have other classes than each other \(train: a, b, c; test: cat, dog, eel\)": (
            table.cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
        ),
        "train: label: row 2 has none.*": missing,
    }
    for told, wrong in cases.items():
        assert re.fullmatch(told, refusal(wrong)), told
    for ids in ([[1, 2]] * 6, [[1, 2], [3]] * 3, [[0.5] * 4] * 6):
        short = datasets.Dataset.from_dict({"tokens": ids, "label": table["label"][:]}).cast_column("label", label)
        assert re.fullmatch("train: tokens: rows should be 2x2 whole numbers.*", refusal(short))


# Names of classes, from `datasets` to a pipeline


def test_a_table_without_its_split_is_refused_in_a_line() -> None:
    data = make_dataset()
    with pytest.raises(UserError, match=r"^tables should be one for each split, .* \(got Dataset\)$"):
        TokenDataset.from_datasets(data.to_datasets()["train"], data.tokenizer)


def test_names_of_classes_go_from_datasets_to_the_pipeline(tmp_path: Path) -> None:
    for split, count in (("train", 12), ("test", 6)):
        pictures(count).to_parquet(tmp_path / "images" / f"{split}-00000-of-00001.parquet")
    make_pipeline(size=(8, 8)).tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = [f"data.source={tmp_path}/images", "data.image_size=8", "data.channels=1", "data.validation_fraction=0"]
    encode.main([f"tokenizer={tmp_path}/tokenizer", f"out={tmp_path}/tokens", *data])
    tokens = load_tokens(tmp_path / "tokens")
    assert tokens.class_names == NAMES and tokens.to_datasets()["train"].features["label"].names == NAMES
    run = train_prior(tmp_path / "run", tmp_path / "tokens", train__steps=1, train__batch_size=4)
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    assert pipe.labels == NAMES
    assert torch.equal(pipe(1, labels="eel", seed=0).tokens, pipe(1, labels=0, seed=0).tokens)
