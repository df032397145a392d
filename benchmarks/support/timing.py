"""How long things take, timed in turn: whatever else the machine does, it does to all of them."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.options import ROOT

TIMED_STEPS = 20


def seconds_of(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds that each takes; run in turn after one call of each to warm up."""
    return medians(runs, repeats, 1, time.perf_counter)


def cpu_seconds_of(runs: Sequence[Callable[[], object]], repeats: int = TIMED_STEPS) -> list[float]:
    """Median seconds of CPU time, of all threads, that each takes; run in turn after two calls of each to warm up."""
    return medians(runs, repeats, 2, time.process_time)


def medians(runs: Sequence[Callable[[], object]], repeats: int, ahead: int, clock: Callable[[], float]) -> list[float]:
    """Median time of `repeats` calls of each run by a clock, after `ahead` calls that are not counted."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(ahead + repeats):
        for kept, run in zip(times, runs, strict=True):
            began = clock()
            run()
            if turn >= ahead:
                kept.append(clock() - began)
    return [statistics.median(kept) for kept in times]


# Training steps -----------------------------------------------------------------------------------


@contextlib.contextmanager
def stepper(task: Any, config: Any, waits: list[float] | None = None) -> Iterator[Callable[[], None]]:
    """A training step of the task at each call, batches and averaged weights included. `waits` gets the seconds for
    which each step waited for its batch."""
    from pipelines.processes.launch import build_accelerator
    from pipelines.training.trainer import Trainer

    waits = [] if waits is None else waits
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(None):
            trainer = Trainer(task, config.model_copy(update={"out": folder}), build_accelerator())
        task.model.train()
        stream = trainer.batches()

        def step() -> None:
            began = time.perf_counter()
            batch = next(stream)
            waits.append(time.perf_counter() - began)
            trainer.take_step(batch, config.train.lr / 100)

        try:
            yield step
        finally:
            stream.close()
            trainer.close()


def prior_seconds(arguments: dict[str, list[str]]) -> dict[str, float]:
    """Seconds of CPU time of a training step of each prior, by name; `arguments` are those of `smalti train_prior`."""
    import torch

    from pipelines.config.command import parse
    from pipelines.train_prior import PriorTask, TrainPriorConfig

    with contextlib.ExitStack() as stack:
        steps = []
        for argv in arguments.values():
            config = parse(TrainPriorConfig, argv, verb="train_prior", description="")
            torch.manual_seed(config.train.seed)
            steps.append(stack.enter_context(stepper(PriorTask(config), config)))
        return dict(zip(arguments, cpu_seconds_of(steps), strict=True))


def prior_presets(data: str) -> dict[str, Path]:
    """The presets over the tokens of a data set, by the prior's kind (and what else its name says); exits where there
    are none. One over other tokens of it, such as scales, is not among them."""
    presets = sorted((ROOT / "configs" / "prior").glob(f"*_{data}.yaml"))
    found = [preset for preset in presets if f"tokens: runs/{data}_tokens\n" in preset.read_text()]
    if not found:
        raise SystemExit(f"data={data}: there are no presets configs/prior/*_{data}.yaml")
    return {preset.stem.removesuffix(f"_{data}"): preset for preset in found}


def steps_within(minutes: float, seconds: float) -> int:
    """How many steps of so many seconds fit into the time; at least one."""
    return max(1, round(60 * minutes / seconds))
