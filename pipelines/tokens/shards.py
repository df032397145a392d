"""The files of a split: safetensors with `tokens` (n, *grid.shape), `labels` (n,) and a tensor `condition.NAME` for
each other column as it is stored (`Column.pack`), written atomically, memory-mapped.

A small split is one file, `train.safetensors`; a larger one has many, `train-00000-of-00016.safetensors` and so on,
with consecutive rows. Reading a row touches only the pages of that row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prior.columns import LABEL, Column
from prior.given import Given
from tokenizer import TokenGrid
from tokenizer.base import smallest_type
from tokenizer.files import FormatError, IntegrityError

from ..files import atomic_file
from ..shuffling import FIXED, Indices, draw_pixels, positions_of

BATCH = 256  # rows encoded at a time by default; shards hold whole batches
BATCHES = 4  # minimum number of batches in a shard
PROCESSES = 16  # processes that can share a small split evenly
ROWS_PER_SHARD = 1 << 12
MAX_SHARDS = 4096  # maximum files of a dataset; a manifest of 1 MiB cannot list more
GREY_VALUES = 256  # in files of stochastic tokens
CHUNK = 1 << 14  # rows in memory at a time when a whole split is read
PREFIX = "condition."  # of the tensors of columns other than the label


def stored_grid(grid: TokenGrid, stochastic: bool) -> TokenGrid:
    """Return the grid of a split's files; of a stochastic one, 256 grey values for each binary digit of an id, along a
    last axis."""
    digits = (grid.vocab_size - 1).bit_length()
    return replace(grid, shape=(*grid.shape, digits), vocab_size=GREY_VALUES) if stochastic else grid


def bytes_per_row(grid: TokenGrid, columns: Mapping[str, Column]) -> int:
    others = [column for name, column in columns.items() if name != LABEL]
    sizes = (math.prod(column.shape) * column.stored_type.itemsize for column in others)
    return len(grid) * smallest_type(grid.vocab_size).itemsize + sum(sizes)


def shard_names(split: str, count: int) -> list[str]:
    if count == 1:
        return [f"{split}.safetensors"]
    return [f"{split}-{k:05d}-of-{count:05d}.safetensors" for k in range(count)]


def cut_shards(rows: Mapping[str, int], rows_per_shard: int | None) -> dict[str, list[int]]:
    """Return the number of rows of each file of each split. rows: the number of rows of each split.

    rows_per_shard None: whole batches of 256, at least four per file; up to 16 files for a small split, and files of
    4,096 rows for a large one, or of more rows to stay below `MAX_SHARDS`. Raises `ValueError` if rows_per_shard is
    below 1 or gives more than `MAX_SHARDS` files."""
    if rows_per_shard is not None and rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1 (got {rows_per_shard})")
    most = max(1, MAX_SHARDS - PROCESSES * len(rows))
    large = max(ROWS_PER_SHARD, -(-sum(rows.values()) // most))
    sizes = {}
    for split, count in rows.items():
        sizes[split] = rows_per_shard or BATCH
        if rows_per_shard is None:
            shards = max(1, min(PROCESSES, count // (BATCHES * BATCH)), -(-count // large))
            sizes[split] = max(1, -(-count // (shards * BATCH))) * BATCH
    if (total := sum(max(1, -(-rows[split] // size)) for split, size in sizes.items())) > MAX_SHARDS:
        raise ValueError(f"rows_per_shard: gives {total} files, the limit is {MAX_SHARDS}; choose a larger number")
    return {
        split: [min(size, rows[split] - start) for start in range(0, max(1, rows[split]), size)]
        for split, size in sizes.items()
    }


def pack_columns(columns: Mapping[str, Column], given: Given, rows: slice) -> dict[str, Tensor]:
    """Return the tensors of some `rows` of all columns for a file. Raises `ValueError`, which names the column."""
    found = {}
    for name, column in columns.items():
        values = given.rows.get(name)
        if values is None:
            raise ValueError(f"conditions: {name}: missing")
        if len(values) != len(given):
            raise ValueError(f"conditions: {name}: {len(values)} rows for {len(given)} images")
        if name == LABEL:
            found["labels"] = values[rows].long().contiguous()
            continue
        try:
            found[PREFIX + name] = column.pack(values[rows])
        except ValueError as error:
            raise ValueError(f"conditions: {name}: {error}") from error
    return found


def write_shard(
    path: Path,
    tokens: Tensor,
    grid: TokenGrid,
    columns: Mapping[str, Tensor],
    remarks: dict[str, str] | None = None,
) -> None:
    """Write a file atomically.

    tokens: `(n, *grid.shape)` of any integer type. columns: from `pack_columns`. remarks: text for the header. Raises
    `ValueError` for ids that do not fit the grid."""
    grid.check(tokens.to(torch.int64))
    tensors = {"tokens": tokens.to(smallest_type(grid.vocab_size)).contiguous(), **columns}
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_bytes(save(tensors, remarks))


def read_shard_header(path: Path) -> tuple[int, dict[str, str]]:
    """Return the number of rows of a file, and the remarks in its header. Raises `FormatError`."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice("tokens").get_shape()[0], file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: missing or not a valid safetensors file ({error})") from error


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return those of the named tensors that a file has, memory-mapped. Raises `FormatError` for an invalid file."""
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            return {name: file.get_tensor(name) for name in names if name in there}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FormatError(f"{path}: missing or not a valid safetensors file ({error})") from error


def map_shard(path: Path, rows: int, grid: TokenGrid, columns: Mapping[str, Column]) -> dict[str, Tensor]:
    """Return the tensors of a file: `tokens` and the stored columns by name, memory-mapped, and `label` in memory.
    Raises `FormatError` for an invalid file, `IntegrityError` for another grid and for labels out of range."""
    others = {PREFIX + name: column for name, column in columns.items() if name != LABEL}
    tensors = read_tensors(path, ["tokens", "labels", *others])
    tokens, labels, classes = tensors.get("tokens"), tensors.pop("labels", None), columns.get(LABEL)
    if tokens is None or tokens.shape[:1] != (rows,) or tokens.dtype != smallest_type(grid.vocab_size):
        raise FormatError(f"{path}: tokens: must hold {rows} rows of {smallest_type(grid.vocab_size)}")
    if tuple(tokens.shape[1:]) != grid.shape:
        raise IntegrityError(f"{path}: tokens: shape {tuple(tokens.shape)}, the grid says (n, *{grid.shape})")
    if labels is not None and (labels.shape != (rows,) or labels.dtype != torch.int64):
        raise FormatError(f"{path}: labels: must be {rows} numbers of type int64, one per row of tokens")
    check_labels(path, labels, classes)
    for name, column in others.items():
        stored, shape, dtype = tensors.get(name), (rows, *column.shape), column.stored_type
        if stored is None or tuple(stored.shape) != shape or stored.dtype != dtype:
            got = "missing" if stored is None else f"{stored.dtype} of shape {tuple(stored.shape)}"
            raise FormatError(f"{path}: {name}: must be {dtype} of shape {shape}, found {got}")
    label = {LABEL: labels.clone()} if labels is not None and classes is not None else {}
    return {**{name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, **label}


def check_labels(path: Path, labels: Tensor | None, classes: Column | None) -> None:
    """Raise `FormatError` for missing labels, `IntegrityError` for labels out of range of `classes`."""
    count = 0 if classes is None else classes.count  # type: ignore[attr-defined]
    if count and labels is None:
        raise FormatError(f"{path}: labels: missing, though there are {count} classes")
    if labels is not None and len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= count):
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise IntegrityError(f"{path}: labels must lie in [0, {count}), got {found}")


def join_columns(
    parts: list[dict[str, Tensor]], columns: Mapping[str, Column], folder: Path, mapped: bool
) -> dict[str, Tensor | MappedRows]:
    """Return the raw rows of all columns of mapped files: labels in memory, others `mapped` or in memory. Raises
    `IntegrityError` for values in memory that are not allowed."""
    found = dict[str, Tensor | MappedRows]()
    for name, column in columns.items():
        shards = [part[name] for part in parts]
        if name == LABEL:
            found[name] = torch.cat(shards)
            continue
        place = f"{folder}: {PREFIX}{name}"
        found[name] = MappedRows(shards if mapped else [torch.cat(shards)], column.unpack, place)
        for rows in () if mapped else chunks(len(found[name])):
            found[name][rows]
    return found


class MappedRows:
    """Rows of a split as they are stored, usually on the disk. They are indexed like a tensor `(n, *shape)`, and read
    and checked on access, because large datasets are not hashed on loading.

    convert: what returns rows for stored ones; it raises `ValueError` for values that are not allowed. place: for
    messages."""

    def __init__(self, shards: list[Tensor], convert: Callable[[Tensor], Tensor], place: Path | str) -> None:
        self.shape, self.dtype = (sum(map(len, shards)), *shards[0].shape[1:]), convert(shards[0][:0]).dtype
        self._shards = [shard.numpy() for shard in shards]  # numpy gathers 16-bit ids ten times as fast as torch
        self._starts = np.cumsum([0, *map(len, shards)])
        self._convert, self._place = convert, place

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Indices) -> Tensor:
        """Return rows `(B, *shape)`. Raises `IndexError`, or `IntegrityError` for values that are not allowed."""
        if isinstance(rows, slice) and rows.indices(len(self))[2] == 1:
            found = self._read_slice(*rows.indices(len(self))[:2])
        else:
            found = self._read_rows(positions_of(rows, len(self)))
        try:
            return self._convert(torch.from_numpy(found))
        except ValueError as error:
            raise IntegrityError(f"{self._place}: {error}; a file was changed after writing") from error

    def _read_slice(self, start: int, stop: int) -> NDArray[Any]:
        pairs = zip(self._shards, self._starts, strict=False)
        here = ((shard, s) for shard, s in pairs if s < stop and start < s + len(shard))
        parts = [shard[max(0, start - s) : max(0, stop - s)] for shard, s in here]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self._shards[0].dtype)

    def _read_rows(self, wanted: NDArray[np.int64]) -> NDArray[Any]:
        if len(self._shards) == 1 or not len(wanted):
            return np.take(self._shards[0], wanted, axis=0)
        found = np.empty((len(wanted), *self.shape[1:]), self._shards[0].dtype)
        which = np.searchsorted(self._starts, wanted, side="right") - 1
        local, order = wanted - self._starts[which], np.argsort(which, kind="stable")
        ends = np.flatnonzero(np.diff(which[order], append=-1)) + 1
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            here = order[start:stop]
            found[here] = self._shards[which[here[0]]][local[here]]
        return found


def check_ids(vocab_size: int, ids: Tensor) -> Tensor:
    if (most := int(ids.numpy().max(initial=0))) >= vocab_size:
        raise ValueError(f"found id {most}, ids must lie in [0, {vocab_size})")
    return ids


@dataclass(frozen=True)
class TokenSplit:
    """The rows of a split: `tokens` (n, *grid.shape) in a small unsigned type, in memory or on the disk, and what else
    is `given` of each.

    stochastic: `tokens` (n, *grid.shape, k) are grey values from 0 to 255: the chances of each of the k binary digits
    of an id, lowest first, to be 1. `rows` samples the ids."""

    tokens: Tensor | MappedRows
    given: Given
    stochastic: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: Indices, epochs: NDArray[np.int64] | int = 0, seed: int = FIXED) -> Tensor:
        """Return the tokens of these rows, `(B, *grid.shape)` int64; stochastic ones are a function of (seed, epoch,
        row). epochs: (B,), or one for all. Raises `IndexError`."""
        if self.stochastic:
            wanted = positions_of(indices, len(self))
            grey = self.tokens[torch.from_numpy(wanted)]
            digits = draw_pixels(grey, wanted, epochs, seed).long()
            return (digits << torch.arange(digits.shape[-1])).sum(-1)
        if isinstance(self.tokens, MappedRows):
            return self.tokens[indices].long()
        wanted = positions_of(indices, len(self))
        if self.tokens.device.type != "cpu":
            return self.tokens[torch.from_numpy(wanted)].long()
        return torch.from_numpy(self.tokens.numpy()[wanted].astype(np.int64))

    def ids(self) -> Tensor | MappedRows:
        """Return the tokens of all rows in a small unsigned type; of stochastic ones, a fixed sample."""
        if not self.stochastic:
            return self.tokens
        kind = smallest_type(1 << self.tokens.shape[-1])
        return torch.cat([self.rows(rows).to(kind) for rows in chunks(len(self))])

    def of_columns(self, columns: Mapping[str, Column]) -> TokenSplit:
        rows = {name: values for name, values in self.given.rows.items() if name in columns}
        return replace(self, given=Given(columns, rows, len(self)))


def chunks(rows: int, size: int = CHUNK) -> Iterator[slice]:
    """Yield slices of at most `size` that cover `rows` rows, to bound memory."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
