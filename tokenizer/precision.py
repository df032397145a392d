"""Full float32 precision outside training (TF32 and bfloat16 are for training only), and of constants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

backends: Any = torch.backends
cudnn, mkldnn, cublas = backends.cudnn, backends.mkldnn, backends.cuda.matmul
PRECISIONS = (backends, cudnn, cublas, cudnn.conv, mkldnn.matmul, mkldnn.conv)
"""Objects that hold torch's `fp32_precision`. Later ones inherit from earlier ones."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in full precision, overriding torch's settings in the block.

    cuDNN convolutions use TF32 by default, and `torch.set_float32_matmul_precision` and `fp32_precision` allow TF32, or
    bfloat16 on a CPU, for other operations. Ids, likelihoods and samples should not depend on these settings. Autocast
    is not changed. Also works as a decorator.
    """
    changed = []
    for holder in PRECISIONS:
        if (before := holder.fp32_precision) != "ieee":
            changed.append((holder, before))
            holder.fp32_precision = "ieee"
    try:
        yield
    finally:
        for holder, before in reversed(changed):
            holder.fp32_precision = before


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


WITHOUT_FLOAT64 = {"mps"}  # Apple's GPUs


def finest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def in_finest(x: Tensor) -> Tensor:
    """Convert `x` to the most precise type of its device, for long sums."""
    return x.to(finest(x.device))


class Constants(nn.Module):
    """A module whose buffers keep 32 bits or more, whatever the type of the weights: years need more than bfloat16."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, before[name].to(buffer.device))
        return self
