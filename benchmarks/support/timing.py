"""Timing. Candidates take turns, so that other load on the machine affects all of them equally."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.options import ROOT
from pipelines.config.command import parse
from pipelines.processes.launch import build_accelerator
from pipelines.train_prior import PriorTask, TrainPriorConfig
from pipelines.train_tokenizer import TokenizerTask, TrainTokenizerConfig
from pipelines.training.trainer import Trainer

TIMED_STEPS = 20


def seconds_of(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median wall-clock seconds of each run, after one warm-up call."""
    return medians(runs, repeats, 1, time.perf_counter)


def cpu_seconds_of(runs: Sequence[Callable[[], object]], repeats: int = TIMED_STEPS) -> list[float]:
    """Return the median CPU seconds of each run, summed over threads, after two warm-up calls."""
    return medians(runs, repeats, 2, time.process_time)


def medians(runs: Sequence[Callable[[], object]], repeats: int, warmup: int, clock: Callable[[], float]) -> list[float]:
    """Return the median time of each run over `repeats` rounds, after `warmup` rounds."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(warmup + repeats):
        for measured, run in zip(times, runs, strict=True):
            start = clock()
            run()
            if turn >= warmup:
                measured.append(clock() - start)
    return [statistics.median(measured) for measured in times]


# Training steps -----------------------------------------------------------------------------------


@contextlib.contextmanager
def stepper(task: Any, config: Any, waits: list[float] | None = None) -> Iterator[Callable[[], None]]:
    """Yield a function that takes one training step, with data loading and averaged weights. waits: receives the
    seconds that each step waited for its batch."""
    waits = [] if waits is None else waits
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(None):
            trainer = Trainer(task, config.model_copy(update={"out": folder}), build_accelerator())
        task.model.train()
        stream = trainer.batches()

        def step() -> None:
            start = time.perf_counter()
            batch = next(stream)
            waits.append(time.perf_counter() - start)
            trainer.take_step(batch, config.train.lr / 100)

        try:
            yield step
        finally:
            stream.close()
            trainer.close()


def build_task(argv: list[str], of_prior: bool, device: Any = "cpu") -> tuple[Any, Any]:
    """Build the training task of a command line; return it with its configuration."""
    stage: Any = TrainPriorConfig if of_prior else TrainTokenizerConfig
    config = parse(stage, argv, verb="benchmark", description="")
    torch.manual_seed(config.train.seed)
    with contextlib.redirect_stdout(None):  # the number of images, which a run prints
        return PriorTask(config) if of_prior else TokenizerTask(config, device), config


def step_seconds(arguments: dict[str, list[str]], of_prior: bool) -> dict[str, float]:
    """Return the CPU seconds of a training step of each command line, timed in turn."""
    with contextlib.ExitStack() as stack:
        steps = [stack.enter_context(stepper(*build_task(argv, of_prior))) for argv in arguments.values()]
        return dict(zip(arguments, cpu_seconds_of(steps), strict=True))


def prior_presets(data: str, *variants: str) -> dict[str, Path]:
    """Return the prior presets of a data set, by file name without the data set; exit if it has no presets. Presets for
    other tokens of the same data, such as scales, are left out. variants: those of tokens `{data}_{variant}` are
    included."""
    presets = sorted((ROOT / "configs" / "prior").glob(f"*_{data}.yaml"))
    lines = [f"tokens: runs/{name}_tokens\n" for name in (data, *(f"{data}_{variant}" for variant in variants))]
    found = [preset for preset in presets if any(line in preset.read_text() for line in lines)]
    if not found:
        raise SystemExit(f"data={data}: there are no presets configs/prior/*_{data}.yaml")
    return {preset.stem.removesuffix(f"_{data}"): preset for preset in found}


def steps_within(minutes: float, seconds: float) -> int:
    """Return the number of steps of `seconds` each that fit into `minutes`, at least one."""
    return max(1, round(60 * minutes / seconds))
