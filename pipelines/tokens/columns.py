"""How columns of a condition are stored: a tensor `condition.NAME` in each file of a split, beside `tokens`.

class     int32 (n,); -1 is null
flags     uint8 (n, names) of 0 and 1; 255 is null
number    float32 (n, size); NaN is null
vector    float16 (n, size); NaN is null
grid      the smallest unsigned type that holds `vocab_size`, (n, *grid.shape); `vocab_size` is null
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prior.conditions import Column, FlagsColumn, GridColumn
from tokenizer.files import FormatError

from .shards import MappedRows, chunks, read_tensors, smallest_type

PREFIX = "condition."
NULL_FLAG = 255
TYPES = {"class": torch.int32, "flags": torch.uint8, "number": torch.float32, "vector": torch.float16}


def stored_type(column: Column) -> torch.dtype:
    """Return the type of a column's numbers on the disk."""
    return smallest_type(column.grid.vocab_size + 1) if isinstance(column, GridColumn) else TYPES[column.kind]


def column_bytes(columns: Mapping[str, Column]) -> int:
    """Return the size of a row of all columns on the disk."""
    return sum(column.null(1).numel() * stored_type(column).itemsize for column in columns.values())


def pack_column(column: Column, values: Tensor) -> Tensor:
    """Convert raw values `(n, *shape)` to stored ones. Raises `ValueError` for values that are not allowed."""
    raw = column.check_raw(values)
    if isinstance(column, FlagsColumn):
        raw = raw.nan_to_num(NULL_FLAG)
    elif isinstance(column, GridColumn):
        raw = torch.where(raw < 0, column.grid.vocab_size, raw)
    stored = raw.to(stored_type(column))
    if stored.is_floating_point() and bool(stored.isinf().any()):
        raise ValueError(f"numbers must lie within +-{torch.finfo(stored.dtype).max:g}, the limit of {stored.dtype}")
    return stored.contiguous()


def unpack_column(column: Column, stored: Tensor) -> Tensor:
    """Convert stored values to raw ones. Raises `ValueError` for values that are not allowed."""
    if isinstance(column, FlagsColumn):
        return column.check_raw(torch.where(stored == NULL_FLAG, torch.nan, stored.float()))
    if isinstance(column, GridColumn):
        ids = stored.long()
        return column.check_raw(torch.where(ids == column.grid.vocab_size, -1, ids))
    return column.check_raw(stored)


def pack_columns(
    columns: Mapping[str, Column], values: Mapping[str, Any], rows: slice, count: int
) -> dict[str, Tensor]:
    """Return the tensors of some `rows` of all columns for a file; `values` holds `count` rows. Raises `ValueError`,
    which names the column."""
    if missing := [name for name in columns if name not in values]:
        raise ValueError(f"conditions: {missing[0]}: missing")
    found = {}
    for name, column in columns.items():
        if len(values[name]) != count:
            raise ValueError(f"conditions: {name}: {len(values[name])} rows for {count} images")
        try:
            found[PREFIX + name] = pack_column(column, values[name][rows])
        except ValueError as error:
            raise ValueError(f"conditions: {name}: {error}") from error
    return found


def map_columns(path: Path, rows: int, columns: Mapping[str, Column]) -> dict[str, Tensor]:
    """Return the stored columns of a file, memory-mapped. Raises `FormatError` for missing and ill-typed columns."""
    found = read_tensors(path, [PREFIX + name for name in columns])
    for name, column in columns.items():
        stored, shape, dtype = found.get(PREFIX + name), (rows, *column.shape), stored_type(column)
        if stored is None or tuple(stored.shape) != shape or stored.dtype != dtype:
            got = "missing" if stored is None else f"{stored.dtype} of shape {tuple(stored.shape)}"
            raise FormatError(f"{path}: {PREFIX}{name}: must be {dtype} of shape {shape}, found {got}")
    return {name: found[PREFIX + name] for name in columns}


def open_columns(
    parts: list[dict[str, Tensor]], columns: Mapping[str, Column], folder: Path, mapped: bool
) -> dict[str, MappedRows]:
    """Return the raw columns of mapped files, `mapped` or, as they are stored, in memory. Raises `IntegrityError` for
    values in memory that are not allowed."""
    found = dict[str, MappedRows]()
    for name, column in columns.items():
        shards = [part[name] for part in parts]
        place = f"{folder}: {PREFIX}{name}"
        found[name] = MappedRows(shards if mapped else [torch.cat(shards)], partial(unpack_column, column), place)
        for rows in () if mapped else chunks(len(found[name])):
            found[name][rows]
    return found
