"""The batch streams of several ranks, without processes."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import torch

from pipelines.training.schedule import TrainConfig
from pipelines.training.task import Task
from pipelines.training.trainer import Trainer


def streams_of(task: Task, config: TrainConfig, step: int, processes: int) -> list[Generator[Any, None, None]]:
    """One stream per rank, starting at `step`."""

    def of(rank: int) -> Generator[Any, None, None]:
        group = SimpleNamespace(rank=rank, world=processes)
        run: Any = SimpleNamespace(step=step, config=config, task=task, group=group, device=torch.device("cpu"))
        return Trainer.batches(run)

    return [of(rank) for rank in range(processes)]
