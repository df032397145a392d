"""Share work among the processes of a command: each handles part of a list, and all get the ordered results.

Results do not depend on the number of processes, because neither the items nor their computation do.
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
MISTAKES = UserError, PipelineLoadError, OSError  # users' mistakes, reported in one line


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share work: their number `world`, and the `rank` of this one. All must call the same methods
    in the same order.

    Every process gets results on its CPU. Tensors must not have a small unsigned type, which torch does not pickle;
    arrays may. An error on one process is raised there; the others raise `ProcessFailed`, or `ReportedElsewhere` for a
    user's mistake found by the main process.
    """

    rank: int = 0
    world: int = 1
    lockstep: bool = False
    """Whether mapped functions run collectives, as sharded models do. All processes must then call them equally often,
    on items of equal size."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's items: every `world`-th."""
        return items[self.rank :: self.world]

    def map(self, act: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Call `act` on each item, on one process each, and return all results in order."""
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
        return torch.stack(self.gather(lambda: counts.cpu())).sum(0)

    def on_main(self, act: Callable[[], R]) -> R:
        """Call `act` on the main process and return its result everywhere."""
        return self.gather(lambda: act() if self.is_main else None)[0]  # type: ignore[return-value]

    def main_first(self, act: Callable[[], R]) -> R:
        """Call `act` on the main process, then on the others; return each process's own result. This reports an error
        only once."""
        found: list[R] = []
        self.on_main(lambda: found.append(act()))
        return found[0] if self.is_main else act()

    def gather(self, act: Callable[[], R]) -> list[R]:
        """Call `act` on every process and return all results, by rank."""
        if self.world == 1:
            return [act()]
        try:
            mine: tuple[Any, Exception | None] = (act(), None)
        except Exception as error:
            self._exchange((None, self._copy_error(error)))
            raise
        found = self._exchange(mine)
        for _, failure in found:
            if failure is not None:
                raise failure
        return [value for value, _ in found]

    def _copy_error(self, error: Exception) -> Exception:
        """Return the error that the other processes raise; it holds only text, so it can be pickled."""
        if self.is_main and isinstance(error, MISTAKES):
            return ReportedElsewhere(*str(error).splitlines())
        return ProcessFailed(f"process {self.rank} failed: {type(error).__name__}: {error}")

    def _exchange(self, mine: tuple[Any, Exception | None]) -> list[tuple[Any, Exception | None]]:
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, mine)
        return found


ALONE = ProcessGroup()
"""A single process."""
