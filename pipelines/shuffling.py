"""The order of training rows and the random numbers of each row, as functions of (seed, epoch, row).

Nothing here depends on the batch or on the number of processes. Small data sets are shuffled by a stored permutation.
Drawing a permutation of 12.8 million rows would take most of a second and 100 MB in every epoch, so large data sets use
a computed permutation, which gives the row at any position independently. It is Black and Rogaway's generalised Feistel
network (2002, "Ciphers with arbitrary finite domains"): positions are pairs (left, right) below `a x b`, each half in
turn is shifted by a hash of the other, and results beyond the last row are enciphered again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Random numbers -----------------------------------------------------------------------------------

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
DRAWS = 5  # flip, shift down, shift right, rotation, zoom


def uniforms(
    seed: int, epoch: int, indices: NDArray[np.int64], columns: Sequence[int] = range(DRAWS)
) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), (B, 5) or only `columns`, that depend only on (seed, epoch, index)."""
    key = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    key = splitmix64(key ^ np.uint64(epoch % 2**64))
    key = splitmix64(key ^ indices.astype(np.uint64))
    bits = splitmix64(key[:, None] + np.array(columns, dtype=np.uint64) * GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash every element of an array: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = state + GOLDEN
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)  # in place, without temporary arrays
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


# The order of rows ---------------------------------------------------------------------------------

ROUNDS = 8

Positions = NDArray[np.int64]


def permute(positions: Positions, rows: int, *key: int) -> Positions:
    """Return the rows at `positions`, both `(B,)`, of a permutation of `range(rows)` that depends only on `key`."""
    a = math.isqrt(max(0, rows - 1)) + 1
    b = -(-rows // a)
    state = np.array([0], dtype=np.uint64)
    for part in key:
        state = splitmix64(state ^ np.uint64(part % 2**64))
    keys = splitmix64(state + np.arange(ROUNDS).astype(np.uint64))
    found = _encipher(positions, a, b, keys)
    while len(outside := np.flatnonzero(found >= rows)):  # at most `a` of `a x b` pairs
        found[outside] = _encipher(found[outside], a, b, keys)
    return found


def _encipher(positions: Positions, a: int, b: int, keys: NDArray[np.uint64]) -> Positions:
    left, right = (half.astype(np.uint64) for half in np.divmod(positions, b))
    for turn, key in enumerate(keys):
        if turn % 2:
            right = _shift_half(right, left ^ key, b)
        else:
            left = _shift_half(left, right ^ key, a)
    return (left * np.uint64(b) + right).astype(np.int64)


def _shift_half(half: NDArray[np.uint64], other: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """Return `half` plus a hash of the other, modulo `size` < 2^32."""
    shift = np.uint64(32)
    sums = half + (((splitmix64(other) >> shift) * np.uint64(size)) >> shift)
    return np.where(sums >= size, sums - np.uint64(size), sums)


def permute_blocks(positions: Positions, rows: int, block: int, *key: int) -> Positions:
    """Like `permute`, for slow disks: put blocks of `block` consecutive rows in random order, and shuffle rows
    within each window of `block` blocks. Whole blocks are read, and `block`^2 rows are needed at a time.
    """
    blocks = -(-rows // block)
    found = _permute_in_blocks(positions, blocks, block, key)
    while len(outside := np.flatnonzero(found >= rows)):  # beyond the end of the last block
        found[outside] = _permute_in_blocks(found[outside], blocks, block, key)
    return found


def _permute_in_blocks(positions: Positions, blocks: int, block: int, key: tuple[int, ...]) -> Positions:
    window = block * block
    windows, found = positions // window, np.empty_like(positions)
    for index in np.unique(windows):
        here = windows == index
        size = min(window, blocks * block - int(index) * window)
        mixed = permute(positions[here] - index * window, size, *key, int(index)) + index * window
        found[here] = permute(mixed // block, blocks, *key, -1) * block + mixed % block
    return found


MAX_STORED = 1 << 20  # rows up to which the permutation is stored; drawing it takes about 30 ms


def samples_of(
    rows: int, batch_size: int, seed: int, step: int, block: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return row indices and epochs, each `(batch_size,)`, of one step's global batch, a pure function.

    Every epoch has its own permutation. Batches may span two epochs, so each row occurs once per epoch. block: read
    blocks of this many rows, see `permute_blocks`; None shuffles all rows.
    """
    positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs, indices = positions // rows, positions % rows
    for epoch in np.unique(epochs):
        here = epochs == epoch
        if block is not None:
            indices[here] = permute_blocks(indices[here], rows, block, seed, int(epoch))
        elif rows > MAX_STORED:
            indices[here] = permute(indices[here], rows, seed, int(epoch))
        else:
            indices[here] = _stored_permutation(rows, seed, int(epoch))[indices[here]]
    return indices, epochs


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _stored_permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    key = (rows, seed, epoch)
    if key not in _permutations:
        if len(_permutations) > 2:
            _permutations.pop(next(iter(_permutations)))
        _permutations[key] = np.random.default_rng([seed, epoch]).permutation(rows)
    return _permutations[key]


def spread_rows(size: int, limit: int | None) -> np.ndarray:
    """Return all rows below `size`, or `limit` of them, evenly spaced, because rows of a class may be consecutive."""
    return np.arange(size) if limit is None or limit >= size else np.linspace(0, size - 1, limit).astype(np.int64)


def random_rows(size: int, count: int, seed: int) -> Tensor:
    """Return up to `count` distinct rows below `size`, int64, in a random order given by `seed`."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]


Indices = Sequence[int] | NDArray[np.int64] | Tensor | slice


def positions_of(rows: Any, size: int) -> NDArray[np.int64]:
    """Convert an index (integers, where negative ones count from the end; a bool per row; or a slice) to rows `(B,)`
    from 0 to `size` - 1. Raises `IndexError`."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(size))
    wanted = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows).reshape(-1)
    if wanted.dtype == bool and len(wanted) == size:
        wanted = np.flatnonzero(wanted)
    if len(wanted) and wanted.dtype.kind not in "iu":
        raise IndexError(f"rows should be whole numbers, or a bool for each of {size} rows")
    wanted = wanted.astype(np.int64)
    wanted = np.where(wanted < 0, wanted + size, wanted)
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= size):
        raise IndexError(f"rows range from {wanted.min()} to {wanted.max()}, but there are only {size}")
    return wanted


# Random choices per row ---------------------------------------------------------------------------

DROPOUT, TOKEN, ID, OTHER, PIXEL = range(5)
"""Columns of random numbers: for a row, label dropout and the choice of another label; for a token, whether to replace
it and by which id; and whether a stochastic pixel is white."""


def draw_by_row(indices: np.ndarray, epochs: np.ndarray, seed: int, column: int) -> np.ndarray:
    """Return a uniform number in [0, 1) for each of the rows `indices`, `(B,)`."""
    draws = np.empty(len(indices))
    for epoch in np.unique(epochs):
        draws[epochs == epoch] = uniforms(seed, int(epoch), indices[epochs == epoch], columns=(column,))[:, 0]
    return draws


def draw_nulls(
    names: Iterable[str], indices: np.ndarray, epochs: np.ndarray, seed: int, together: float, alone: float
) -> dict[str, Tensor]:
    """Return for these columns which of the rows are null, bool `(B,)`: all columns in a share `together` of the rows,
    and each column alone in a share `alone` of the others."""
    every = draw_by_row(indices, epochs, seed, DROPOUT) < together
    found = {}
    for name in names:
        column = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        found[name] = torch.from_numpy(every | (draw_by_row(indices, epochs, seed, column) < alone))
    return found


def other_labels(labels: Tensor, counts: Tensor, draws: np.ndarray) -> Tensor:
    """Return for each of `labels` `(B,)` the label of a random row of another class, int64 `(B,)`. counts: rows of each
    class, `(K,)`, positive for at least two classes. draws: `(B,)` in [0, 1)."""
    ends, own = counts.cumsum(0), counts[labels]
    place = (torch.from_numpy(draws) * (ends[-1] - own)).long()  # among the rows of other classes, sorted
    place += own * (place >= ends[labels] - own)
    return torch.searchsorted(ends, place, right=True)


FIXED, GIVEN = -1, -2
"""Seeds of stochastic pixels that stay the same, of rows of data sets and of other images; no run has them."""


def draw_pixels(grey: Tensor, indices: np.ndarray, epochs: np.ndarray | int, seed: int) -> Tensor:
    """Return black and white images, uint8 of 0 and 1 `(B, ...)`: each pixel is 1 with probability `grey` / 255, anew
    in each epoch (Salakhutdinov and Murray 2008). grey: uint8, the rows `indices` of the data."""
    values = grey.flatten(1).numpy()
    found = (values == 255).astype(np.uint8)
    images, places = np.nonzero((values > 0) & (values < 255))
    cells, when = indices[images] * values.shape[1] + places, np.broadcast_to(epochs, len(values))[images]
    for epoch in np.unique(when):
        here = np.flatnonzero(when == epoch)
        for part in np.array_split(here, -(-len(here) // 16384)):  # cells that fit into the CPU cache
            draws = uniforms(seed, int(epoch), cells[part], columns=(PIXEL,))[:, 0]
            found[images[part], places[part]] = draws * 255 < values[images[part], places[part]]
    return torch.from_numpy(found).reshape(grey.shape)


def perturb_tokens(
    tokens: Tensor, indices: np.ndarray, epochs: np.ndarray, seed: int, share: float, vocab_size: int
) -> Tensor:
    """Return `tokens` `(B, ...)` of the rows `indices`, each token replaced by a uniform id with probability `share`
    (Ren et al. 2019)."""
    found = tokens.flatten(1).numpy().copy()
    flat, size = found.reshape(-1), found.shape[1]
    for epoch in np.unique(epochs):
        rows = np.flatnonzero(epochs == epoch)
        for part in np.array_split(rows, -(-len(rows) * size // 16384)):  # cells that fit into the CPU cache
            cells, places = (row[:, None] * size + np.arange(size) for row in (indices[part], part))
            here = np.flatnonzero(uniforms(seed, int(epoch), cells.reshape(-1), columns=(TOKEN,))[:, 0] < share)
            ids = uniforms(seed, int(epoch), cells.reshape(-1)[here], columns=(ID,))[:, 0] * vocab_size
            flat[places.reshape(-1)[here]] = ids
    return torch.from_numpy(found).reshape(tokens.shape)
