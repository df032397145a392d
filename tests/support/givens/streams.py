"""The batches that each of several processes draws, without starting any."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from pipelines.training.loop import batches

from pipelines.training.schedule import TrainConfig
from pipelines.training.task import Task


def streams_of(task: Task, config: TrainConfig, step: int, processes: int) -> list[Iterator[Any]]:
    """One for each process, from this step on."""

    def of(rank: int) -> Iterator[Any]:
        place: Any = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
        run: Any = SimpleNamespace(step=step, config=config, task=task, accelerator=place)
        return batches(run)

    return [of(rank) for rank in range(processes)]
