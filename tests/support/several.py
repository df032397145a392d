"""Several processes of one step, each in a thread of this process: they share pieces, and wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from pipelines.config.errors import ProcessFailed, ReportedElsewhere
from pipelines.processes.group import ProcessGroup


@dataclass(frozen=True)
class Side(ProcessGroup):
    """One of them, which tells the others in memory."""

    several: Any = field(default=None, compare=False)

    def _exchange(self, told: Any) -> list[Any]:
        self.several.told[self.rank] = told
        self.several.barrier.wait()
        found = list(self.several.told)
        self.several.barrier.wait()
        return found


class Several:
    """`count` sides; put `joined` for `join_group`, or `accelerator` and `group_of`, in the place of
    those of a step, then `run` it."""

    def __init__(self, count: int, seconds: float = 200) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=seconds)
        self.local, self.told = threading.local(), [None] * count

    @property
    def side(self) -> Side:
        """The side whose thread this is."""
        return self.local.side

    @contextmanager
    def joined(self, device: str) -> Iterator[tuple[ProcessGroup, torch.device]]:
        """As a step that shares its work asks for it."""
        yield self.side, torch.device("cpu")

    def accelerator(self) -> Any:
        """What `encode` asks of one."""
        wait, nothing = self.barrier.wait, lambda: None
        return SimpleNamespace(device=torch.device("cpu"), wait_for_everyone=wait, end_training=nothing)

    def group_of(self, accelerator: Any) -> ProcessGroup:
        """The group of the side whose thread this is."""
        return self.side

    def run(self, act: Callable[[], Any]) -> None:
        """`act` on each side; raises the first error."""
        errors: list[BaseException] = []

        def work(index: int) -> None:
            self.local.side = Side(index, self.count, several=self)
            try:
                act()
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.backends.cuda.enable_cudnn_sdp(True)  # sampling turns it off meanwhile, and threads share the switch
        echoes = (threading.BrokenBarrierError, ReportedElsewhere, ProcessFailed)
        real = [error for error in errors if not isinstance(error, echoes)]
        for error in [*real, *errors][:1]:
            raise error
