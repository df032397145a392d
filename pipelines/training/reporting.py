"""Messages of a run: at its start, during training and at its end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..config import tell
from ..config.table import count_of
from ..processes.launch import recommend_bf16
from .schedule import describe_cut

if TYPE_CHECKING:
    from .trainer import Trainer

FIRST_LINE = 10.0  # seconds until a run without a progress bar says when it will end


def announce_start(trainer: Trainer, changes: list[str], reason: str = "") -> None:
    """Print how the run starts or continues: its data, devices, precision and changed settings. reason: why this
    precision was chosen. Raises `UserError` if the disk has no room for the run's files."""
    if not trainer.main or trainer.is_finished():
        return
    trainer.require_room()
    task, accelerator, precision = trainer.task, trainer.accelerator, trainer.accelerator.mixed_precision
    parameters = sum(p.numel() for p in task.model.parameters())
    processes = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
    validating = f", {task.evaluated['validation']:,} for validation" if "validation" in task.evaluated else ""
    rows = f"{task.rows:,} training rows" if task.rows else "a stream of training images"
    line = (
        f"{trainer.run}: {f'continuing from step {trainer.step}' if trainer.step else 'starting'}; {parameters:,} "
        f"parameters, {rows}{validating}, {processes} on {trainer.device}, "
        f"{precision} mixed precision{reason and f' ({reason})'}{', weights sharded' if trainer.sharded else ''}"
    )
    print(line, flush=True)
    for note in task.notes if not trainer.step else ():
        print(f"{trainer.run}: {note}", flush=True)
    has_bf16 = trainer.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if not reason and (line := recommend_bf16(precision, has_bf16)):
        print(f"{trainer.run}: {line}", flush=True)
    if task.param_groups and task.watched == "held_out":
        what = "training is evaluated on held-out images, and the last weights are delivered"
        print(f"{trainer.run}: no validation images: {what}", flush=True)
    if trainer.precision_before not in (None, precision):
        changes = [f"mixed precision: {trainer.precision_before} -> {precision}", *changes]
    if trainer.step and changes:
        print(f"{trainer.run}: from now on {', '.join(changes)}", flush=True)


@contextmanager
def training_bar(trainer: Trainer) -> Iterator[Any]:
    """Show a progress bar if the main process has a terminal and something to train."""
    from tqdm import tqdm

    hidden = not (trainer.main and trainer.task.param_groups) or trainer.is_finished()
    options: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.5, "miniters": 1}
    with tqdm(
        total=trainer.config.steps, initial=trainer.step, unit="step", disable=True if hidden else None, **options
    ) as bar:
        yield bar


class Pace:
    """Says once, after about ten seconds, when training will end."""

    def __init__(self) -> None:
        self.began, self.started, self.steps, self.announced = time.monotonic(), 0.0, 0, False

    def start_step(self) -> None:
        """Count a step. The first one, which allocates and compiles, is not timed if there are others."""
        if self.steps < 2:
            self.started = time.monotonic()
        self.steps += 1

    def announce_once(self, trainer: Trainer, bar: Any) -> None:
        """Print the line when it is due, on the main process, unless the progress bar is shown."""
        now = time.monotonic()
        if self.announced or now - self.began < FIRST_LINE:
            return
        self.announced = True
        if trainer.main and bar.disable:
            left = describe_left(trainer, (now - self.started) / max(1, self.steps - 1))
            total = "" if trainer.config.steps is None else f" of {trainer.config.steps:,}"
            tell_progress(f"step {trainer.step:,}{total}; {left}")


def describe_left(trainer: Trainer, seconds_per_step: float) -> str:
    """Describe how long training will still take: `about 12 minutes left`."""
    config = trainer.config
    by_steps = math.inf if config.steps is None else (config.steps - trainer.step) * seconds_per_step
    by_limit = math.inf if config.minutes is None else 60 * (config.minutes - trainer.minutes)
    seconds = max(0.0, min(by_steps, by_limit))
    cuts = f", until train.minutes={config.minutes:g}" if by_limit < by_steps else ""
    unit, length = ("second", 1) if seconds < 100 else ("minute", 60) if seconds < 6000 else ("hour", 3600)
    return f"about {count_of(round(seconds / length), unit)} left{cuts}"


def tell_progress(line: str) -> None:
    """Print a line about training to stderr; in a notebook to stdout, as notebooks show stderr as errors."""
    in_notebook = type(sys.stderr).__module__ == "ipykernel.iostream"
    tell(line, sys.stdout if in_notebook else sys.stderr)


def show_report(trainer: Trainer, record: dict[str, float], bar: Any) -> None:
    """Show a report in the progress bar, or print it as a line if output goes to a file."""
    loss = next((value for name, value in record.items() if name.endswith("loss")), math.nan)
    total = trainer.config.minutes
    left = f", {max(0.0, total - trainer.minutes):.1f} of {total:g} min left" if total else ""
    bar.set_postfix_str(f"loss {loss:.4f}{left}")
    if trainer.main and bar.disable:
        line = f"step {trainer.step}: loss {loss:.4f}"
        if speed := record.get("images_per_second"):
            line += f", {speed:.0f} images/s"
        line += f", {trainer.minutes:.1f} min"
        if speed and not trainer.is_done():
            line += f", {describe_left(trainer, trainer.config.batch_size / speed)}"
        tell_progress(line)


def summarize_run(trainer: Trainer) -> tuple[dict[str, Any], list[list[Any]]]:
    """Return a summary for a tracker's table of runs (steps, minutes, last and best figures), and the same figures as
    rows of (weights, split, figure, value)."""
    watched, best = trainer.task.watched, trainer.best
    groups = [("last", watched, trainer.evaluation)]
    groups += [("best", watched, best["evaluation"])] if best else []
    summary: dict[str, Any] = {"steps": trainer.step, "minutes": trainer.minutes}
    summary |= {f"{weights}/{name}": value for weights, _, found in groups for name, value in found.items()}
    if best:
        summary["best/step"] = best["step"]
    groups.append((f"delivered{', best' if best else ''}", "held_out", trainer.reported))
    rows = [[weights, split, name, value] for weights, split, found in groups for name, value in found.items()]
    return summary, rows


def describe_end(trainer: Trainer, done: bool, was_finished: bool) -> str:
    """Describe how far the run got, its result and the next command."""
    if not done:
        return f"stopped at step {trainer.step}; the same command continues"
    task = trainer.task
    trained = f"{trainer.step:,} steps in {trainer.minutes:.1f} min" if task.param_groups else "nothing to train"
    if trainer.cut:
        trained = describe_cut(trainer.step, trainer.cut)
    if trainer.best and trainer.best["step"] != trainer.step:
        trained += f", best at step {trainer.best['step']:,}"
    quality = task.quality(trainer.reported or trainer.evaluation)
    if was_finished:
        trained, nothing = f"already finished: {trained}", "; nothing to do"
    else:
        trained, nothing = trained if trainer.cut else f"done: {trained}", ""
    return f"{trained}{quality and f', {quality}'}{nothing}; {task.outcome(trainer.run)}"


def describe_snapshot(trainer: Trainer, done: bool) -> dict[str, Any]:
    """Return the figures of a snapshot's weights, the number of evaluated images per split and, at the end of a run,
    the step of the weights."""
    task = trainer.task
    evaluation = trainer.best["evaluation"] if done and trainer.best else trainer.evaluation
    if done and trainer.finished and task.watched == "validation":
        evaluation = trainer.finished_evaluation
    if task.watched == "validation":
        evaluation = {f"validation_{name}": value for name, value in evaluation.items()}
    if not done:
        return {"evaluation": evaluation, "images": {task.watched: task.evaluated[task.watched]}}
    facts: dict[str, Any] = {"evaluation": evaluation | trainer.reported, "images": task.evaluated}
    return facts | ({"best_step": trainer.best["step"]} if trainer.best else {})
