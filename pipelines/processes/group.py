"""Work that the processes of one command share: each does its part of a list, and all get the results, in order.

Where a list is cut, and what is done with a part, does not depend on the number of processes; so neither do results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenizer.files import PipelineLoadError

from ..config import UserError
from ..config.errors import ProcessFailed, ReportedElsewhere

T = TypeVar("T")
R = TypeVar("R")
MISTAKES = UserError, PipelineLoadError, OSError  # of users, reported in one line


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share work: which of them this one is, and how many there are. All have to call the same
    methods in the same order.

    What a method puts together is on the CPU, on every process; of tensors all types except the small unsigned ones,
    which torch does not pickle (arrays of them are fine). An error on one process is raised there, and `ProcessFailed`,
    which names that process, on the others; for a user's mistake that the main process found, `ReportedElsewhere`.
    """

    rank: int = 0
    world: int = 1
    lockstep: bool = False
    """Whether what is mapped has collectives inside, as a sharded model has, so that all processes have to call it
    equally often, on items of one size."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that this process takes: every `world`-th."""
        return items[self.rank :: self.world]

    def map(self, act: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return `act` of each item, in order, each computed by one process."""
        parts = self.gather(lambda: self._act_on_mine(act, items))
        found: list[Any] = [None] * len(items)
        for rank, part in enumerate(parts):
            found[rank :: self.world] = part
        return found

    def _act_on_mine(self, act: Callable[[T], R], items: Sequence[T]) -> list[R]:
        found = [act(item) for item in self.mine(items)]
        if self.lockstep and items and len(found) < -(-len(items) // self.world):
            act(items[0])
        return found

    def total(self, counts: Tensor) -> Tensor:
        """Return the sum over processes of whole numbers, for which the order of adding does not matter."""
        return torch.stack(self.gather(lambda: counts.cpu())).sum(0)

    def on_main(self, act: Callable[[], R]) -> R:
        """Return what `act` returns on the main process, where alone it is called."""
        return self.gather(lambda: act() if self.is_main else None)[0]  # type: ignore[return-value]

    def main_first(self, act: Callable[[], R]) -> R:
        """Return what `act` returns on each process, called on the others once it has returned on the main one: so what
        is wrong is reported once."""
        found: list[R] = []
        self.on_main(lambda: found.append(act()))
        return found[0] if self.is_main else act()

    def gather(self, act: Callable[[], R]) -> list[R]:
        """Return what `act` returns on each process."""
        if self.world == 1:
            return [act()]
        try:
            mine: tuple[Any, Exception | None] = (act(), None)
        except Exception as error:
            self._exchange((None, self._for_others(error)))
            raise
        found = self._exchange(mine)
        for _, failure in found:
            if failure is not None:
                raise failure
        return [value for value, _ in found]

    def _for_others(self, error: Exception) -> Exception:
        """Return what the others raise: of text alone, so that it can be sent."""
        if self.is_main and isinstance(error, MISTAKES):
            return ReportedElsewhere(str(error))
        return ProcessFailed(f"process {self.rank} failed: {type(error).__name__}: {error}")

    def _exchange(self, mine: tuple[Any, Exception | None]) -> list[tuple[Any, Exception | None]]:
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, mine)
        return found


ALONE = ProcessGroup()
"""One process, which shares nothing."""
