"""Random numbers as functions of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
DRAWS = 5  # flip, shift down, shift right, rotation, zoom


def uniforms(
    seed: int, epoch: int, indices: NDArray[np.int64], columns: Sequence[int] = range(DRAWS)
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), (B, 5) or only the given `columns`, that depend on (seed, epoch, index) alone."""
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
