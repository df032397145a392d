"""The batches that each of several processes draws, without starting any."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from pipelines.processes.sharing import Team
from pipelines.training.schedule import TrainConfig
from pipelines.training.task import Task
from pipelines.training.trainer import Trainer


def streams_of(task: Task, config: TrainConfig, step: int, processes: int) -> list[Iterator[Any]]:
    """One for each process, from this step on."""

    def of(rank: int) -> Iterator[Any]:
        facts = {"step": step, "config": config, "task": task, "device": torch.device("cpu")}
        trainer: Any = SimpleNamespace(**facts, group=Team(rank, processes))
        return Trainer.batches(trainer)

    return [of(rank) for rank in range(processes)]
