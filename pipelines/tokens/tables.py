"""Convert token datasets to tables of `datasets` and back, to filter, mix or inspect rows there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prior.columns import LABEL, Column
from prior.given import Given
from tokenizer import TokenGrid, Tokenizer
from tokenizer.base import smallest_type

from ..columns import format_of, ids_feature
from ..config import UserError, user_errors
from .meta import label_column
from .shards import TokenSplit, chunks

if TYPE_CHECKING:
    import datasets

TOKENS_COLUMN = "tokens"


def to_tables(splits: Mapping[str, TokenSplit], grid: TokenGrid, columns: Mapping[str, Column]) -> datasets.DatasetDict:
    """Convert every split to an in-memory `datasets.Dataset`; splits on the disk are read in chunks."""
    import datasets

    kind = str(smallest_type(grid.vocab_size)).removeprefix("torch.")
    others = {name: format_of(name, column).feature() for name, column in columns.items()}
    features = datasets.Features({TOKENS_COLUMN: ids_feature(grid, kind), **others})

    def table(split: TokenSplit) -> datasets.Dataset:
        parts = [datasets.Dataset.from_dict({name: [] for name in features}, features)]
        for rows in chunks(len(split)):
            given = split.given[rows]
            values = {name: format_of(name, column).to_values(given.raw(name)) for name, column in columns.items()}
            tokens = split.rows(rows).to(smallest_type(grid.vocab_size)).numpy()
            parts.append(datasets.Dataset.from_dict({TOKENS_COLUMN: tokens, **values}, features))
        return datasets.concatenate_datasets(parts)

    return datasets.DatasetDict({name: table(split) for name, split in splits.items()})


def from_tables(
    tables: Mapping[str, Any], tokenizer: Tokenizer, tokens: str, label: str | None, conditions: Mapping[str, Column]
) -> tuple[dict[str, TokenSplit], dict[str, Column]]:
    """Convert tables to splits and all columns, the label among them. Raises `UserError` for missing columns, ids out
    of range, another shape, and labels that are not a `ClassLabel` or differ between tables."""
    if not isinstance(tables, Mapping):
        raise UserError(f"tables must be a mapping of splits to tables (got {type(tables).__name__})")
    names = {split: class_names_of(split, table, label) for split, table in tables.items()}
    if len(set(map(tuple, names.values()))) > 1:
        found = "; ".join(f"{split}: {', '.join(some) or 'none'}" for split, some in names.items())
        raise UserError(f"{label}: splits have different classes ({found})")
    splits, columns = {}, {**label_column(next(iter(names.values()), [])), **conditions}
    for split, table in tables.items():
        if absent := [name for name in (tokens, *conditions) if name not in table.column_names]:
            raise UserError(f"{split}: no column {absent[0]!r}; columns: {', '.join(table.column_names)}")
        rows = dict[str, Tensor]()
        if label and names[split]:
            labels = table.with_format(None)[label][:]
            if bad := [row for row, value in enumerate(labels) if value is None or value < 0]:
                raise UserError(f"{split}: {label}: missing in row {bad[0]}; filter such rows out, or pass label=None")
            rows[LABEL] = torch.tensor(labels, dtype=torch.int64)
        rows |= {name: values_of(split, table, name, column) for name, column in conditions.items()}
        splits[split] = TokenSplit(tokens_of(split, table, tokens, tokenizer.grid), Given(columns, rows, len(table)))
    return splits, columns


def class_names_of(split: str, table: Any, label: str | None) -> list[str]:
    import datasets

    if label is None or label not in table.column_names:
        return []
    feature = table.features[label]
    if not isinstance(feature, datasets.ClassLabel):
        raise UserError(f"{split}: {label} has no class names; use class_encode_column({label!r}), or label=None")
    return list(feature.names)


def tokens_of(split: str, table: Any, column: str, grid: TokenGrid) -> Tensor:
    """Return the tokens of a table, `(n, *grid.shape)` in the smallest type; lists may be flat or nested."""
    parts, plain = [torch.empty(0, *grid.shape, dtype=smallest_type(grid.vocab_size))], table.with_format(None)
    for rows in chunks(len(table)):
        try:
            found = np.asarray(plain[rows][column])
        except ValueError:  # rows differ in length
            found = np.empty((1, 0))
        if not np.issubdtype(found.dtype, np.integer) or found[0].size != len(grid):
            shape = "x".join(map(str, grid.shape))
            raise UserError(f"{split}: {column}: rows must be {shape} whole numbers, like the tokenizer's grid")
        ids = torch.from_numpy(found.astype(np.int64)).reshape(-1, *grid.shape)
        with user_errors(ValueError, prefix=f"{split}: {column}: "):
            grid.check(ids)
        parts.append(ids.to(smallest_type(grid.vocab_size)))
    return torch.cat(parts)


def values_of(split: str, table: Any, name: str, column: Column) -> Tensor:
    """Return the raw values of a condition's column. The classes of a `ClassLabel` are matched by name."""
    import datasets

    feature, found = table.features[name], [column.null(0)]
    for row, value in enumerate(table.with_format(None)[name]):
        if isinstance(feature, datasets.ClassLabel):
            value = None if value is None or value < 0 else feature.int2str(value)
        with user_errors(ValueError, TypeError, prefix=f"{split}: {name}: row {row}: "):
            found.append(column.parse_one(value)[None])
    return torch.cat(found)
