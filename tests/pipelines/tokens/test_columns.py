"""Columns of token datasets: how they are stored, damage, and hostile descriptions.

Covers: pipelines/tokens/meta.py, pipelines/tokens/shards.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from folders import files_in
from givens.token_datasets import add_columns, edit_split, make_columns, make_dataset, refused
from small import make_tokenizer

from pipelines.commands.verify import VerifyConfig
from pipelines.commands.verify import run as verify
from pipelines.config import UserError
from pipelines.tokens import TokenDataset, load_tokens
from pipelines.tokens.meta import META
from prior.columns import GridColumn
from tokenizer.files import FormatError, IntegrityError, PathError, PipelineLoadError, write_manifest

# Files and tables


def test_natural_types_of_tables(tmp_path):
    data = add_columns(make_dataset(rows=20))
    table = data.to_datasets()["train"]
    given, rows = data.splits["train"].given, table[:]
    assert table.features["view"].names == ["front", "side"]
    for row in range(20):
        view, tags, age = given.raw("view")[row], given.raw("tags")[row], given.raw("age")[row, 0]
        names = [name for name, flag in zip(data.columns["tags"].names, tags, strict=True) if flag == 1]
        assert rows["tags"][row] == (None if tags.isnan().any() else names)
        assert rows["age"][row] == (None if age.isnan() else float(age))
        assert rows["view"][row] == (None if view < 0 else view)
    assert None in rows["tags"] and None in rows["age"] and None in rows["view"] and rows["outline"] is not None
    other = table.cast_column("view", table.features["view"].__class__(names=["back", "front", "side"]))
    with pytest.raises(UserError, match=r"^train: view: row \d+: 'back' is not a class.*front, side"):
        TokenDataset.from_datasets({"train": other}, data.tokenizer, columns={"view": data.columns["view"]})
    with pytest.raises(UserError, match=r"^train: no column 'size'"):
        TokenDataset.from_datasets({"train": table}, data.tokenizer, columns={"size": data.columns["age"]})


def test_a_tokenizer_that_is_the_images_own_is_not_saved_twice(tmp_path):
    data = make_dataset()
    own = GridColumn(grid=data.grid, tokenizer=data.tokenizer.fingerprint())
    other, tokenizer = make_columns()
    columns = {"before": own, "outline": other["outline"]}
    for name, split in data.splits.items():
        nulls = {name: column.null(len(split)) for name, column in columns.items()}
        data.splits[name] = replace(split, given=split.given.with_rows(**nulls))
    columns, tokenizers = {**data.columns, **columns}, {"before": data.tokenizer, "outline": tokenizer}
    replace(data, columns=columns, condition_tokenizers=tokenizers).save(tmp_path / "tokens")
    inside = [name for name in files_in(tmp_path / "tokens") if name.startswith("conditions/")]
    assert inside == ["conditions/outline/config.json", "conditions/outline/model.safetensors"]
    loaded = load_tokens(tmp_path / "tokens")
    assert loaded.condition_tokenizers["before"] is loaded.tokenizer and list(loaded.condition_tokenizers) == [
        *tokenizers
    ]


# Refusals


@pytest.fixture
def folder(tmp_path):
    add_columns(make_dataset()).save(tmp_path / "tokens")
    return tmp_path / "tokens"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("view", None),
        ("view", torch.full((6,), 2, dtype=torch.int32)),
        ("age", torch.zeros(6)),
        ("outline", torch.tensor(1, dtype=torch.uint16)),
    ],
)
def test_columns_of_another_form_are_refused(folder, name, values):
    """In memory on loading; on the disk the form on loading and the values when they are read. Values of other kinds
    are in tests/prior/test_columns.py."""
    edit_split(folder, **{f"condition.{name}": values})
    assert refused(folder, PipelineLoadError, folder, f"condition.{name}")
    with pytest.raises(PipelineLoadError, match=f"condition.{name}"):
        load_tokens(folder, mapped=True).splits["train"].given[:]
    with pytest.raises(PipelineLoadError, match=f"condition.{name}"):
        verify(VerifyConfig(folder=str(folder)))


NUMBER = {"kind": "number", "mean": [0.0], "std": [1.0], "low": [0.0], "high": [1.0]}
HOSTILE = {
    "many": {f"c{k}": NUMBER for k in range(1000)},
    "another column's name": {"tokens": NUMBER},
    "a name that moves the cursor": {"age": {"kind": "class", "names": ["a", "\x1b[2J"]}},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_columns_are_refused(folder, what):
    edit_meta(folder, conditions=HOSTILE[what])
    assert refused(folder, FormatError, folder / META, "conditions", "age" if "age" in HOSTILE[what] else "")


def edit_meta(folder, **changes):
    (folder / META).write_text(json.dumps({**json.loads((folder / META).read_text()), **changes}))


def test_a_grid_of_another_tokenizer_is_refused(folder):
    torch.manual_seed(9)
    place, column = folder / "conditions" / "outline", json.loads((folder / META).read_text())["conditions"]["outline"]
    for size, levels in ((8, (16, 16)), (16, (16, 16))):
        model = make_tokenizer("vqvae", (size, size), 1, quantizer={"kind": "fsq", "levels": levels}).eval()
        model.save_pretrained(place)
        assert refused(folder, IntegrityError, place, "fingerprint")
        conditions = {"outline": {**column, "tokenizer": model.fingerprint()}}
        edit_meta(folder, conditions=conditions)
        (folder / "frequencies.json").unlink(missing_ok=True)  # of other columns
        if size == 8:
            write_manifest(folder)
            load_tokens(folder)
        else:
            assert refused(folder, IntegrityError, place, "grid", "outline")
    for name in ("config.json", "model.safetensors"):
        (place / name).unlink()
    assert refused(folder, PathError, place)
