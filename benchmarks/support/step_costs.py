"""Costs of a training step: FLOPs, memory saved for the backward pass, resident memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode


def count_flops(loss: Callable[[], Any]) -> float:
    """Count the FLOPs of a forward and backward pass. torch's counter misses attention on a CPU, so a formula adds
    it."""
    fused, attention = functional.scaled_dot_product_attention, 0.0

    def counted(q: Any, k: Any, v: Any, *args: Any, is_causal: bool = False, **more: Any) -> Any:
        nonlocal attention
        attention += 3 * 4 * q.numel() * k.shape[-2] * (0.5 if is_causal else 1.0)
        return q + k + v  # right shape, no matrix product to count

    functional.scaled_dot_product_attention = counted
    try:
        with FlopCounterMode(display=False) as counter:
            loss().backward()
    finally:
        functional.scaled_dot_product_attention = fused
    return counter.get_total_flops() + attention


class Products:
    """Float32 matrix products to measure the peak. Each call computes one with `torch.mm` and one as a 1x1 convolution.
    best: the highest FLOP/s of each."""

    def __init__(self, side: int) -> None:
        a, b = torch.randn(2, side, side)
        rows = a.reshape(16, side // 16, 1, side).movedim(-1, 1)  # channels last; with few images torch would use `mm`
        kernel = b.reshape(side, side, 1, 1).contiguous(memory_format=torch.channels_last)
        self.flops = 2 * side**3
        self.runs = {"mm": lambda: torch.mm(a, b), "conv": lambda: torch.conv2d(rows, kernel)}
        self.best = dict.fromkeys(self.runs, 0.0)

    def __call__(self) -> None:
        for kind, run in self.runs.items():
            began = time.perf_counter()
            run()
            self.best[kind] = max(self.best[kind], self.flops / (time.perf_counter() - began))


def count_saved_bytes(model: Any, loss: Callable[[], Any]) -> int:
    """Count the bytes that a forward pass saves for the backward pass, without weights; shared storage counts once."""
    found: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = loss()  # keeps the saved tensors alive, so that no address is reused
    del graph
    return sum(found.values())


def measure_memory_rise(step: Callable[[], None]) -> float | None:
    """Measure the rise of resident memory during a step, in bytes; None if /proc is not available."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # return free memory to the system, so that the step must request it
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = read_memory("VmRSS")
        step()
        return read_memory("VmHWM") - before
    except (OSError, AttributeError):
        return None


def read_memory(kind: str) -> int:
    """Read a memory figure of this process from /proc, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024
