"""A token dataset as tables of `datasets`, and back: for those who filter, mix or inspect rows there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokenizer import TokenGrid, Tokenizer

from ..config import UserError
from .shards import TokenSplit, chunks, smallest_type

if TYPE_CHECKING:
    import datasets

TOKENS, LABEL = "tokens", "label"


def table_features(grid: TokenGrid, class_names: list[str]) -> datasets.Features:
    """The columns: `tokens`, small unsigned numbers of the grid's shape, and `label`, where there are classes."""
    import datasets

    kind = str(smallest_type(grid.vocab_size)).removeprefix("torch.")
    row = datasets.List(datasets.Value(kind), length=grid.shape[0])
    tokens = datasets.Array2D(shape=grid.shape, dtype=kind) if len(grid.shape) == 2 else row
    return datasets.Features(
        {TOKENS: tokens, **({LABEL: datasets.ClassLabel(names=class_names)} if class_names else {})}
    )


def to_tables(splits: Mapping[str, TokenSplit], grid: TokenGrid, class_names: list[str]) -> datasets.DatasetDict:
    """Every split as a `datasets.Dataset`, in memory; one on the disk is read a part at a time."""
    import datasets

    features = table_features(grid, class_names)

    def table(split: TokenSplit) -> datasets.Dataset:
        parts = [datasets.Dataset.from_dict({name: [] for name in features}, features)]
        for rows in chunks(len(split)):
            columns: dict[str, Any] = {TOKENS: split.tokens[rows].to(smallest_type(grid.vocab_size)).numpy()}
            if class_names and split.labels is not None:
                columns[LABEL] = split.labels[rows].numpy()
            parts.append(datasets.Dataset.from_dict(columns, features))
        return datasets.concatenate_datasets(parts)

    return datasets.DatasetDict({name: table(split) for name, split in splits.items()})


def from_tables(
    tables: Mapping[str, Any], tokenizer: Tokenizer, tokens: str, label: str | None
) -> tuple[dict[str, TokenSplit], list[str]]:
    """The splits of tables, and the names of their classes. Raises `UserError` for missing columns, ids that the
    tokenizer does not have, another shape, and labels that are not a `ClassLabel` or not the same in all."""
    if not isinstance(tables, Mapping):
        raise UserError(
            f"tables should be one for each split, {{'train': ..., 'test': ...}} (got {type(tables).__name__})"
        )
    names = {split: class_names_of(split, table, label) for split, table in tables.items()}
    if len(set(map(tuple, names.values()))) > 1:
        found = "; ".join(f"{split}: {', '.join(some) or 'none'}" for split, some in names.items())
        raise UserError(f"{label}: splits have other classes than each other ({found})")
    splits = {}
    for split, table in tables.items():
        if tokens not in table.column_names:
            raise UserError(f"{split}: no column is called {tokens!r}; there are {', '.join(table.column_names)}")
        labels = labels_of(split, table, label) if label and names[split] else None
        splits[split] = TokenSplit(tokens_of(split, table, tokens, tokenizer.grid), labels)
    return splits, next(iter(names.values()), [])


def class_names_of(split: str, table: Any, label: str | None) -> list[str]:
    """The names of a table's classes; none where it has no such column."""
    import datasets

    if label is None or label not in table.column_names:
        return []
    feature = table.features[label]
    if not isinstance(feature, datasets.ClassLabel):
        raise UserError(
            f"{split}: {label} has no names of classes ({type(feature).__name__}); make a ClassLabel of it by "
            f"class_encode_column({label!r}), or pass label=None"
        )
    return list(feature.names)


def labels_of(split: str, table: Any, label: str) -> Tensor:
    """The labels of a table, `(n,)` int64."""
    values = table.with_format(None)[label][:]
    if bad := [row for row, value in enumerate(values) if value is None or value < 0]:
        raise UserError(f"{split}: {label}: row {bad[0]} has none; filter such rows out, or pass label=None")
    return torch.tensor(values, dtype=torch.int64)


def tokens_of(split: str, table: Any, column: str, grid: TokenGrid) -> Tensor:
    """The tokens of a table, `(n, *grid.shape)` in the smallest type; its lists may be flat or nested."""
    parts, plain = [torch.empty(0, *grid.shape, dtype=smallest_type(grid.vocab_size))], table.with_format(None)
    for rows in chunks(len(table)):
        try:
            found = np.asarray(plain[rows][column])
        except ValueError:  # rows of several lengths
            found = np.empty((1, 0))
        if not np.issubdtype(found.dtype, np.integer) or found[0].size != len(grid):
            shape = "x".join(map(str, grid.shape))
            raise UserError(f"{split}: {column}: rows should be {shape} whole numbers, as the tokenizer makes them")
        ids = torch.from_numpy(found.astype(np.int64)).reshape(-1, *grid.shape)
        try:
            grid.check(ids)
        except ValueError as error:
            raise UserError(f"{split}: {column}: {error}") from error
        parts.append(ids.to(smallest_type(grid.vocab_size)))
    return torch.cat(parts)
