"""Several ranks of one group as threads of this process, for what takes no time to compute.

Tests of `torch.distributed` in processes of their own take seconds; here a rank that is in a collective waits for the
others' threads. Only what the product calls is there. Torch's generators are shared by threads: draw outside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

SECONDS = 20.0  # until a rank that waits for others gives up


class _Group:
    """What its threads see as `torch.distributed`."""

    def __init__(self, world: int) -> None:
        self.world, self.own = world, threading.local()
        self.barrier: threading.Barrier = threading.Barrier(world, timeout=SECONDS)
        self.shown: list[Any] = [None] * world

    def meet(self, thing: Any) -> list[Any]:
        """Each rank's, once all are here."""
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


def of_ranks(world: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns on each of so many ranks. What one raises is raised here."""
    group, found, raised = _Group(world), [None] * world, []

    def run(rank: int) -> None:
        group.own.rank = rank
        try:
            found[rank] = work(rank)
        except BaseException as error:  # also of a failed assertion
            raised.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda: world)
        patch.setattr(dist, "get_rank", lambda: group.own.rank)
        patch.setattr(dist, "all_reduce", group.all_reduce)
        patch.setattr(dist, "broadcast", group.broadcast)
        patch.setattr(dist, "all_gather_object", group.all_gather_object)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if raised:
        raise next((error for error in raised if not isinstance(error, threading.BrokenBarrierError)), raised[0])
    return found
