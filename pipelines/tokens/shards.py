"""The files of a split: safetensors with `tokens` (n, *grid.shape) and `labels` (n,), written atomically,
memory-mapped.

A small split is one file, `train.safetensors`; a larger one has many, `train-00000-of-00016.safetensors` and so on,
with consecutive rows. Reading a row touches only the pages of that row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prior.conditions import Condition
from tokenizer import TokenGrid
from tokenizer.files import FormatError, IntegrityError

from ..files import atomic_file
from ..shuffling import FIXED, draw_pixels, positions_of

BATCH = 256  # rows encoded at a time by default; shards hold whole batches
BATCHES = 4  # minimum number of batches in a shard
PROCESSES = 16  # processes that can share a small split evenly
ROWS_PER_SHARD = 1 << 12
MAX_SHARDS = 4096  # maximum files of a dataset; a manifest of 1 MiB cannot list more
GREY_VALUES = 256  # what files hold of tokens that are drawn on access
CHUNK = 1 << 14  # rows in memory at a time when a whole split is read

Indices = NDArray[np.int64] | Tensor | slice | list[int]


def stored_grid(grid: TokenGrid, drawn: bool) -> TokenGrid:
    """Return the grid of a split's files. If its tokens are drawn, these are 256 grey values in place of each binary
    digit of an id, along a last axis."""
    digits = (grid.vocab_size - 1).bit_length()
    return replace(grid, shape=(*grid.shape, digits), vocab_size=GREY_VALUES) if drawn else grid


def bytes_per_row(grid: TokenGrid) -> int:
    """Return the size of an image's tokens on the disk."""
    return len(grid) * smallest_type(grid.vocab_size).itemsize


def shard_names(split: str, count: int) -> list[str]:
    """Return the file names of a split, in the order of rows."""
    if count == 1:
        return [f"{split}.safetensors"]
    return [f"{split}-{k:05d}-of-{count:05d}.safetensors" for k in range(count)]


def cut_shards(rows: Mapping[str, int], rows_per_shard: int | None) -> dict[str, list[int]]:
    """Return the number of rows of each file of each split. rows: the number of rows of each split.

    rows_per_shard None: whole batches of 256, at least four per file; up to 16 files for a small split, and files of
    4,096 rows for a large one, or of more rows to stay below `MAX_SHARDS`. Raises `ValueError` if rows_per_shard is
    below 1 or gives more than `MAX_SHARDS` files.
    """
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


def write_shard(
    path: Path, tokens: Tensor, labels: Tensor | None, grid: TokenGrid, columns: Mapping[str, Tensor] | None = None
) -> None:
    """Write a file atomically.

    tokens: `(n, *grid.shape)` of any integer type. columns: from `columns.pack_columns`. Raises `ValueError` for ids
    that do not fit the grid.
    """
    grid.check(tokens.to(torch.int64))
    tensors = {"tokens": tokens.to(smallest_type(grid.vocab_size)).contiguous(), **(columns or {})}
    if labels is not None:
        tensors["labels"] = labels.long().contiguous()
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_bytes(save(tensors))


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return those of the named tensors that a file has, memory-mapped. Raises `FormatError` for an invalid file."""
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            return {name: file.get_tensor(name) for name in names if name in there}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FormatError(f"{path}: missing or not a valid safetensors file ({error})") from error


def map_shard(path: Path, rows: int, grid: TokenGrid) -> tuple[Tensor, Tensor | None]:
    """Return the tokens of a file, memory-mapped, and its labels, in memory.

    safetensors checks that the header accounts for every byte before it maps a file, so a truncated file raises an
    error instead of a SIGBUS. Raises `FormatError` for an invalid file, `IntegrityError` for another grid."""
    tensors = read_tensors(path, ["tokens", "labels"])
    tokens, labels = tensors.get("tokens"), tensors.get("labels")
    if tokens is None or tokens.shape[:1] != (rows,) or tokens.dtype != smallest_type(grid.vocab_size):
        raise FormatError(f"{path}: tokens: must hold {rows} rows of {smallest_type(grid.vocab_size)}")
    if tuple(tokens.shape[1:]) != grid.shape:
        raise IntegrityError(f"{path}: tokens: shape {tuple(tokens.shape)}, the grid says (n, *{grid.shape})")
    if labels is not None and (labels.shape != (rows,) or labels.dtype != torch.int64):
        raise FormatError(f"{path}: labels: must be {rows} numbers of type int64, one per row of tokens")
    return tokens, None if labels is None else labels.clone()


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
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            found = self._read_slice(start, stop) if step == 1 else self._read_rows(positions_of(rows, len(self)))
        else:
            found = self._read_rows(positions_of(rows, len(self)))
        try:
            return self._convert(torch.from_numpy(found))
        except ValueError as error:
            raise IntegrityError(f"{self._place}: {error}; a file was changed after writing") from error

    def _read_slice(self, start: int, stop: int) -> NDArray[Any]:
        pairs = zip(self._shards, self._starts, strict=False)
        parts = [
            shard[max(0, start - s) : max(0, stop - s)] for shard, s in pairs if s < stop and start < s + len(shard)
        ]
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
    """Return ids as they are. Raises `ValueError` for an id out of range."""
    most = int(ids.numpy().max(initial=0))
    if most >= vocab_size:
        raise ValueError(f"found id {most}, ids must lie in [0, {vocab_size})")
    return ids


@dataclass(frozen=True)
class TokenSplit:
    """The rows of a split: `tokens` (n, *grid.shape) in a small unsigned type, in memory or on the disk; `labels` (n,)
    int64, or None; `conditions`: raw columns by name (see `prior.conditions`).

    drawn: `tokens` (n, *grid.shape, k) are grey values from 0 to 255: the chances of each of the k binary digits of an
    id, lowest first, to be 1. `rows` draws the ids."""

    tokens: Tensor | MappedRows
    labels: Tensor | None
    conditions: Mapping[str, Tensor | MappedRows] = field(default_factory=dict)
    drawn: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: Indices, epochs: NDArray[np.int64] | int = 0, seed: int = FIXED) -> Tensor:
        """Return the tokens of these rows, `(B, *grid.shape)` int64; if they are drawn, a function of (seed, epoch,
        row). epochs: (B,), or one for all. Raises `IndexError`."""
        if self.drawn:
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
        """Return the tokens of all rows in a small unsigned type; if they are drawn, one fixed draw."""
        if not self.drawn:
            return self.tokens
        kind = smallest_type(1 << self.tokens.shape[-1])
        return torch.cat([self.rows(rows).to(kind) for rows in chunks(len(self))])

    def condition(self, indices: Indices) -> Condition:
        """Return the raw columns of these rows, as int64 or float32. Raises `IndexError`."""
        wanted = torch.from_numpy(positions_of(indices, len(self)))
        found = {}
        for name, values in self.conditions.items():
            rows = values[wanted]
            found[name] = rows.float() if rows.is_floating_point() else rows.long()
        return found


def chunks(rows: int, size: int = CHUNK) -> Iterator[slice]:
    """Yield slices of at most `size` that cover `rows` rows, to bound memory."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
