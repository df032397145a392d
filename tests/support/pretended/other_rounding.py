"""A CPU that rounds otherwise, pretended: what a layer gives depends on the size of its batch, in the last bits.

So it is on real ones: the libraries behind torch choose kernels by sizes, each machine its own. `SMALTI_ROUNDING=1`
makes the tests run so; one that fails rests on how this machine happens to round. Same shapes give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ULPS = 2.0
"""How far a result may be off, in units of its type's precision: decoded pixels then differ by up to 2e-6."""
LAYERS = ("conv1d", "conv2d", "linear", "scaled_dot_product_attention")


@cache
def pattern(shape: tuple[int, ...], batch: int, dtype: torch.dtype) -> Tensor:
    """Factors near 1 for each value of an image, another for each size of batch."""
    with torch.inference_mode(False):  # training will use it, too
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(batch), dtype=torch.float64) * 2 - 1
        return (1 + ULPS * torch.finfo(dtype).eps * noise).to(dtype)


def rounded_otherwise(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The layer, as such a CPU computes it."""

    @wraps(layer)
    def call(*arguments: Any, **options: Any) -> Tensor:
        found = layer(*arguments, **options)
        if type(found) is not Tensor or found.ndim < 2 or found.dtype not in (torch.float32, torch.float64):
            return found
        if found.device.type != "cpu" or not found.numel():
            return found
        return found * pattern(tuple(found.shape[1:]), len(found), found.dtype)

    return call


def install() -> None:
    """Let every layer of this process round so."""
    for name in LAYERS:
        setattr(F, name, rounded_otherwise(getattr(F, name)))
    torch.Tensor.__matmul__ = rounded_otherwise(torch.Tensor.__matmul__)  # type: ignore[method-assign]
