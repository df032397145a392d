"""Work that the processes of one command share: each does its part of a list, and all have the results, in order.

Where a list is cut, and what is done with a part, does not depend on the number of processes; so neither do results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenizer.files import PipelineLoadError

from ..config import UserError
from ..config.arguments import ToldElsewhere
from ..config.command import ProcessLost

T = TypeVar("T")
R = TypeVar("R")
MISTAKES = UserError, PipelineLoadError, OSError  # which are told in a line


@dataclass(frozen=True)
class Team:
    """The processes that share work: which of them this one is, and how many there are. All have to call the same
    methods in the same order.

    What a method puts together is on the CPU, on every process; of tensors all types but the small unsigned ones, which
    torch does not pickle (arrays of them are fine). If an error comes up in one process, that one raises it, and the
    others raise `ProcessLost`, which names it; or, for a mistake of the user that the first process has found,
    `ToldElsewhere`, since that one tells it.
    """

    rank: int = 0
    world: int = 1
    lockstep: bool = False
    """Whether what is mapped has collectives inside, as a sharded model, so that all have to call it equally often."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this process takes: every `world`-th."""
        return items[self.rank :: self.world]

    def map(self, act: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`act` of each item, in order, each done by one process."""
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
        """The sum over processes of whole numbers, for which no order of adding matters."""
        parts = self.gather(lambda: counts.cpu())
        return torch.stack(parts).sum(0)

    def first(self, act: Callable[[], R]) -> R:
        """What `act` returns on the first process, where alone it is called."""
        return self.gather(lambda: act() if self.leads else None)[0]  # type: ignore[return-value]

    def first_alone(self, act: Callable[[], R]) -> R:
        """What `act` returns on each process, called on the others once it has ended on the first one: what is wrong is
        told once."""
        found: list[R] = []
        self.first(lambda: found.append(act()))
        return found[0] if self.leads else act()

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Give the tensors of the other processes the values of the first one's."""
        for tensor in tensors if self.world > 1 else ():
            values = tensor.contiguous()
            torch.distributed.broadcast(values, 0)
            tensor.copy_(values)

    def gather(self, act: Callable[[], R]) -> list[R]:
        """What `act` returns on each process."""
        if self.world == 1:
            return [act()]
        try:
            told: tuple[Any, Exception | None] = (act(), None)
        except Exception as error:
            self._exchange((None, self._as_told(error)))
            raise
        found = self._exchange(told)
        for _, failure in found:
            if failure is not None:
                raise failure
        return [value for value, _ in found]

    def _as_told(self, error: Exception) -> Exception:
        """What the others raise: of text alone, so that it travels."""
        if self.leads and isinstance(error, MISTAKES):
            return ToldElsewhere(str(error))
        return ProcessLost(f"process {self.rank} failed: {type(error).__name__}: {error}")

    def _exchange(self, told: tuple[Any, Exception | None]) -> list[tuple[Any, Exception | None]]:
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, told)
        return found


ALONE = Team()
"""A process that shares nothing."""
