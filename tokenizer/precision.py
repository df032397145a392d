"""Full precision where it counts: TF32 and bfloat16 are for training, if anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

backends: Any = torch.backends
cudnn, mkldnn, cublas = backends.cudnn, backends.mkldnn, backends.cuda.matmul
HOLDERS = (backends, cudnn, cublas, cudnn.conv, mkldnn.matmul, mkldnn.conv)
"""Where torch is told what the factors of float32 products are rounded to. Later ones inherit from earlier."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Products and convolutions of float32 numbers in float32, whatever torch was told; afterwards it is told so again.

    By default, cuDNN's convolutions are TF32; `torch.set_float32_matmul_precision` and `fp32_precision` allow it, or
    bfloat16 on a CPU, for more. A tokenizer's ids, a likelihood and a sample should not depend on that. Autocast is
    left alone. It is a decorator as well.
    """
    with ExitStack() as changed:
        for holder in HOLDERS:
            own = holder.fp32_precision  # an inherited value is `ieee` by now
            if own != "ieee":
                changed.callback(setattr, holder, "fp32_precision", own)
                holder.fp32_precision = "ieee"
        yield
