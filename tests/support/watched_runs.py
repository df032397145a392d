"""Runs in two processes that record their state after every step.

A test file starts itself twice by `in_two_processes(__file__, "basic", FOLDER)`; its `__main__` then calls the function
`basic` with a `Watch`, which runs and records.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from launch import blank
from processes import digest, fork_twice, gathered, leave_group
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pipelines import ImagePipeline
from pipelines.config import UserError
from pipelines.processes.group import ProcessGroup
from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training.trainer import Trainer
from prior.given import Given

# In the test process


def in_two_processes(file: str, name: str, folder: Path, seconds: float = 250) -> tuple[dict[str, Any], str]:
    """Run a function of a file in two processes; return their records and their output."""
    printed = fork_twice(file, name, folder, seconds=seconds)
    noted = json.loads((folder / f"{name}.json").read_text())
    assert noted["world"] == 2 and noted["pids"][0] != noted["pids"][1]
    return noted, printed


# In each of two processes


class Enough(Exception):
    """Interrupts a run that is to be resumed."""


class Watch:
    """Runs in this process, and records of the state of both processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.evaluations = folder, list[Any](), list[Any]()
        self.found: dict[str, Any] = {}
        self.take_step = Trainer.take_step
        Accelerator.end_training = lambda self: None  # type: ignore[method-assign]
        ImagePipeline.sample_picture = blank  # type: ignore[method-assign]
        for task in (PriorTask, TokenizerTask):
            self.watch_evaluations(task)

    def watch_evaluations(self, task: Any) -> None:
        evaluate, mine = task.evaluate, ProcessGroup.mine

        def watched(this: Any, model: Any, split: Any, group: ProcessGroup) -> Any:
            shares = []

            def counted(group: ProcessGroup, items: Any) -> Any:
                shares.append([len(mine(group, items)), len(items)])
                return mine(group, items)

            ProcessGroup.mine = counted  # type: ignore[method-assign]
            try:
                found = evaluate(this, model, split, group)
            finally:
                ProcessGroup.mine = mine  # type: ignore[method-assign]
            pieces = [isinstance(value, DTensor) for value in model.parameters()]
            self.evaluations.append({"split": split, "shares": shares, "in pieces": all(pieces), "figures": found})
            return found

        task.evaluate = watched

    def run(self, name: str, train: Callable[[], Any], stop: int = -1) -> None:
        """Train, up to step `stop` if given, and append the records to those of this name."""

        def watched(trainer: Trainer, micro_batches: list[Any], lr: float) -> None:
            if trainer.step == stop:
                raise Enough
            self.take_step(trainer, micro_batches, lr)
            self.log.append(gathered(state_of(trainer, micro_batches)))

        Trainer.take_step = watched  # type: ignore[method-assign]
        error: Exception | None = None
        try:
            train()
        except (UserError, Enough) as caught:
            error = caught
        finally:
            Trainer.take_step = self.take_step  # type: ignore[method-assign]
        noted = self.found.setdefault(name, {"steps": [], "evaluations": [], "errors": []})
        noted["steps"] += self.log
        noted["evaluations"] += gathered(self.evaluations)
        noted["errors"] += gathered("" if error is None else f"{type(error).__name__}: {error}")
        self.log, self.evaluations = [], []

    def leave(self, name: str) -> None:
        """Write the records and exit."""
        pids = gathered(os.getpid())
        if dist.get_rank() == 0:
            noted = {"world": dist.get_world_size(), "pids": pids, **self.found}
            (self.folder / f"{name}.json").write_text(json.dumps(noted))
        gc.collect()  # gloo may abort if anything still holds the group at exit
        leave_group()


def state_of(trainer: Trainer, micro_batches: list[Any]) -> dict[str, Any]:
    """Describe this process's state after a step: digests, and its share of all numbers."""
    weights, average = list(trainer.task.model.parameters()), list(trainer.average.parameters())
    moments = [
        value
        for optimizer in trainer.optimizers.values()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    batch = [part.rows.values() if isinstance(part, Given) else [part] for part in micro_batches[0]]
    return {
        "weights": digest(weights),
        "average": digest(average),
        "moments": digest(moments),
        "buffers": digest(trainer.task.model.buffers()),
        "batch": digest(itertools.chain(*batch)),
        "seed": torch.initial_seed(),
        "replicated": all(isinstance(net, DistributedDataParallel) for net in trainer.task.nets.values()),
        "shares": [share(values) for values in (weights, average, moments)],
    }


def share(values: list[Any]) -> float:
    """The share of all numbers that this process holds."""
    here = sum(value.to_local().numel() if isinstance(value, DTensor) else value.numel() for value in values)
    return here / sum(value.numel() for value in values)


def main(functions: dict[str, Any]) -> None:
    """Run the function that the command line names, as `__main__` of a test file."""
    _, name, folder = sys.argv
    watch = Watch(Path(folder))
    functions[name](watch)
    watch.leave(name)
