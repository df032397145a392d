"""Full float32 precision outside of training: TF32 and bfloat16 are for training only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

backends: Any = torch.backends
cudnn, mkldnn, cublas = backends.cudnn, backends.mkldnn, backends.cuda.matmul
HOLDERS = (backends, cudnn, cublas, cudnn.conv, mkldnn.matmul, mkldnn.conv)
"""Torch's settings for what the factors of float32 products are rounded to. Later ones inherit from earlier ones."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32, whatever torch's settings are; restores them afterwards.

    By default, cuDNN's convolutions use TF32; `torch.set_float32_matmul_precision` and `fp32_precision` allow TF32, or
    bfloat16 on a CPU, for more. A tokenizer's ids, a likelihood and a sample should not depend on these settings.
    Autocast is not changed. Also works as a decorator.
    """
    with ExitStack() as changed:
        for holder in HOLDERS:
            own = holder.fp32_precision  # a holder that inherits reads `ieee` by now
            if own != "ieee":
                changed.callback(setattr, holder, "fp32_precision", own)
                holder.fp32_precision = "ieee"
        yield


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is in that."""
    return x if x.dtype == torch.float64 else x.float()
