"""How far a run is, and what is due at this step."""

from __future__ import annotations

import torch

from .state import Training


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
