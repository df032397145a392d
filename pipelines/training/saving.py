"""What a run leaves: its resume state, and the snapshot of averaged weights that is for users."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

from tokenizer.files import PathError

from ..config import UserError
from ..config.terminal import tell
from .best import figures_of
from .checkpoints.rotation import SPARE, states_in
from .checkpoints.sharded import agreed, gather
from .checkpoints.states import prepare_state
from .sharding import keeps_on_cpu

if TYPE_CHECKING:
    from .state import Training


def require_room(training: Training) -> None:
    """Raise `UserError`, before hours of training, if what they will write does not fit on the disk."""
    if training.accelerator.is_main_process and training.step < (training.config.steps or math.inf):
        needed, free = room(training)
        if free < needed:
            raise UserError(f"{training.run}: a save of this run needs {needed:,} bytes, {free:,} are free")


def room(training: Training) -> tuple[int, int]:
    """Bytes that a save needs, state and snapshot, by the sizes of tensors or of the last one; and what is free."""
    keeps = training.config.keep_best and training.task.watched == "validation"
    modules = [training.task.model, training.averaged, *([training.averaged] if keeps else [])]
    weights = [tensor.nbytes for module in modules for tensor in module.state_dict().values()]
    moments = [2 * p.nbytes for parameters in training.task.players.values() for p in parameters]
    last = states_in(training.run / "state")[-1:]
    written = sum(map(bytes_in, [*last, training.run / "tokenizer", training.run / "pipeline"]))
    return int(SPARE * max(written, sum(weights + moments))), shutil.disk_usage(training.run).free


def bytes_in(folder: Path) -> int:
    """What a folder takes of the disk, about: another process may put its links there, or another folder in its
    place."""
    found = 0
    with suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            found += 512 * path.lstat().st_blocks
    return found


@contextmanager
def whole_average(training: Training) -> Iterator[nn.Module | None]:
    """The averaged weights, whole: every process has them. Those of a sharded run, whose processes all have to enter
    this, are put together on the main process alone, None on the others; and on the GPU inside this block alone, as
    they may be larger than all else there.
    """
    if not training.sharded:
        yield training.averaged.module
        return
    gathered = training.gathered
    gather(training.averaged.module, gathered)
    if gathered is None or keeps_on_cpu():
        yield gathered
        return
    try:
        yield gathered.to(training.accelerator.device)
    finally:
        gathered.to("cpu")


def save(training: Training, average: nn.Module | None, done: bool = False) -> None:
    """Write the resume state and, where averaged weights are given, the user's snapshot of them, on the main process;
    of shards, every process writes its own. done: whether the run ends with these weights.

    The state is copied, and a thread writes it while training goes on; `training.writer.wait` waits for it. A disk that
    is full, or gone, costs a warning: what was saved before stays, and the run goes on to the next save.
    """
    training.writer.wait()
    training.saved_step, training.unsaved = training.step, ""
    training.heartbeat.beat(training.step, "save")
    main, sharded = training.accelerator.is_main_process, training.sharded
    facts = {"steps": training.step, "minutes": round(training.minutes, 3), **figures_of(training, done)}
    if url := training.tracker.run_url:
        facts["run_url"] = url
    needed, free = 0, 0
    if main:
        with suppress(OSError):  # the disk is gone, as writing will tell
            needed, free = room(training)
    told = partial(told_if_unsaved, training, training.step, needed, free)
    with told():
        with agreed(together=sharded):
            if main:
                training.tracker.flush()  # a state must not go on where a line is missing
            if free < needed and average is not None:
                raise OSError(errno.ENOSPC, "nothing was written")
            if main and average is not None:
                save_snapshot(training, average, facts)
        if main or sharded:
            write = prepare(training)
            if sharded:  # at once: a thread's collectives would come between those of training
                write()
            else:
                training.writer.start(told()(write))
    training.accelerator.wait_for_everyone()


def prepare(training: Training) -> Callable[[], Any]:
    """The resume state as it is now, and what writes it."""
    return prepare_state(
        training.run,
        training.step,
        model=training.task.model,
        ema=training.averaged,
        optimizers={name: getattr(o, "optimizer", o) for name, o in training.optimizers.items()},
        counters=training.counters(),
        config=training.identity,
        best=training.best_weights,
    )


@contextmanager
def told_if_unsaved(training: Training, step: int, needed: int, free: int) -> Iterator[None]:
    """Warn that `step` is not saved, on the main process, and keep it in mind. (The other numbers are of bytes.)"""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        if training.accelerator.is_main_process:
            training.unsaved = (
                f"step {step}: {training.run}: a save needs {needed:,} bytes, {free:,} are free ({error})"
            )
            tell(f"warning: not saved: {training.unsaved}; older states are kept")


def save_snapshot(training: Training, average: nn.Module, facts: dict[str, Any]) -> None:
    """Write the user's snapshot. If something that is not ours is in its place, the run goes on, and its state says
    that the snapshot is still to be written."""
    training.pending = []
    try:
        training.task.save(average, training.run, facts)
    except PathError as error:
        training.pending = ["save"]
        training.unsaved = f"step {training.step}: {error}"
        tell(f"warning: no snapshot: {error}")
