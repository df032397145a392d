"""The training loop of both stages: set up, fit, evaluate, save.

It knows a task by its model, its players (each has parameters, an optimizer and a turn), its loss and its preview. The
batch is a function of (seed, step) and randomness of (seed, rank, step), so an interrupted run that is started again
with the same command continues to the bit. `accelerate` owns devices, precision and processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import UserError
from ..config.command import Interrupted
from ..config.terminal import by_clause, tell
from ..processes.launched import apart, build_accelerator, team_of
from ..processes.precision import choose_precision
from ..shuffling.ahead import made_ahead, pinned, sent
from .best import final_weights, keep_if_best
from .extending import begun_precision, require_alike
from .heartbeat import Heartbeat, told_where
from .progress import agreed_progress, due_now, finished
from .reporting import conclusion, progress_bar, report, show, tick, told_end
from .run_folder import claimed_folder, take_folder
from .saving import require_room, save, whole_average
from .schedule import learning_rate
from .sharding import is_sharding, require_shardable
from .starting import announce, set_up
from .state import Training
from .step import settle, take_step
from .stopping import heeded
from .task import Split, Task
from .tracking import require_installed

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(build: Callable[[Accelerator], Task], config: Any) -> Path:
    """Run `build`'s task to its end under `config` (with `out`, `train` and `track`); returns the run folder.

    Started again with the same configuration it continues from the newest state; `extending` says what may differ.
    Signals end it early, saved (see `stopping`). Raises `UserError` for a run folder that belongs to another
    configuration, a batch size that does not divide, ten non-finite steps in a row, or a last state that could not be
    saved; `ProcessLost` when another process is lost; `Interrupted`, a KeyboardInterrupt, after Ctrl-C, once saved.
    """
    run = Path(config.out)
    precision = choose_precision(config.train.mixed_precision, begun_precision(run))
    accelerator = build_accelerator(config.train.timeout, precision.mixed)
    shares = accelerator.num_processes * config.train.accumulate
    if config.train.batch_size % shares:
        raise UserError(
            f"train.batch_size: {config.train.batch_size} is not a multiple of processes x accumulate "
            f"({accelerator.num_processes} x {config.train.accumulate})"
        )
    if config.train.steps is None and config.train.minutes is None:
        raise UserError("train.steps: null needs train.minutes to end the run")
    require_installed(config.track.trackers)
    with ExitStack() as stack:
        with apart(accelerator):
            require_alike({**config.train.model_dump(mode="json"), "mixed_precision": accelerator.mixed_precision})
            changes = stack.enter_context(claimed_folder(run, config, accelerator))
        torch.manual_seed(config.train.seed)
        sharded = is_sharding(accelerator)
        task = build(accelerator)
        if sharded:
            require_shardable(task)
        else:
            task.team = team_of(accelerator)
        accelerator.wait_for_everyone()
        take_folder(run, config, accelerator, task.snapshots)
        heartbeat = Heartbeat(run, accelerator.process_index, accelerator.num_processes, config.train.timeout)
        with told_where(heartbeat):
            training = set_up(task, config, run, accelerator, heartbeat, sharded)
            with heeded(training.stop, alone=heartbeat.world == 1):
                try:
                    announce(training, changes, precision.reason)
                    require_room(training)
                    fit(training)
                finally:
                    training.writer.close()
                    training.tracker.close()
                accelerator.wait_for_everyone()
        heartbeat.close(last=accelerator.is_main_process)
    unsaved, interrupted = training.unsaved, training.stop.interrupted is not None
    del training, task
    accelerator.free_memory()  # what still holds the process group when the interpreter ends may abort it (gloo)
    accelerator.end_training()
    if unsaved:
        raise UserError(f"the run is not saved: {unsaved}")
    if interrupted:
        raise Interrupted
    return run


def batches(training: Training) -> Generator[list[Any], None, None]:
    """This process's micro-batches of each step, on its device; those of the next steps are made while one's are used.

    What travels to a GPU is what `Task.batch` made, bytes for an image, from pinned memory, which the host need not
    wait for. A GPU prepares it (`Task.prepare`) in the order of its work; for a CPU the thread that made it does.
    """
    config, accelerator, task = training.config, training.accelerator, training.task
    size, device = config.batch_size // config.accumulate // accelerator.num_processes, accelerator.device

    def make(step: int) -> list[Any]:
        indices, epochs = task.samples(config.batch_size, config.seed, step)
        shape = (config.accumulate, accelerator.num_processes, size)
        mine = [part.reshape(shape)[:, accelerator.process_index] for part in (indices, epochs)]
        micro = [task.batch(i, e, config.seed) for i, e in zip(*mine, strict=True)]
        if device.type == "cpu":
            return [task.prepare(batch) for batch in micro]
        return [pinned(batch) for batch in micro] if device.type == "cuda" else micro

    with closing(made_ahead(make, count(training.step))) as stream:
        for micro in stream:
            yield micro if device.type == "cpu" else [task.prepare(sent(batch, device)) for batch in micro]


def fit(training: Training) -> None:
    """Look at the run when that is due, then take a step; until the steps or the minutes are used up."""
    with closing(batches(training)) as stream:
        go_on(training, stream)


def go_on(training: Training, stream: Iterator[list[Any]]) -> None:
    """`fit`, with these micro-batches for each step."""
    config, began = training.config, time.monotonic() - 60 * training.minutes
    before = finished(training)
    bar = progress_bar(training, hidden=before)
    since = (training.step, time.monotonic())
    training.task.model.train()
    while True:
        progress = agreed_progress(training)
        done = progress >= 1
        due = due_now(training, done)
        if due or training.stopping:
            settle(training)
        if training.stopping and not done:
            training.pending = sorted(due)
            save(training, None)
            break
        record: dict[str, float] = {}
        if "log" in due and training.window:
            record = report(training, progress, since)
            since = (training.step, time.monotonic())
            show(bar, training, record)
        look(training, due, record, done)
        if done:
            break
        training.writer.check()
        training.heartbeat.beat(training.step, "train")
        training.task.progress = progress
        take_step(training, next(stream), learning_rate(config, training.step, progress))
        training.minutes = (time.monotonic() - began) / 60
        tick(bar, training)
    bar.close()
    training.writer.wait()
    training.heartbeat.beat(training.step, "end")
    if training.accelerator.is_main_process and not training.unsaved:
        print(by_clause(f"{training.run}: {told_end(training, done, before)}"), flush=True)
    if done:
        summary, rows = (None, None) if before else conclusion(training)
        training.tracker.finish(training.step, summary, rows, artifact_metadata=training.reported)


def look(training: Training, due: set[str], record: dict[str, float], done: bool) -> None:
    """Evaluate, log (`record` and what evaluating adds to it), preview and save, where due: with averaged weights, on
    the processes that have them whole. At the end of a run, `done`, these are the ones that it leaves."""
    if due <= {"log"}:
        log(training, record)
        return
    with whole_average(training) as average:
        if "evaluate" in due and average is not None:
            record |= evaluate(training, average)
        if done and average is not None:
            average = final_weights(training, average)
        if done and "evaluate" in due and average is not None:
            record |= judge(training, average)
        log(training, record)
        if average is not None:
            preview(training, average, due)
        if "save" in due:
            save(training, average, done)
    training.task.shown = {}


def log(training: Training, record: dict[str, float]) -> None:
    """A line of the record, if there is anything to say at this step."""
    if record:
        training.tracker.log(training.step, record)


def evaluate(training: Training, average: nn.Module) -> dict[str, float]:
    """Figures of the averaged weights, by split and name, on validation images if there are any; keeps the best."""
    training.heartbeat.beat(training.step, "validate")
    split = training.task.watched
    training.evaluation = figures_on(training, average, split)
    keep_if_best(training, average)
    return {f"{split}/{name}": value for name, value in training.evaluation.items()}


def judge(training: Training, final: nn.Module) -> dict[str, float]:
    """Figures of what the run leaves, on the images held out. Where there are validation images, these have not been
    used before."""
    training.heartbeat.beat(training.step, "validate")
    known = training.task.watched == "held_out"
    training.reported = training.evaluation if known else figures_on(training, final, "held_out")
    return {f"held_out/{name}": value for name, value in training.reported.items()}


def figures_on(training: Training, model: nn.Module, split: Split) -> dict[str, float]:
    """What the task finds on a split: on a GPU in the mixed precision of training, which is several times as fast. What
    is no number, as weights have grown too large, is left out and told."""
    accelerator = training.accelerator
    with accelerator.autocast() if accelerator.device.type == "cuda" else nullcontext():
        found = training.task.evaluate(model, split)
    strange = [name for name, value in found.items() if not math.isfinite(value)]
    if strange and accelerator.is_main_process:
        line = f"warning: step {training.step}: {', '.join(strange)} of {split}: not finite, and left out"
        tell(line)
    return {name: value for name, value in found.items() if name not in strange}


def preview(training: Training, average: nn.Module, due: set[str]) -> None:
    """Log the task's pictures, where that is due, and keep them for a snapshot of the same weights that shows them."""
    if "preview" not in due and not (training.task.shows and "save" in due):
        return
    training.heartbeat.beat(training.step, "preview")
    training.task.shown = training.task.preview(average)
    if "preview" in due:
        training.tracker.images(training.step, training.task.shown)
