"""What a run is made of, and what its loop counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .checkpoints.sharded import Tensors
from .checkpoints.writer import Writer
from .heartbeat import Heartbeat
from .schedule import TrainConfig
from .stopping import Stop
from .task import Task
from .tracking import Tracker


class Turn(NamedTuple):
    """What came of a player's turn. `values` `(1 + len(names),)` are on the device: whether any process was told to
    end, and what is logged, of which some numbers are not finite if the turn was skipped."""

    player: str
    names: list[str]
    values: Tensor
    culprit: str = ""
    """The first gradient that was not finite, where it was looked for."""


class Unread(NamedTuple):
    """The turns of a step, and their `values` laid end to end, on the CPU, where they are when they have `arrived`."""

    turns: list[Turn]
    values: Tensor
    arrived: torch.cuda.Event | None


class Clock(NamedTuple):
    """What rank 0's clock said at a step, which holds `until` another."""

    step: int
    minutes: float
    until: int


@dataclass
class Training:
    """Everything that changes while a task is trained."""

    task: Task
    config: TrainConfig
    run: Path
    accelerator: Accelerator
    averaged: AveragedModel
    optimizers: dict[str, Any]
    tracker: Tracker
    heartbeat: Heartbeat
    stop: Stop
    """Whether this process was told to end."""
    sharded: bool = False
    """Whether each process has only its piece of the weights, of their average and of the moments."""
    gathered: nn.Module | None = None
    """Where the average is put together, on the main process of a sharded run."""
    step: int = 0
    minutes: float = 0.0
    clock: Clock | None = None
    """What all processes know of the minutes, where there are several; see `progress`."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    unread: Unread | None = None
    """What came of the last step, where that is still on its way from the GPU; see `step.settle`."""
    window: dict[str, list[float]] = field(default_factory=dict)
    """Sum and count of each logged term since the last report; the count leaves out turns not played or skipped."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Figures of the last evaluation."""
    reported: dict[str, float] = field(default_factory=dict)
    """Figures of what the run left at its end, on the images held out."""
    best: dict[str, Any] = field(default_factory=dict)
    """Step, score and evaluation of the best weights so far, on the main process; see `best`."""
    best_weights: Tensors | None = None
    precision: str = "no"
    """What the layers compute in, in accelerate's words."""
    began: str | None = None
    """What they computed in until the newest state, if that is known."""
    pending: list[str] = field(default_factory=list)
    """What was due at the saved step and not done, because the run was told to end."""
    writer: Writer = field(default_factory=Writer)
    """Writes resume states while training goes on."""
    saved_step: int = -1
    unsaved: str = ""
    """Why the last save failed, if it did."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What of the configuration a run may not change, by which its states are known."""
    stopping: bool = False
    """Whether any process was told to end; all processes learn it in the same step."""

    COUNTERS = (
        "minutes",
        "skipped",
        "skipped_in_a_row",
        "window",
        "evaluation",
        "reported",
        "best",
        "precision",
        "pending",
    )

    def counters(self) -> dict[str, Any]:
        """What a resumed run needs besides weights and optimizers."""
        return {name: getattr(self, name) for name in self.COUNTERS}
