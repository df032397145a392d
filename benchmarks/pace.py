"""Equal time counted in steps, and figures of several seeds.

    python benchmarks/pace.py tokens=runs/digits_tokens data=digits    # ms per training step of every prior's preset

A step of every contender is timed in turn, in one pass and in CPU seconds; each then trains for as many steps as
fit into the minutes. So what else the machine does while they train changes no figure, and little while they are timed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sampling import table_head

ROOT = Path(__file__).parents[1]
TIMED_STEPS = 20
NEVER = 1_000_000  # steps: for what a run is to do only at its end


@contextlib.contextmanager
def stepper(task: Any, config: Any) -> Iterator[Callable[[], None]]:
    """A training step of the task at each call, batches and averaged weights included."""
    from pipelines.training.loop import batches
    from pipelines.training.processes import build_accelerator
    from pipelines.training.starting import set_up
    from pipelines.training.step import take_step

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        training = set_up(task, config, Path(folder), build_accelerator())
        task.model.train()
        stream = batches(training)
        try:
            yield lambda: take_step(training, next(stream), config.train.lr / 100)
        finally:
            stream.close()
            training.tracker.close()


def cpu_seconds_of(runs: Sequence[Callable[[], object]], repeats: int = TIMED_STEPS) -> list[float]:
    """Median seconds of CPU time, of all threads, that each takes; run in turn after two calls of each to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 2):
        for kept, run in zip(times, runs, strict=True):
            began = time.process_time()
            run()
            if turn > 1:
                kept.append(time.process_time() - began)
    return [statistics.median(kept) for kept in times]


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
    """The presets of a data set, by the prior's kind (and what else its name says)."""
    found = sorted((ROOT / "configs" / "prior").glob(f"*_{data}.yaml"))
    return {preset.stem.removesuffix(f"_{data}"): preset for preset in found}


def steps_within(minutes: float, seconds: float) -> int:
    """How many steps of so many seconds fit into the time; at least one."""
    return max(1, round(60 * minutes / seconds))


def write_whole(data: Any, path: Path) -> None:
    """JSON that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1))
    temporary.replace(path)


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % t-interval of the mean over seeds; NaN for one seed."""
    from scipy.stats import t

    if len(values) < 2:
        return math.nan
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def with_interval(values: Sequence[float], digits: int = 2) -> str:
    """`1.23 +- 0.04`, or the value alone where there is one seed."""
    mean, half = statistics.mean(values), interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" +- {half:.{digits}f}")


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    presets = prior_presets(options["data"])
    arguments = {
        name: ["--config", str(preset), f"tokens={options['tokens']}", "track.wandb=disabled"]
        for name, preset in presets.items()
    }
    print(table_head("prior", "ms per step"))
    for name, seconds in prior_seconds(arguments).items():
        print(f"| {name} | {1e3 * seconds:.1f} |")


if __name__ == "__main__":
    main()
