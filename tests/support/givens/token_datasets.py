"""Small token datasets, and checks that damaged ones are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import make_tokenizer

from pipelines.tokens import TokenDataset, TokenSplit, load_tokens
from pipelines.tokens.meta import label_column
from prior.columns import LABEL, AngleColumn, ClassColumn, FlagsColumn, GridColumn, NumberColumn, VectorColumn
from prior.given import Given
from tokenizer.base import smallest_type
from tokenizer.files import PipelineLoadError, write_manifest


def make_split(tokens, columns=None, stochastic=False, **rows):
    """A split with raw rows of columns by name; without `columns`, of `label` as many classes as there are."""
    if columns is None:
        columns = label_column([str(k) for k in range(int(rows[LABEL].max()) + 1)]) if LABEL in rows else {}
    return TokenSplit(tokens, Given(columns, rows, len(tokens)), stochastic)


def make_dataset(name="vqvae", labelled=True, rows=6, seed=0, **config):
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(name, (8, 8), 1, **config).eval()
    grid, columns = tokenizer.grid, label_column(["cat", "dog", "eel"] if labelled else [])

    def split(count):
        tokens = torch.randint(grid.vocab_size, (count, *grid.shape)).to(smallest_type(grid.vocab_size))
        return make_split(tokens, columns, **({LABEL: torch.randint(3, (count,))} if labelled else {}))

    splits = {"train": split(rows), "test": split(2)}
    return TokenDataset(grid, columns, splits, tokenizer, {"data": {"source": "here"}}, 1)


def make_columns(seed=0):
    """A column of each kind, and a tokenizer of 2 x 2 ids, which made the grids of `outline`."""
    torch.manual_seed(seed + 1)
    tokenizer = make_tokenizer("vqvae", (8, 8), 1, quantizer={"kind": "fsq", "levels": (16, 16)}).eval()
    facts = {"mean": [40.0], "std": [9.0], "low": [20.5], "high": [80.0]}
    columns = {
        "view": ClassColumn(names=["front", "side"]),
        "tags": FlagsColumn(names=["hat", "glasses", "beard"]),
        "age": NumberColumn(**facts),
        "place": NumberColumn(**{name: 2 * values for name, values in facts.items()}),
        "wind": AngleColumn(size=2),
        "text": VectorColumn(size=5, encoder="ngrams:5"),
        "outline": GridColumn(grid=tokenizer.grid, tokenizer=tokenizer.fingerprint()),
    }
    return columns, tokenizer


def draw_values(columns, rows):
    """Random raw values, about a fifth of them null; a grid has null cells, too."""
    found = {}
    for name, column in columns.items():
        values = column.draw(rows)
        if column.is_map:
            values[torch.rand(values.shape) < 0.1] = -1
            values[:1] = column.count - 1
        elif column.scales:
            values = torch.randn(values.shape).half().float()
        null = torch.rand(rows) < 0.2
        values[null] = column.null(int(null.sum()))
        found[name] = values
    return found


def add_columns(data, seed=0, only=None):
    """Return the token dataset with a column of each kind, or with `only` some of them."""
    columns, tokenizer = make_columns(seed)
    columns = {name: column for name, column in columns.items() if only is None or name in only}
    every = {**data.columns, **columns}
    splits = {
        name: make_split(split.tokens, every, **split.given.rows, **draw_values(columns, len(split)))
        for name, split in data.splits.items()
    }
    return replace(
        data,
        splits=splits,
        columns=every,
        condition_tokenizers={"outline": tokenizer},
        condition_sources={"age": {"column": "years"}} if "age" in columns else {},
    )


def same_rows(one, other):
    """Whether the same is given of two batches, null where the other is null."""
    return one.names == other.names and all(
        torch.equal(one.raw(name).nan_to_num(-7), other.raw(name).nan_to_num(-7))
        and one.raw(name).dtype == other.raw(name).dtype
        for name in one.names
    )


COLUMNS = ("view", "tags", "age", "text", "outline")
"""The columns of `make_conditioned`, one of each kind."""


def make_conditioned(rows=256, noise=0.05, seed=0, only=COLUMNS):
    """A dataset whose tokens (2 x 2, 32 ids) depend on the label and on all columns: two bits of each token are the
    outline's cell; the others are the label, two flags, the quarter of the age, and view and text."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer("vqvae", (8, 8), 1).eval()
    outlines = make_tokenizer("vqvae", (8, 8), 1, quantizer={"kind": "ema", "codes": 4, "dim": 8}).eval()
    columns = {
        "view": ClassColumn(names=["front", "side"]),
        "tags": FlagsColumn(names=["old", "wet"]),
        "age": NumberColumn(mean=[50.0], std=[28.9], low=[0.0], high=[100.0]),
        "text": VectorColumn(size=3, scale=1.0, encoder="words"),
        "outline": GridColumn(grid=outlines.grid, tokenizer=outlines.fingerprint()),
    }

    def split(count):
        label, view, tags = torch.randint(3, (count,)), torch.randint(2, (count,)), torch.randint(2, (count, 2))
        age, text = 100 * torch.rand(count, 1), torch.randn(count, 3)
        outline = torch.randint(4, (count, 2, 2))
        high = [label, tags[:, 0] + 2 * tags[:, 1], (age[:, 0] // 25).long(), view + 2 * (text[:, 0] > 0)]
        tokens = outline + 4 * torch.stack(high, 1).reshape(count, 2, 2)
        random = torch.randint(32, tokens.shape)
        tokens = torch.where(torch.rand(tokens.shape) < noise, random, tokens).to(smallest_type(32))
        values = {"view": view, "tags": tags.float(), "age": age, "text": text, "outline": outline}
        for name in values:  # a few nulls
            null = torch.rand(count) < 0.02
            values[name][null] = columns[name].null(int(null.sum()))
        return make_split(tokens, chosen, label=label, **{name: values[name] for name in only})

    chosen = label_column(["cat", "dog", "eel"]) | {name: columns[name] for name in only}
    splits = {"train": split(rows), "test": split(128), "validation": split(48)}
    tokenizers = {"outline": outlines} if "outline" in only else {}
    return TokenDataset(
        tokenizer.grid,
        chosen,
        splits,
        tokenizer,
        {"data": {"source": "here"}},
        condition_tokenizers=tokenizers,
    )


def refused(folder, error, *needles, seal=True):
    """Assert that loading raises `error` with all needles in its message."""
    if seal:
        write_manifest(folder)
    with pytest.raises(error) as caught:
        load_tokens(folder)
    assert isinstance(caught.value, PipelineLoadError)
    for needle in needles:
        assert str(needle) in str(caught.value), (needle, str(caught.value))
    return True


def edit_split(folder, **changes):
    """Replace tensors of the training split; None deletes one."""
    tensors = {**load_file(folder / "train.safetensors"), **changes}
    (folder / "train.safetensors").unlink()
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / "train.safetensors")
