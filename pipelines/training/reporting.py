"""What a run says of itself while it trains, and at its end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from ..config.terminal import tell
from .schedule import learning_rate
from .state import Training

SHOWN_EVERY = 0.5  # seconds


def report(training: Training, progress: float, since: tuple[int, float]) -> dict[str, float]:
    """Means of the logged terms since the last report, speed and learning rate; starts a new window. There is no speed
    where this process has made no step, of a line that was due when the one before was told to end."""
    record = {name: total / count for name, (total, count) in training.window.items()}
    training.window = {}
    record["learning_rate"] = learning_rate(training.config, training.step, progress)
    steps, seconds = training.step - since[0], max(1e-9, time.monotonic() - since[1])
    if steps:
        record["images_per_second"] = images = steps * training.config.batch_size / seconds
        record["tokens_per_second"] = images * training.task.tokens_per_row
    return record | {"minutes": training.minutes, "skipped_steps": training.skipped}


def progress_bar(training: Training, hidden: bool) -> Any:
    """A bar on the main process's terminal, with loss, speed and time left; nothing where there is no terminal."""
    from tqdm import tqdm

    shown = training.accelerator.is_main_process and training.task.players and not hidden
    return tqdm(
        total=training.config.steps,
        initial=training.step,
        unit="step",
        dynamic_ncols=True,
        mininterval=SHOWN_EVERY,
        miniters=1,
        disable=None if shown else True,
    )


def tick(bar: Any, training: Training) -> None:
    """Count a step in the bar. Every half second the bar shows the loss since the last report, as far as it is known
    here: nobody waits for a GPU."""
    if not bar.disable and time.time() - bar.last_print_t >= bar.mininterval:
        known = {name: total / count for name, (total, count) in training.window.items() if count}
        if known:
            bar.set_postfix_str(f"loss {loss_of(known):.4f}{time_left(training)}", refresh=False)
    bar.update(1)


def loss_of(terms: Mapping[str, float]) -> float:
    """The loss among logged terms: with several players, that of the first."""
    return next((value for name, value in terms.items() if name.endswith("loss")), math.nan)


def time_left(training: Training) -> str:
    """How many minutes are left of a run that ends by the clock."""
    minutes = training.config.minutes
    return f", {max(0.0, minutes - training.minutes):.1f} of {minutes:g} min left" if minutes else ""


def show(bar: Any, training: Training, record: dict[str, float]) -> None:
    """The report in the bar, or as a line where output goes to a file."""
    loss = loss_of(record)
    if training.accelerator.is_main_process and bar.disable:
        speed = f"{record['images_per_second']:.0f} images/s, " if "images_per_second" in record else ""
        line = f"step {training.step}: loss {loss:.4f}, {speed}{training.minutes:.1f} min"
        tell(line, lines_go_to())
    bar.set_postfix_str(f"loss {loss:.4f}{time_left(training)}")


def lines_go_to() -> TextIO:
    """Stderr; in a notebook stdout, as it shows what goes to stderr as if something had gone wrong."""
    return sys.stdout if type(sys.stderr).__module__ == "ipykernel.iostream" else sys.stderr


def conclusion(training: Training) -> tuple[dict[str, Any], list[list[Any]]]:
    """How a run has ended, for a tracker's table of runs: steps, minutes, the best and the last figures; and the same
    figures as rows of (weights, split, figure, value)."""
    watched, best = training.task.watched, training.best
    groups = [("last", watched, training.evaluation)]
    groups += [("best", watched, best["evaluation"])] if best else []
    summary: dict[str, Any] = {"steps": training.step, "minutes": training.minutes}
    summary |= {f"{weights}/{name}": value for weights, _, found in groups for name, value in found.items()}
    if best:
        summary["best/step"] = best["step"]
    groups.append((f"left at the end{', best' if best else ''}", "held_out", training.reported))
    return summary, [[weights, split, name, value] for weights, split, found in groups for name, value in found.items()]


def told_end(training: Training, done: bool, before: bool) -> str:
    """How far the run has come, what it has made, and what comes next. before: whether it had been finished before."""
    if not done:
        return f"told to end at step {training.step}; the same command continues"
    task, minutes = training.task, f"{training.minutes:.1f} min"
    trained = f"{training.step:,} steps in {minutes}" if task.players else "nothing to train"
    if training.best and training.best["step"] != training.step:
        trained += f", of which step {training.best['step']:,} was best"
    quality = task.quality(training.reported or training.evaluation)
    begin, nothing = ("already finished", "; nothing to do") if before else ("done", "")
    return f"{begin}: {trained}{quality and f', {quality}'}{nothing}; {task.outcome(training.run)}"
