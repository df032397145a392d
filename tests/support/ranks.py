"""Ranks of a process group as threads of this process, which start at once. Threads share torch's global generators."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.config.errors import ProcessFailed, ReportedElsewhere
from pipelines.processes.group import ProcessGroup


class Several:
    """`count` ranks with a stand-in for the parts of `torch.distributed` that the product uses. Replace `join_group` by
    `joined`, or `encode`'s `accelerator` and `group_of` by the methods here, then call `run`."""

    def __init__(self, count: int, seconds: float = 60) -> None:
        self.count, self.own = count, threading.local()
        self.barrier = threading.Barrier(count, timeout=seconds)
        self.shown: list[Any] = [None] * count

    @property
    def side(self) -> ProcessGroup:
        """The group as seen by this thread's rank."""
        return ProcessGroup(self.own.rank, self.count)

    @contextmanager
    def joined(self, device: str) -> Iterator[tuple[ProcessGroup, torch.device]]:
        yield self.side, torch.device("cpu")

    def accelerator(self) -> Any:
        wait, nothing = self.barrier.wait, lambda: None
        return SimpleNamespace(device=torch.device("cpu"), wait_for_everyone=wait, end_training=nothing)

    def group_of(self, accelerator: Any) -> ProcessGroup:
        return self.side

    def meet(self, thing: Any) -> list[Any]:
        """Gather an object from each rank."""
        self.shown[self.own.rank] = thing
        self.barrier.wait()
        found = list(self.shown)
        self.barrier.wait()
        return found

    def all_reduce(self, tensor: Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(sum(self.meet(tensor.detach().clone())))  # in the same order on every rank

    def broadcast(self, tensor: Tensor, source: int) -> None:
        with torch.no_grad():
            tensor.copy_(self.meet(tensor.detach().clone())[source])

    def all_gather_object(self, found: list[Any], thing: Any) -> None:
        found[:] = self.meet(thing)

    def run(self, work: Callable[[], Any]) -> list[Any]:
        """Return the result of `work` on each rank, or raise the first error."""
        found: list[Any] = [None] * self.count
        errors: list[BaseException] = []

        def act(rank: int) -> None:
            self.own.rank = rank
            try:
                found[rank] = work()
            except BaseException as error:  # including failed assertions
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=act, args=(rank,), daemon=True) for rank in range(self.count)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "is_initialized", lambda: True)
            patch.setattr(dist, "get_world_size", lambda: self.count)
            patch.setattr(dist, "get_rank", lambda: self.own.rank)
            for name in ("all_reduce", "broadcast", "all_gather_object"):
                patch.setattr(dist, name, getattr(self, name))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        torch.backends.cuda.enable_cudnn_sdp(True)  # sampling turns it off temporarily, and threads share the flag
        echoes = (threading.BrokenBarrierError, ReportedElsewhere, ProcessFailed)
        for error in sorted(errors, key=lambda error: isinstance(error, echoes)):
            raise error
        return found


def of_ranks(world: int, work: Callable[[int], Any]) -> list[Any]:
    """Return the results of `work(rank)` on `world` ranks."""
    several = Several(world)
    return several.run(lambda: work(several.side.rank))
