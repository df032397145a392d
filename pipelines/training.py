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
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .arguments import read_file
from .checkpoint import latest_state, load_state, save_state
from .config import UserError, difference, to_yaml
from .processes import build_accelerator
from .schedule import TrainConfig, adamw, ema_update, learning_rate
from .task import Task
from .tracking import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED = 10


@dataclass
class Training:
    """Everything that changes while a task is trained."""

    task: Task
    config: TrainConfig
    run: Path
    accelerator: Accelerator
    averaged: AveragedModel
    optimizers: dict[str, Any]
    tracker: Tracker
    step: int = 0
    minutes: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    window: dict[str, list[float]] = field(default_factory=dict)
    """Sum and count of each logged term since the last report: who did not play, or was skipped, has fewer."""
    evaluation: dict[str, float] = field(default_factory=dict)
    saved_step: int = -1

    COUNTERS = ("minutes", "skipped", "skipped_in_a_row", "window", "evaluation")

    def counters(self) -> dict[str, Any]:
        """What a resumed run needs besides weights and optimizers."""
        return {name: getattr(self, name) for name in self.COUNTERS}


def train(build: Callable[[Accelerator], Task], config: Any) -> Path:
    """Run `build`'s task to its end under `config` (with `out`, `train` and `track`); returns the run folder.

    Started again with the same configuration it continues from the newest state. Raises `UserError` for a run folder
    that belongs to another configuration, a batch size that does not divide, or ten non-finite steps in a row.
    """
    accelerator, run = build_accelerator(), Path(config.out)
    shares = accelerator.num_processes * config.train.accumulate
    if config.train.batch_size % shares:
        raise UserError(
            f"train.batch_size: {config.train.batch_size} is not a multiple of processes x accumulate "
            f"({accelerator.num_processes} x {config.train.accumulate})"
        )
    if config.train.steps is None and config.train.minutes is None:
        raise UserError("train.steps: null needs train.minutes to end the run")
    check_folder(run, config)
    torch.manual_seed(config.train.seed)
    task = build(accelerator)
    claim_folder(run, config, accelerator)
    training = set_up(task, config, run, accelerator)
    try:
        fit(training)
    finally:
        training.tracker.close()
        accelerator.end_training()
    return run


def check_folder(run: Path, config: Any) -> None:
    """Raise `UserError` for a folder that belongs to a run with another configuration, or to something else."""
    path = run / "config.yaml"
    if path.is_file():
        free = {"out": None, "track": None}  # a run may be moved, and its numbers sent elsewhere
        changes = difference({**read_file(str(path)), **free}, {**config.model_dump(mode="json"), **free})
        if changes:
            raise UserError(
                f"{run}: belongs to a run with another configuration; choose another out=, nothing was "
                "overwritten. What differs:\n" + "\n".join(changes)
            )
    elif run.is_dir() and any(not entry.name.startswith(".tmp-") for entry in run.iterdir()):
        raise UserError(f"{run}: not empty and not a run folder; choose another out=, nothing was overwritten")


def claim_folder(run: Path, config: Any, accelerator: Accelerator) -> None:
    """Write `config.yaml` into the run folder, once all processes have found it free."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        temporary = run / ".tmp-config.yaml"
        temporary.write_text(to_yaml(config))
        temporary.replace(run / "config.yaml")  # killed in between, the run must not lose its configuration
    accelerator.wait_for_everyone()


def set_up(task: Task, config: Any, run: Path, accelerator: Accelerator) -> Training:
    """Place the task on the device, average its weights, give players optimizers, and load the newest state."""
    task.model.to(accelerator.device)
    averaged = AveragedModel(task.model, multi_avg_fn=ema_update(config.train.ema_decay), use_buffers=False)
    averaged.requires_grad_(False).eval()
    betas = {name: task.betas.get(name, config.train.betas) for name in task.players}
    optimizers = {name: adamw(players, config.train, betas[name]) for name, players in task.players.items()}
    state = newest_state(run, accelerator)
    step, counters = load_state(state, model=task.model, ema=averaged, optimizers=optimizers) if state else (0, {})
    task.nets = {name: accelerator.prepare_model(net.to(accelerator.device)) for name, net in task.nets.items()}
    optimizers = {name: accelerator.prepare_optimizer(optimizer) for name, optimizer in optimizers.items()}
    tracker = Tracker(run, config.track, config.model_dump(mode="json"), accelerator=accelerator, resume_step=step)
    if accelerator.is_main_process:
        count = sum(p.numel() for p in task.model.parameters())
        began = f"continuing from step {step}" if step else "starting"
        print(
            f"{run}: {began}; {count:,} parameters, {task.rows:,} training rows, {accelerator.num_processes} "
            f"process(es) on {accelerator.device}, {accelerator.mixed_precision} mixed precision",
            flush=True,
        )
    return Training(task, config.train, run, accelerator, averaged, optimizers, tracker, step,
                    saved_step=step or -1, **counters)  # fmt: skip


def newest_state(run: Path, accelerator: Accelerator) -> Path | None:
    """The newest good state, as the main process finds it (it also tidies up), told to all."""
    from accelerate.utils import broadcast_object_list

    found = [latest_state(run) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def batches(training: Training) -> Generator[list[Any], None, None]:
    """This process's micro-batches of each step, the next step's being made while this one's are used."""
    config, accelerator, task = training.config, training.accelerator, training.task
    size = config.batch_size // config.accumulate // accelerator.num_processes

    def make(step: int) -> list[Any]:
        indices, epochs = task.samples(config.batch_size, config.seed, step)
        shape = (config.accumulate, accelerator.num_processes, size)
        mine = [part.reshape(shape)[:, accelerator.process_index] for part in (indices, epochs)]
        return [task.batch(i, e, config.seed) for i, e in zip(*mine, strict=True)]

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
    bar = progress_bar(training)
    stream, since = batches(training), (training.step, time.monotonic())
    training.task.model.train()
    while True:
        progress = agreed_progress(training)
        due = due_now(training, progress >= 1)
        record: dict[str, float] = {}
        if "log" in due and training.window:
            record = report(training, progress, since)
            since = (training.step, time.monotonic())
            show(bar, training, record)
        if "evaluate" in due and training.accelerator.is_main_process:
            training.evaluation = training.task.evaluate(training.averaged.module)
            record |= {f"held_out/{name}": value for name, value in training.evaluation.items()}
        if record:
            tracker.log(training.step, record)
        if "preview" in due and training.accelerator.is_main_process:
            tracker.images(training.step, training.task.preview(training.averaged.module))
        if "save" in due:
            save(training)
        if progress >= 1:
            break
        training.task.progress = progress
        take_step(training, next(stream), learning_rate(config, training.step, progress))
        training.minutes = (time.monotonic() - began) / 60
        bar.update(1)
    stream.close()
    bar.close()


def due_now(training: Training, done: bool) -> set[str]:
    """Which of log, evaluate, preview and save this step asks for; nothing twice at the step a run was resumed from."""
    config, step = training.config, training.step
    if step == training.saved_step:
        return set()
    every = {"log": config.log_every, "evaluate": config.evaluate_every, "preview": config.preview_every,
             "save": config.save_every}  # fmt: skip
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


def take_step(training: Training, micro_batches: list[Any], lr: float) -> None:
    """Every player's turn: gradients over the micro-batches, then an optimizer step if all is finite on all ranks."""
    task, accelerator = training.task, training.accelerator
    seed = (training.config.seed * 1_000_003 + accelerator.process_index) * 1_000_003 + training.step
    torch.manual_seed(seed % (1 << 63))
    healthy = True
    for player in task.playing(training.step):
        parameters = task.players[player]
        buffers = [buffer.clone() for buffer in task.model.buffers()]
        for name, others in task.players.items():
            for parameter in others if len(task.players) > 1 else ():
                parameter.requires_grad_(name == player)
        terms = accumulate(training, player, micro_batches)
        norm = accelerator.clip_grad_norm_(parameters, training.config.clip)
        means = averaged_over_ranks(training, {**terms, "gradient_norm": torch.as_tensor(norm)})
        optimizer = training.optimizers[player]
        if all(math.isfinite(value) for value in means.values()):
            for group in optimizer.param_groups:
                group["lr"] = lr * task.rates.get(player, 1.0)
            optimizer.step()
            for name, value in means.items():
                key = name if len(task.players) == 1 else f"{player}/{name}"
                total, count = training.window.get(key, (0.0, 0))
                training.window[key] = [total + value, count + 1]
        else:
            healthy = False
            culprit = first_non_finite(task.model, means)
            for buffer, before in zip(task.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        optimizer.zero_grad()
    training.step += 1
    if healthy:
        training.averaged.update_parameters(task.model)
        training.skipped_in_a_row = 0
        return
    training.skipped += 1
    training.skipped_in_a_row += 1
    if training.skipped_in_a_row >= MAX_SKIPPED:
        raise UserError(
            f"step {training.step}: {MAX_SKIPPED} steps in a row were not finite; the first such tensor is "
            f"{culprit}. The last good state is kept; try a lower train.lr or train.clip"
        )


def accumulate(training: Training, player: str, micro_batches: list[Any]) -> dict[str, Tensor]:
    """Add up gradients over the micro-batches (DDP talks only at the last); returns the mean of the logged terms."""
    task, accelerator, count = training.task, training.accelerator, len(micro_batches)
    totals: dict[str, Tensor] = {}
    for index, batch in enumerate(micro_batches):
        batch = tuple(part.to(accelerator.device) if isinstance(part, Tensor) else part for part in batch)
        with ExitStack() as stack:
            if index < count - 1:
                for net in task.nets.values():
                    stack.enter_context(accelerator.no_sync(net))
            loss, terms = task.loss(player, batch, training.step)
            accelerator.backward(loss / count)
        for name, value in {"loss": loss, **terms}.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float() / count
    return totals


def averaged_over_ranks(training: Training, terms: dict[str, Tensor]) -> dict[str, float]:
    """Means over processes; a value that is not finite on one is not finite on all, so all decide alike."""
    stacked = torch.stack([value.to(training.accelerator.device).double() for value in terms.values()])
    if training.accelerator.num_processes > 1:
        torch.distributed.all_reduce(stacked)
        stacked /= training.accelerator.num_processes
    return dict(zip(terms, stacked.tolist(), strict=True))


def first_non_finite(model: nn.Module, terms: dict[str, float]) -> str:
    """The name of the first gradient that is not finite, else of the first such term of the loss."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {name}"
    return next(name for name, value in terms.items() if not math.isfinite(value))


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


def save(training: Training) -> None:
    """Write the resume state and the user's snapshot of the averaged weights, on the main process."""
    training.saved_step = training.step
    if training.accelerator.is_main_process:
        facts = {"steps": training.step, "minutes": round(training.minutes, 3), "evaluation": training.evaluation}
        optimizers = {name: getattr(o, "optimizer", o) for name, o in training.optimizers.items()}
        training.task.save(training.averaged.module, training.run, facts)
        save_state(training.run, training.step, model=training.task.model, ema=training.averaged,
                   optimizers=optimizers, counters=training.counters())  # fmt: skip
    training.accelerator.wait_for_everyone()


def progress_bar(training: Training) -> Any:
    """A bar on the main process's terminal, with loss, speed and time left; nothing where there is no terminal."""
    from tqdm import tqdm

    hidden = None if training.accelerator.is_main_process and training.task.players else True
    return tqdm(total=training.config.steps, initial=training.step, unit="step", dynamic_ncols=True, disable=hidden)


def show(bar: Any, training: Training, record: dict[str, float]) -> None:
    """The report in the bar, or as a line where output goes to a file."""
    loss = next((value for name, value in record.items() if name.endswith("loss")), math.nan)
    if training.accelerator.is_main_process and bar.disable:
        print(f"step {training.step}: loss {loss:.4f}, {record['images_per_second']:.0f} images/s, "
              f"{training.minutes:.1f} min", file=sys.stderr, flush=True)  # fmt: skip
    minutes = training.config.minutes
    left = f", {max(0.0, minutes - training.minutes):.1f} of {minutes:g} min left" if minutes else ""
    bar.set_postfix_str(f"loss {loss:.4f}{left}")
