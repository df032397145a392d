"""Gradient-free updates (running means, revived codes, annealing), applied once after each training batch.

Updates follow the outermost training forward with gradients enabled: the tokenizer's, or that of a quantizer used
alone. With gradient accumulation, each micro-batch is one such forward. Nothing is updated in eval mode, under
`no_grad`, or by a forward that activation checkpointing repeats in the backward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Pending(threading.local):
    """The nesting depth of training forwards in this thread, and the batches recorded for each module."""

    def __init__(self) -> None:
        self.depth = 0
        self.batches: dict[SelfUpdating, list[tuple[Tensor, ...]]] = {}


_pending = _Pending()


@contextmanager
def one_training_forward() -> Iterator[None]:
    """Update modules with recorded batches when the outermost block ends. An exception discards the records."""
    _pending.depth += 1
    try:
        yield
        if _pending.depth == 1:
            with torch.no_grad():
                for module, batches in _pending.batches.items():
                    parts = zip(*batches, strict=True)
                    module.update(*(part[0] if len(part) == 1 else torch.cat(part) for part in parts))
    finally:
        _pending.depth -= 1
        if not _pending.depth:
            _pending.batches.clear()


class SelfUpdating(nn.Module):
    """A module that updates itself in training: `start` receives the first finite batch, and `update` runs after every
    batch. Statistics are summed over ranks, so all ranks hold equal modules."""

    started: Tensor  # number of training batches, () int64

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("started", torch.zeros((), dtype=torch.long))
        self._step: int | None = None

    @property
    def step(self) -> int:
        """`started` as a host number, read from the device only once."""
        if not self._step:  # None or 0; 0 may be stale if a state was copied into the buffer
            self._step = int(self.started)
        return self._step

    def start(self, batch: Tensor) -> None:
        """Initialize from the first batch, the same on all ranks."""

    def update(self, *batch: Tensor) -> None:
        """Apply the recorded batches. Subclasses extend this method, which counts the batch."""
        self._step = self.step + 1
        self.started += 1

    def may_record(self, batch: Tensor, start: Callable[[Tensor], None] | None = None) -> bool:
        """Return whether to record `batch` `(n, ...)`. The first batch that is finite on all ranks is passed to
        `start`, by default the module's method; earlier batches are ignored."""
        if not updates_now(self):
            return False
        if self.step == 0 and self not in _pending.batches:
            if not finite_on_all_ranks(batch):
                return False
            (start or self.start)(batch)
        return True

    def record(self, *batch: Tensor) -> None:
        """Store tensors for `update`, each with the batch on axis 0."""
        _pending.batches.setdefault(self, []).append(batch)

    def train(self, mode: bool = True) -> Any:
        self._step = None  # the buffer may have been copied from another model
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._step = None


def updates_now(module: nn.Module) -> bool:
    """Return whether a forward of `module` is now a training forward, not one repeated in a backward pass."""
    in_backward = torch._C._current_graph_task_id() != -1
    return module.training and torch.is_grad_enabled() and not in_backward


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values` over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average `values` over ranks, which hold equally many images, in place."""
    return sum_over_ranks(values).div_(world_size()) if world_size() > 1 else values


def finite_on_all_ranks(values: Tensor) -> bool:
    """Return whether `values` are finite on every rank. Syncs with the GPU."""
    return not bool(sum_over_ranks(torch.isfinite(values).logical_not().any().float()))
