"""How a run begins, or goes on: everything in its place, and a line that says so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import AveragedModel

from ..config.terminal import by_clause
from ..processes.precision import told_precision
from .blocks import prepare_blocks
from .checkpoints.counters import check_counters
from .checkpoints.states import STATE, load_best, load_state
from .extending import told_changes
from .heartbeat import Heartbeat
from .optimizers import make_optimizer
from .progress import finished
from .run_folder import identity_of, newest_state
from .sharding import shard
from .state import Training
from .stopping import Stop
from .task import Task
from .tracking import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    averaged = AveragedModel(task.model)
    averaged.requires_grad_(False).eval()
    prepare_blocks(task.nets.values(), config.train)
    gathered = shard(task, averaged, accelerator) if sharded else None
    betas = {name: task.betas.get(name, config.train.betas) for name in task.players}
    matrices, decaying = task.matrices(), task.decaying()
    bf16 = accelerator.device.type == "cuda" or accelerator.mixed_precision == "bf16"
    state = newest_state(run, config, accelerator, task.begun)
    optimizers = {
        name: make_optimizer(players, matrices, decaying, config.train, betas[name], bf16)
        for name, players in task.players.items()
    }
    step, counters = load_state(state, model=task.model, ema=averaged, optimizers=optimizers) if state else (0, {})
    best = None
    if state:
        check_counters(counters, state / STATE)
        if accelerator.is_main_process:
            best = load_best(state, averaged.module, expected=bool(counters.get("best")))
    if not sharded:
        task.nets = {name: accelerator.prepare_model(net.to(accelerator.device)) for name, net in task.nets.items()}
        optimizers = {name: accelerator.prepare_optimizer(optimizer) for name, optimizer in optimizers.items()}
    began = counters.pop("precision", None)
    # The line of a pending log is written again, also that of step 1: the run goes on all the same.
    logged = step - 0.5 * ("log" in counters.get("pending", []))
    active, settings = accelerator.is_main_process, config.model_dump(mode="json")
    tracker = Tracker(run, config.track, settings, active=active, resume_step=logged)
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
        precision=accelerator.mixed_precision,
        began=began,
        identity=identity_of(config, task.begun),
        **counters,
    )


def announce(training: Training, changes: list[str], reason: str = "") -> None:
    """Say that the run begins or goes on, with what, and which of its settings have changed. reason: why it has this
    precision."""
    accelerator, task, step = training.accelerator, training.task, training.step
    if finished(training) or not accelerator.is_main_process:
        return
    count = sum(p.numel() for p in task.model.parameters())
    processes = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
    validating = f", {task.evaluated['validation']:,} for validation" if "validation" in task.evaluated else ""
    line = (
        f"{training.run}: {f'continuing from step {step}' if step else 'starting'}; {count:,} parameters, "
        f"{task.rows:,} training rows{validating}, {processes} on {accelerator.device}, "
        f"{training.precision} mixed precision{reason and f' ({reason})'}"
        f"{', weights sharded' if training.sharded else ''}"
    )
    print(by_clause(line), flush=True)
    gpu_has_bf16 = accelerator.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if not reason and (line := told_precision(training.precision, gpu_has_bf16)):
        print(f"{training.run}: {line}", flush=True)
    if task.players and task.watched == "held_out":
        what = "figures while training are of the images held out, and the last weights are kept"
        print(f"{training.run}: no images for validation: {what}", flush=True)
    if training.began not in (None, training.precision):
        what = f"{training.began} -> {training.precision} from here on; not the same as a run that began that way"
        print(f"{training.run}: mixed precision {what}", flush=True)
    if step and changes:
        print(f"{training.run}: {told_changes(changes)}", flush=True)
