"""How far a run is, and what is due at this step."""

from __future__ import annotations

import torch

from .state import Clock, Training

ASKED_EVERY = 16  # steps, at most, between looks at the clock of another process


def agreed_progress(training: Training) -> float:
    """How much of the run is done, by steps or by minutes, whichever is more."""
    config = training.config
    if not training.task.players:  # nothing to train: evaluated, previewed and saved at step 0
        return 1.0
    by_steps = training.step / config.steps if config.steps else 0.0
    return by_steps if config.minutes is None else max(by_steps, agreed_minutes(training) / config.minutes)


def agreed_minutes(training: Training) -> float:
    """The minutes of training, by the clock of rank 0: asked for in some steps, and taken to stand still between them.

    Asking waits for GPUs and for all processes, so it is done every 16th step; where steps are long, more often, so
    that no run goes on for more than a hundredth of its time too long.
    """
    config, clock = training.config, training.clock
    if training.accelerator.num_processes == 1:
        return training.minutes
    if clock is None or training.step >= clock.until:
        told = torch.tensor([training.minutes], dtype=torch.float64, device=training.accelerator.device)
        torch.distributed.broadcast(told, 0)
        minutes, steps = float(told), 1
        if clock is not None and minutes > clock.minutes:
            each = (minutes - clock.minutes) / (training.step - clock.step)
            steps = int(min(ASKED_EVERY, max(1.0, (config.minutes or 0.0) / 100 / each)))
        training.clock = clock = Clock(training.step, minutes, training.step + steps)
    return clock.minutes


def finished(training: Training) -> bool:
    """Whether the run has come to its end already, with nothing left to do."""
    at_rest = training.step == training.saved_step and not training.pending
    return at_rest and agreed_progress(training) >= 1


def due_now(training: Training, done: bool) -> set[str]:
    """Which of log, evaluate, preview and save are due at this step; at the step from which a run was resumed, only
    what was left undone."""
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
