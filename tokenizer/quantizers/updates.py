"""Updates without gradients: running means, revived codes and annealing follow each training batch, once.

They happen after the outermost training forward with gradients enabled: that of a tokenizer, or of a quantizer that is
used alone. With gradient accumulation, each micro-batch is one such forward. Nothing is updated in eval mode, under
`no_grad`, nor by a forward that activation checkpointing repeats in the backward pass.
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
    """How many training forwards are open in this thread, and the batches that they have recorded for each module."""

    def __init__(self) -> None:
        self.depth = 0
        self.batches: dict[SelfUpdating, list[tuple[Tensor, ...]]] = {}


_pending = _Pending()


@contextmanager
def one_training_forward() -> Iterator[None]:
    """Update the modules that recorded batches when the outermost such block ends. An exception drops the records."""
    _pending.depth += 1
    try:
        yield
        if _pending.depth == 1:
            _update_all()
    finally:
        _pending.depth -= 1
        if not _pending.depth:
            _pending.batches.clear()


@torch.no_grad()
def _update_all() -> None:
    for module, batches in _pending.batches.items():
        module.update(*(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*batches, strict=True)))


class SelfUpdating(nn.Module):
    """A module that updates itself in training: `start` gets the first finite batch, `update` runs after every batch.

    Ranks add up their statistics, so their modules stay equal.
    """

    started: Tensor
    """Number of training batches, `()` int64."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("started", torch.zeros((), dtype=torch.long))
        self._step: int | None = None

    @property
    def step(self) -> int:
        """`started` as a number on the host, read from the device only once."""
        if not self._step:  # 0 may be stale: a state may have been copied into the buffer
            self._step = int(self.started)
        return self._step

    def start(self, batch: Tensor) -> None:
        """Initialize from the first batch, the same on all ranks."""

    def update(self, *batch: Tensor) -> None:
        """Use what `record` got in this forward. Subclasses extend this method, which counts the batch."""
        self._step = self.step + 1
        self.started += 1

    def may_record(self, batch: Tensor, start: Callable[[Tensor], None] | None = None) -> bool:
        """Whether to record `batch` `(n, ...)`. The first batch that is finite on all ranks is passed to `start`, by
        default the module's own; earlier ones are ignored."""
        if not updates_now(self):
            return False
        if self.step == 0 and self not in _pending.batches:
            if not finite_on_all_ranks(batch):
                return False
            (start or self.start)(batch)
        return True

    def record(self, *batch: Tensor) -> None:
        """Store tensors, each with the batch along axis 0, for `update`."""
        _pending.batches.setdefault(self, []).append(batch)

    def train(self, mode: bool = True) -> Any:
        self._step = None  # the buffer may have been copied from another model
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._step = None


def updates_now(module: nn.Module) -> bool:
    """Whether a forward of `module` now is a training forward, and not one repeated in a backward pass."""
    in_backward = torch._C._current_graph_task_id() != -1
    return module.training and torch.is_grad_enabled() and not in_backward


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of the ranks' `values`, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of the ranks' `values`, in place; ranks hold equally many images."""
    return sum_over_ranks(values).div_(world_size()) if world_size() > 1 else values


def finite_on_all_ranks(values: Tensor) -> bool:
    """Whether the `values` of every rank are finite. Waits for a GPU."""
    return not bool(sum_over_ranks(torch.isfinite(values).logical_not().any().float()))
