"""What a run does beside its steps, on paper: evaluations, previews and saves, and what share of its time they take.

Nothing here was measured on a GPU. The rates are round numbers of machines that have one; `make gpu` says how good they
are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

LAUNCH = 7e-6
"""Seconds of the host for an operation: what a pass takes at least that computes little."""
FUSED = 3
"""About how many operations a compiled kernel does."""
COPY = 5e9
"""Bytes per second from a GPU to memory of the host."""
WRITE = 5e8
"""Bytes per second that are written, read again and hashed."""
FORWARD = 3
"""FLOPs, forward and backward, over those of a forward pass."""
MOST = 0.03
"""The share of a run's time that is well spent on looking at it."""


class Every(NamedTuple):
    """Steps between evaluations, previews and saves."""

    evaluate: int
    preview: int
    save: int


@dataclass(frozen=True)
class Looks:
    """What is looked at: forward passes over `evaluated` images, each of them in so many passes; and a preview of
    `previewed` images, which takes `passes` one after the other, of `launches` operations each."""

    evaluated: int
    evaluation_passes: int
    previewed: int
    passes: int
    launches: int


@dataclass(frozen=True)
class Pauses:
    """Seconds for which training stands still, each time; and those in which a thread writes a state meanwhile."""

    evaluate: float
    preview: float
    save: float
    written: float

    def share(self, every: Every, step: float) -> float:
        """Of the wall clock of steps of so many seconds; a state that is not written yet when the next is due is waited
        for."""
        late = max(0.0, self.written - every.save * step)
        beside = self.evaluate / every.evaluate + self.preview / every.preview + (self.save + late) / every.save
        return beside / (step + beside)

    def steps_between(self, step: float, share: float = MOST) -> int:
        """How many steps of so many seconds should be between looks so that they take at most this share."""
        waiting = (self.evaluate + self.preview + self.save) * (1 - share) / share
        return max(1, -int(-max(waiting, self.written) // step))


def pauses_of(looks: Looks, flops: float, gpus: int, reached: float, state: int, snapshot: int) -> Pauses:
    """flops: of an image, forward and backward; reached: FLOP/s of one GPU; state and snapshot: bytes.

    Evaluations and previews are shared over the GPUs. A preview takes as long as its passes are launched, however many
    images each GPU draws.
    """
    forward = flops / FORWARD
    drawing = looks.previewed * forward / (gpus * reached)
    return Pauses(
        evaluate=looks.evaluated * looks.evaluation_passes * forward / (gpus * reached),
        preview=max(drawing, looks.passes * looks.launches * LAUNCH),
        save=state / COPY + snapshot / COPY + snapshot / WRITE,
        written=state / WRITE,
    )
