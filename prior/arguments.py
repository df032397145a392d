"""Checks and conversions of arguments."""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_tensor(values: Any, device: torch.device | None = None) -> Tensor:
    """Convert numbers, arrays, or lists of tensors to a tensor."""
    listed = isinstance(values, (list, tuple)) and any(isinstance(one, (Tensor, np.ndarray)) for one in values)
    if listed or isinstance(values, np.ndarray):
        # torch accepts neither lists of tensors nor arrays with negative strides.
        values = np.asarray(values, order="C")
    return torch.as_tensor(values, device=device)


def is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole_number(name: str, value: Any) -> int:
    """Return `value`, the argument `name`, as an int. Raises `ValueError` unless it is a whole number."""
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be a whole number (got {value!r})")


def check_count(count: Any, name: str = "num_images") -> int:
    """Return `count`, the argument `name`, as an int. Raises `ValueError` unless it is a positive whole number."""
    found = whole_number(name, count)
    if found < 1:
        raise ValueError(f"{name} must be at least 1 (got {found})")
    return found
