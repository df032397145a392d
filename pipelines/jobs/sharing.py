"""How processes share the pieces of a job: each makes its own, and waits for the others without a collective, which
would give up."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ..config import UserError
from ..config.command import ProcessLost
from ..files import Output
from ..processes.launched import TIMEOUT
from ..processes.sharing import ALONE, Team
from .pieces import Job, Piece

PAUSES = 0.1, 3.0  # seconds between two looks at what others have made, the first and the longest
T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """A process's share in the pieces that are missing: every `world`-th one, so that processes end together, and what
    is there has no large holes."""

    job: Job
    missing: list[Piece]
    team: Team = ALONE

    @property
    def mine(self) -> list[Piece]:
        """The pieces that this process makes."""
        return list(self.team.mine(self.missing))

    @property
    def rows(self) -> int:
        """How many are missing."""
        return sum(piece.rows for piece in self.missing)

    def make(
        self,
        batch_size: int,
        make: Callable[[list[int]], T],
        keep: Callable[[T], None],
        what: str,
        timeout: float = TIMEOUT,
    ) -> None:
        """Make this process's rows, a batch at a time, and wait until all pieces are there. A thread keeps what was
        made while the next rows are. Batches go on from piece to piece, so that all but the last one are full. The
        first process shows how far all are. Raises what `make` and `keep` raise, and `ProcessLost` after `timeout`
        seconds in which no piece was kept, and in which this process would have made ten batches."""
        from tqdm import tqdm

        total, left = sum(piece.rows for piece in self.job.pieces), self.rows
        hidden = None if self.team.leads else True
        others = set(self.missing) - set(self.mine)
        rows, done = [row for piece in self.mine for row in range(piece.start, piece.stop)], 0
        bar = tqdm(total=total, initial=total - left, desc=what, unit="image", disable=hidden, leave=False)

        def look() -> None:
            if not bar.disable:
                theirs = sum(piece.rows for piece in others.intersection(self.job.kept())) if others else 0
                bar.update(total - left + done + theirs - bar.n)

        with bar, ThreadPoolExecutor(1) as pool:
            keeping: Future[None] | None = None
            began = time.monotonic()
            for start in range(0, len(rows), batch_size):
                some = rows[start : start + batch_size]
                made = make(some)
                if keeping is not None:
                    keeping.result()
                keeping, done = pool.submit(keep, made), done + len(some)
                look()
                timeout, began = max(timeout, 10 * (time.monotonic() - began)), time.monotonic()
            if keeping is not None:
                keeping.result()
            self.wait(timeout, look)

    def wait(self, timeout: float, look: Callable[[], None] = lambda: None) -> None:
        """Until all pieces are there; `look` is called now and then. Raises `ProcessLost`, see `make`."""
        there, since, pause = -1, time.monotonic(), PAUSES[0]
        while there < len(self.job.pieces):
            kept = set(self.job.kept())
            if len(kept) > there:
                there, since = len(kept), time.monotonic()
            elif time.monotonic() - since > timeout:
                world = self.team.world
                late = [str(rank) for rank in range(world) if set(Team(rank, world).mine(self.missing)) - kept]
                raise ProcessLost(
                    f"process {' and '.join(late)} has made nothing for {timeout:g} s: gone, frozen or on another "
                    "disk; the same command continues"
                )
            else:
                time.sleep(pause)
                pause = min(1.5 * pause, PAUSES[1])
            look()


def shared(job: Job, team: Team) -> Share:
    """This process's share in a job that the first process begins. Raises, besides what `begin` raises, `UserError`
    where the work folder cannot be written, or cannot be seen by all."""

    def begin() -> list[Piece]:
        with Output(job.out).errors():
            return job.begin()

    missing = team.first(begin)
    if not job.work.is_dir():
        raise UserError(f"out: {job.work} cannot be seen from here; all processes have to see the same disk")
    return Share(job, missing, team)
