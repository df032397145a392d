"""The training loop of both stages: set up, fit, evaluate, save.

It knows a task by its model, its players (each has parameters, an optimizer and a turn), its loss and its preview. The
batch is a function of (seed, step) and randomness of (seed, rank, step), so an interrupted run that is started again
with the same command continues to the bit. `accelerate` owns devices, precision and processes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..config import UserError
from ..config.command import Interrupted
from ..tracking import Tracker
from ..tracking.boards import require_installed
from .best import final_weights, keep_if_best
from .blocks import prepare_blocks
from .checkpoints.counters import check_counters
from .checkpoints.states import STATE, load_best, load_state
from .extending import require_alike, told_changes
from .heartbeat import Heartbeat, told_where
from .processes import build_accelerator
from .run_folder import check_folder, claim_folder, identity_of, newest_state
from .saving import averaged_model, require_room, save
from .schedule import adamw, ema_update, learning_rate
from .sharding import is_sharding, require_shardable, shard
from .state import Training
from .step import take_step
from .stopping import Stop, heeded
from .task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(build: Callable[[Accelerator], Task], config: Any) -> Path:
    """Run `build`'s task to its end under `config` (with `out`, `train` and `track`); returns the run folder.

    Started again with the same configuration it continues from the newest state; what may differ says `run_folder`.
    Signals end it early, saved (see `stopping`). Raises `UserError` for a run folder that belongs to another
    configuration, a batch size that does not divide, ten non-finite steps in a row, or a last state that could not be
    saved; `ProcessLost` when another process is; `Interrupted`, a KeyboardInterrupt, after Ctrl-C, saved.
    """
    accelerator, run = build_accelerator(config.train.timeout), Path(config.out)
    shares = accelerator.num_processes * config.train.accumulate
    if config.train.batch_size % shares:
        raise UserError(
            f"train.batch_size: {config.train.batch_size} is not a multiple of processes x accumulate "
            f"({accelerator.num_processes} x {config.train.accumulate})"
        )
    if config.train.steps is None and config.train.minutes is None:
        raise UserError("train.steps: null needs train.minutes to end the run")
    require_installed(config.track.trackers)
    require_alike(config.train)
    changes = check_folder(run, config)
    torch.manual_seed(config.train.seed)
    sharded = is_sharding(accelerator)
    task = build(accelerator)
    if sharded:
        require_shardable(task)
    with claim_folder(run, config, accelerator, task.snapshots):
        heartbeat = Heartbeat(run, accelerator.process_index, accelerator.num_processes, config.train.timeout)
        with told_where(heartbeat):
            training = set_up(task, config, run, accelerator, heartbeat, sharded)
            with heeded(training.stop, alone=heartbeat.world == 1):
                try:
                    announce(training, changes)
                    require_room(training)
                    fit(training)
                finally:
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


def set_up(
    task: Task,
    config: Any,
    run: Path,
    accelerator: Accelerator,
    heartbeat: Heartbeat | None = None,
    sharded: bool = False,
) -> Training:
    """Place the task on the device, average its weights, give players optimizers, and load the newest state."""
    if not sharded:
        task.model.to(accelerator.device)
    averaged = AveragedModel(task.model, multi_avg_fn=ema_update(config.train.ema_decay), use_buffers=False)
    averaged.requires_grad_(False).eval()
    prepare_blocks(task.nets.values(), config.train)
    gathered = shard(task, averaged, accelerator) if sharded else None
    betas = {name: task.betas.get(name, config.train.betas) for name in task.players}
    optimizers = {name: adamw(players, config.train, betas[name]) for name, players in task.players.items()}
    state = newest_state(run, config, accelerator)
    step, counters = load_state(state, model=task.model, ema=averaged, optimizers=optimizers) if state else (0, {})
    best = None
    if state:
        check_counters(counters, state / STATE)
        if accelerator.is_main_process:
            best = load_best(state, averaged.module, expected=bool(counters.get("best")))
    if not sharded:
        task.nets = {name: accelerator.prepare_model(net.to(accelerator.device)) for name, net in task.nets.items()}
        optimizers = {name: accelerator.prepare_optimizer(optimizer) for name, optimizer in optimizers.items()}
    logged = step - ("log" in counters.get("pending", []))  # that line is still to be written, whoever began to
    tracker = Tracker(run, config.track, config.model_dump(mode="json"), accelerator=accelerator, resume_step=logged)
    heartbeat = heartbeat or Heartbeat(run, 0, 1, config.train.timeout)
    return Training(
        task,
        config.train,
        run,
        accelerator,
        averaged,
        optimizers,
        tracker,
        heartbeat,
        Stop(run),
        sharded,
        gathered,
        step,
        best_weights=best,
        saved_step=step or -1,
        identity=identity_of(config),
        **counters,
    )


def announce(training: Training, changes: list[str]) -> None:
    """Say that the run begins or goes on, with what, and which settings of it are no longer what they were."""
    accelerator, task, step = training.accelerator, training.task, training.step
    if finished(training) or not accelerator.is_main_process:
        return
    count = sum(p.numel() for p in task.model.parameters())
    validating = f", {task.evaluated['validation']:,} for validation" if "validation" in task.evaluated else ""
    print(
        f"{training.run}: {f'continuing from step {step}' if step else 'starting'}; {count:,} parameters, "
        f"{task.rows:,} training rows{validating}, {accelerator.num_processes} process(es) on {accelerator.device}, "
        f"{accelerator.mixed_precision} mixed precision{', weights sharded' if training.sharded else ''}",
        flush=True,
    )
    if task.players and task.watched == "held_out":
        what = "figures while training are of the images held out, and the last weights are kept"
        print(f"{training.run}: no images for validation: {what}", flush=True)
    if step and changes:
        print(f"{training.run}: {told_changes(changes)}", flush=True)


def finished(training: Training) -> bool:
    """Whether the run has come to its end already, with nothing left to do."""
    at_rest = training.step == training.saved_step and not training.pending
    return at_rest and agreed_progress(training) >= 1


def batches(training: Training) -> Generator[list[Any], None, None]:
    """This process's micro-batches of each step, the next step's being made while this one's are used."""
    config, accelerator, task = training.config, training.accelerator, training.task
    size = config.batch_size // config.accumulate // accelerator.num_processes

    def make(step: int) -> list[Any]:
        indices, epochs = task.samples(config.batch_size, config.seed, step)
        shape = (config.accumulate, accelerator.num_processes, size)
        mine = [part.reshape(shape)[:, accelerator.process_index] for part in (indices, epochs)]
        micro = [task.batch(i, e, config.seed) for i, e in zip(*mine, strict=True)]
        if accelerator.device.type == "cuda":  # pinned memory is copied without the host waiting for it
            micro = [tuple(p.pin_memory() if isinstance(p, Tensor) else p for p in batch) for batch in micro]
        return micro

    with ThreadPoolExecutor(1) as pool:
        step = training.step
        following = pool.submit(make, step)
        while True:
            ready, step = following.result(), step + 1
            following = pool.submit(make, step)
            yield ready


def fit(training: Training) -> None:
    """Report, evaluate, preview and save when due, then step; until the steps or the minutes are used up."""
    config, tracker, began = training.config, training.tracker, time.monotonic() - 60 * training.minutes
    main, beat = training.accelerator.is_main_process, training.heartbeat.beat
    before = finished(training)
    bar = progress_bar(training, hidden=before)
    stream, since = batches(training), (training.step, time.monotonic())
    training.task.model.train()
    while True:
        progress = agreed_progress(training)
        due = due_now(training, progress >= 1)
        if training.stopping and progress < 1:
            training.pending = sorted(due)
            save(training, None)
            break
        average = averaged_model(training) if due - {"log"} else None
        record: dict[str, float] = {}
        if "log" in due and training.window:
            record = report(training, progress, since)
            since = (training.step, time.monotonic())
            show(bar, training, record)
        if "evaluate" in due and average is not None:
            beat(training.step, "validate")
            record |= evaluate(training, average)
        if progress >= 1 and average is not None:
            average = final_weights(training, average)
            if "evaluate" in due:
                beat(training.step, "validate")
                record |= judge(training, average)
        if record:
            tracker.log(training.step, record)
        if "preview" in due and average is not None:
            beat(training.step, "preview")
            tracker.images(training.step, training.task.preview(average))
        if "save" in due:
            save(training, average, progress >= 1)
        if progress >= 1:
            break
        beat(training.step, "train")
        training.task.progress = progress
        take_step(training, next(stream), learning_rate(config, training.step, progress))
        training.minutes = (time.monotonic() - began) / 60
        bar.update(1)
    stream.close()
    bar.close()
    beat(training.step, "end")
    if progress >= 1:
        tracker.artifact(training.step, training.reported)
    if main and not training.unsaved:
        print(f"{training.run}: {told_end(training, progress >= 1, before)}", flush=True)


def evaluate(training: Training, average: nn.Module) -> dict[str, float]:
    """Figures of the averaged weights, by split and name, on validation images if there are any; keeps the best."""
    split = training.task.watched
    training.evaluation = training.task.evaluate(average, split)
    keep_if_best(training, average)
    return {f"{split}/{name}": value for name, value in training.evaluation.items()}


def judge(training: Training, final: nn.Module) -> dict[str, float]:
    """Figures of what the run leaves, on the images held out, at which nothing has looked while there were others."""
    known = training.task.watched == "held_out"
    training.reported = training.evaluation if known else training.task.evaluate(final, "held_out")
    return {f"held_out/{name}": value for name, value in training.reported.items()}


def told_end(training: Training, done: bool, before: bool) -> str:
    """Where the run has come to: what there is of it, and what comes next. before: whether it had come there before."""
    if not done:
        return f"told to end at step {training.step}; the same command continues"
    task, minutes = training.task, f"{training.minutes:.1f} min"
    trained = f"{training.step:,} steps in {minutes}" if task.players else "nothing to train"
    if training.best and training.best["step"] != training.step:
        trained += f", of which step {training.best['step']:,} was best"
    quality = task.quality(training.reported or training.evaluation)
    begin, nothing = ("already finished", "; nothing to do") if before else ("done", "")
    return f"{begin}: {trained}{quality and f', {quality}'}{nothing}; {task.outcome(training.run)}"


def due_now(training: Training, done: bool) -> set[str]:
    """Which of log, evaluate, preview and save this step asks for; nothing twice at the step a run was resumed from."""
    config, step = training.config, training.step
    if step == training.saved_step:
        left, training.pending = set(training.pending), []
        return left
    every = {
        "log": config.log_every,
        "evaluate": config.evaluate_every,
        "preview": config.preview_every,
        "save": config.save_every,
    }
    due = {name for name, steps in every.items() if done or (step and step % steps == 0)}
    return due | {"preview"} if step == 0 else due


def agreed_progress(training: Training) -> float:
    """How much of the run is done, by steps or by minutes, whichever is more; rank 0's clock decides for all."""
    config = training.config
    if not training.task.players:  # nothing to train: evaluated, previewed and saved at step 0
        return 1.0
    by_steps = training.step / config.steps if config.steps else 0.0
    if config.minutes is None:
        return by_steps
    progress = torch.tensor([max(by_steps, training.minutes / config.minutes)], dtype=torch.float64)
    if training.accelerator.num_processes > 1:
        torch.distributed.broadcast(progress := progress.to(training.accelerator.device), 0)
    return float(progress)


def report(training: Training, progress: float, since: tuple[int, float]) -> dict[str, float]:
    """Means of the logged terms since the last report, speed and learning rate; starts a new window."""
    record = {name: total / count for name, (total, count) in training.window.items()}
    training.window = {}
    steps, seconds = training.step - since[0], max(1e-9, time.monotonic() - since[1])
    images = steps * training.config.batch_size / seconds
    return record | {
        "learning_rate": learning_rate(training.config, training.step, progress),
        "images_per_second": images,
        "tokens_per_second": images * training.task.tokens_per_row,
        "minutes": training.minutes,
        "skipped_steps": training.skipped,
    }


def progress_bar(training: Training, hidden: bool) -> Any:
    """A bar on the main process's terminal, with loss, speed and time left; nothing where there is no terminal."""
    from tqdm import tqdm

    shown = training.accelerator.is_main_process and training.task.players and not hidden
    return tqdm(
        total=training.config.steps,
        initial=training.step,
        unit="step",
        dynamic_ncols=True,
        disable=None if shown else True,
    )


def show(bar: Any, training: Training, record: dict[str, float]) -> None:
    """The report in the bar, or as a line where output goes to a file."""
    loss = next((value for name, value in record.items() if name.endswith("loss")), math.nan)
    if training.accelerator.is_main_process and bar.disable:
        print(
            f"step {training.step}: loss {loss:.4f}, {record['images_per_second']:.0f} images/s, "
            f"{training.minutes:.1f} min",
            file=sys.stderr,
            flush=True,
        )
    minutes = training.config.minutes
    left = f", {max(0.0, minutes - training.minutes):.1f} of {minutes:g} min left" if minutes else ""
    bar.set_postfix_str(f"loss {loss:.4f}{left}")
