"""Full float32 precision outside of training: TF32 and bfloat16 are for training only.

Torch's settings are the process's, and calls in several threads overlap; `Held` keeps them while any of these lasts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

backends: Any = torch.backends
cudnn, mkldnn, cublas = backends.cudnn, backends.mkldnn, backends.cuda.matmul
HOLDERS = (backends, cudnn, cublas, cudnn.conv, mkldnn.matmul, mkldnn.conv)
"""Torch's settings for what the factors of float32 products are rounded to. Later ones inherit from earlier ones."""
Setting = tuple[Callable[[], Any], Callable[[Any], Any], Any]
"""What reads it, what writes it, and the value that it is to have."""


class Held:
    """Settings of the whole process, at the values that they are to have while any thread is `inside`.

    The last to leave puts back what the first has found: if each put back what it found itself, one would undo them
    under another that goes on, or leave them changed for good.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.settings, self.lock = settings, threading.Lock()
        self.count, self.before = 0, dict[int, Any]()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A block in which they hold."""
        with self.lock:
            self.count += 1
            for index, (read, write, value) in enumerate(self.settings):
                own = read()
                if own != value:
                    self.before.setdefault(index, own)
                    write(value)
        try:
            yield
        finally:
            with self.lock:
                self.count -= 1
                if not self.count:
                    for index, own in reversed(self.before.items()):
                        self.settings[index][1](own)
                    self.before.clear()


# A holder that inherits reads `ieee` as soon as the one before it is set.
IEEE = Held(
    [(partial(getattr, each, "fp32_precision"), partial(setattr, each, "fp32_precision"), "ieee") for each in HOLDERS]
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32, whatever torch's settings are; restores them afterwards.

    By default, cuDNN's convolutions use TF32; `torch.set_float32_matmul_precision` and `fp32_precision` allow TF32, or
    bfloat16 on a CPU, for more. A tokenizer's ids, a likelihood and a sample should not depend on these settings.
    Autocast is not changed. Also works as a decorator.
    """
    with IEEE.inside():
        yield


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is in that."""
    return x if x.dtype == torch.float64 else x.float()


WITHOUT_FLOAT64 = {"mps"}  # types of devices: Apple's GPUs


def finest(device: torch.device) -> torch.dtype:
    """The type with most digits that `device` has: float64, or float32 on an Apple GPU."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def in_finest(x: Tensor) -> Tensor:
    """`x` in the type with most digits that its device has, for sums of many numbers."""
    return x.to(finest(x.device))
