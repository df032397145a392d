"""Types of stored weights, as diffusers and transformers name them.

A variant is weights rounded to a smaller type, in a file of another name: `model.fp16.safetensors`. `dtype="auto"` is
the type that a file holds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from .errors import PathError
from .reading import Folder
from .weights import Entry

WEIGHTS = "model.safetensors"
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
Dtype = torch.dtype | Literal["auto"] | None
"""The type of the weights in memory: "auto" is that of the file, None is float32."""

M = TypeVar("M", bound=nn.Module)


def weights_name(variant: str | None) -> str:
    """The name of the file of weights. Raises `ValueError` for an unknown variant."""
    if variant is None:
        return WEIGHTS
    if variant not in VARIANTS:
        raise ValueError(f"variant must be {' or '.join(VARIANTS)}, or None (got {variant!r})")
    return WEIGHTS.replace(".", f".{variant}.")


def weights_names(variant: str | None = None) -> list[str]:
    """The names that the weights may have if this variant is asked for; None takes any."""
    return [weights_name(None), *map(weights_name, VARIANTS)] if variant is None else [weights_name(variant)]


def find_weights(files: Folder, variant: str | None) -> str:
    """The file of weights of this variant; None: the full one, or the variant that is there. Raises `PathError` for a
    variant that is not there, naming what is."""
    there = [name for name in weights_names() if name in files]
    wanted = weights_names(variant)
    if variant is not None and there and wanted[0] not in there:
        raise PathError(f"{files.place(wanted[0])}: no such file; there is {', '.join(there)}")
    return next((name for name in wanted if name in there), wanted[0])


def rounded(model: M, variant: str) -> M:
    """A copy of `model` with its weights in the type of `variant`, but those that stay float32 in any. Raises
    `ValueError` for weights that are too large for the type."""
    weights_name(variant)
    smaller = copy.deepcopy(model).to(dtype=VARIANTS[variant])
    for name, value in smaller.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"variant {variant!r}: {name} holds values that this type cannot")
    return smaller


def stored_dtype(entries: Mapping[str, Entry], names: Iterable[str]) -> torch.dtype:
    """The type of the weights in a file, without those of a quantizer; float32 if there are none. names: of the
    model's weights, in its order."""
    kinds = (entries[name].dtype for name in names if "quantizer" not in name.split("."))
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def chosen_dtype(dtype: Dtype, torch_dtype: Dtype, stored: torch.dtype | None) -> torch.dtype | None:
    """What `dtype`, or its other name `torch_dtype`, asks for; None leaves the weights as they are. Raises `ValueError`
    where both are given, `TypeError` for what is no type."""
    found: Any = given_dtype(dtype, torch_dtype)
    if isinstance(found, str) and found == "auto":
        return stored
    if found is not None and not isinstance(found, torch.dtype):
        raise TypeError(f"dtype should be a torch.dtype, 'auto' or None (got {found!r})")
    return found


def given_dtype(dtype: Any, torch_dtype: Any) -> Any:
    """The one of the two that is given. Raises `ValueError` for both."""
    if dtype is not None and torch_dtype is not None:
        raise ValueError("dtype and torch_dtype are two names of one argument: give one")
    return torch_dtype if dtype is None else dtype
