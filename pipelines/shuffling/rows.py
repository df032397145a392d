"""Which rows are asked for: as numbers, as a mask, as a slice; the same of images and of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def positions_of(rows: Any, size: int) -> NDArray[np.int64]:
    """The rows asked for, `(B,)` from 0, of `size`: numbers, which count from the end where they are negative, a bool
    for each row, or a slice. Raises `IndexError`."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(size))
    wanted = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows).reshape(-1)
    if wanted.dtype == bool and len(wanted) == size:
        wanted = np.flatnonzero(wanted)
    if len(wanted) and wanted.dtype.kind not in "iu":
        raise IndexError(f"rows should be whole numbers, or a bool for each of {size}")
    wanted = wanted.astype(np.int64)
    wanted = np.where(wanted < 0, wanted + size, wanted)
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= size):
        raise IndexError(f"rows go from {wanted.min()} to {wanted.max()}; there are {size}")
    return wanted
