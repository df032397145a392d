"""What is drawn for each training row, as functions of (seed, epoch, row): so that it depends neither on the batch nor
on the number of processes.

Of the random numbers of a row, column 0 decides on label dropout, and 3 on another label. Columns 1 and 2 are those of
single tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .hashing import uniforms

DROPOUT, TOKEN, ID, OTHER = range(4)


def by_row(indices: np.ndarray, epochs: np.ndarray, seed: int, column: int) -> np.ndarray:
    """A uniform number in [0, 1) for each of the rows `indices`, `(B,)`."""
    draws = np.empty(len(indices))
    for epoch in np.unique(epochs):
        draws[epochs == epoch] = uniforms(seed, int(epoch), indices[epochs == epoch], columns=(column,))[:, 0]
    return draws


def other_labels(labels: Tensor, counts: Tensor, draws: np.ndarray) -> Tensor:
    """For each of `labels` `(B,)` another one, int64 `(B,)`: that of a random row among those of all other classes.
    counts: `(K,)` rows of each class, above 0 for two of them at least; draws: `(B,)` in [0, 1)."""
    ends, own = counts.cumsum(0), counts[labels]
    place = (torch.from_numpy(draws) * (ends[-1] - own)).long()  # among the rows of other classes, sorted
    place += own * (place >= ends[labels] - own)
    return torch.searchsorted(ends, place, right=True)


def perturbed(
    tokens: Tensor, indices: np.ndarray, epochs: np.ndarray, seed: int, share: float, vocab_size: int
) -> Tensor:
    """`tokens` `(B, ...)` of the rows `indices`, each with probability `share` replaced by a uniform id (Ren et al.
    2019)."""
    found = tokens.flatten(1).numpy().copy()
    flat, size = found.reshape(-1), found.shape[1]
    for epoch in np.unique(epochs):
        rows = np.flatnonzero(epochs == epoch)
        for part in np.array_split(rows, -(-len(rows) * size // 16384)):  # as many cells as fit into the cache
            cells, places = (row[:, None] * size + np.arange(size) for row in (indices[part], part))
            here = np.flatnonzero(uniforms(seed, int(epoch), cells.reshape(-1), columns=(TOKEN,))[:, 0] < share)
            ids = uniforms(seed, int(epoch), cells.reshape(-1)[here], columns=(ID,))[:, 0] * vocab_size
            flat[places.reshape(-1)[here]] = ids
    return torch.from_numpy(found).reshape(tokens.shape)
