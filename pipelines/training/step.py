"""One step of training: every player's turn, the same on all processes, and nothing at all where it is not finite.

A turn changes nothing before all processes have found it finite: forward passes only collect what moves by itself (a
codebook, running means), and `finish_step` moves it. So a turn that is not finite is skipped by forgetting it.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import UserError
from .checkpoints.sharded import whole
from .task import Task

if TYPE_CHECKING:
    from .state import Training

MAX_SKIPPED = 10


class Turn(NamedTuple):
    """What came of a player's turn: the means of all that is logged; or, where it was skipped, none of them, and the
    name of the first tensor that was not finite."""

    means: dict[str, float]
    culprit: str = ""


def take_step(training: Training, micro_batches: list[Any], lr: float) -> None:
    """Every player's turn with these micro-batches; then the weights are averaged, if all turns were taken. Raises
    `UserError` if that was not so ten times in a row."""
    seed_step(training)
    culprit = ""
    for player in training.task.playing(training.step):
        turn = play_turn(training, player, micro_batches, lr)
        add_to_window(training, player, turn.means)
        culprit = turn.culprit or culprit
    training.step += 1
    if culprit:
        count_skipped(training, culprit)
    else:
        training.averaged.update_parameters(training.task.model)
        training.skipped_in_a_row = 0


def play_turn(training: Training, player: str, micro_batches: list[Any], lr: float) -> Turn:
    """Gradients over the micro-batches, then an optimizer step, if all is finite on all processes."""
    task, optimizer = training.task, training.optimizers[player]
    train_only(task, player)
    terms = accumulate(training, player, micro_batches)
    terms["gradient_norm"] = clip_gradients(training, player)
    means, told = agree(training, terms, training.stop.asked())
    training.stopping |= told
    culprit = ""
    if all(math.isfinite(value) for value in means.values()):
        set_learning_rate(optimizer, lr * task.rates.get(player, 1.0))
        optimizer.step()
    else:
        culprit = first_non_finite(task.model, means)
    optimizer.zero_grad()
    found = task.finish_step(player, taken=not culprit)
    return Turn({}, culprit) if culprit else Turn({**means, **as_numbers(found)})


def seed_step(training: Training) -> None:
    """Make torch's random numbers a function of (seed, process, step)."""
    seed = (training.config.seed * 1_000_003 + training.accelerator.process_index) * 1_000_003 + training.step
    torch.manual_seed(seed % (1 << 63))


def train_only(task: Task, player: str) -> None:
    """Let gradients reach this player's parameters alone."""
    if len(task.players) == 1:
        return
    for name, parameters in task.players.items():
        for parameter in parameters:
            parameter.requires_grad_(name == player)


def accumulate(training: Training, player: str, micro_batches: list[Any]) -> dict[str, Tensor]:
    """Add up gradients over the micro-batches (DDP sends only at the last); returns the mean of the logged terms."""
    task, accelerator, count = training.task, training.accelerator, len(micro_batches)
    totals: dict[str, Tensor] = {}
    for index, batch in enumerate(micro_batches):
        batch = tuple(
            part.to(accelerator.device, non_blocking=True) if isinstance(part, Tensor) else part for part in batch
        )
        with ExitStack() as stack:
            if index < count - 1 and not training.sharded:  # sharded: whole gradients may not fit
                for net in task.nets.values():
                    stack.enter_context(accelerator.no_sync(net))
            loss, terms = task.loss(player, batch, training.step)
            accelerator.backward(loss / count)
        for name, value in {"loss": loss, **terms}.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float() / count
    return totals


def clip_gradients(training: Training, player: str) -> Tensor:
    """Scale the player's gradients down to `train.clip`; returns the norm that they had."""
    norm = training.accelerator.clip_grad_norm_(training.task.players[player], training.config.clip)
    return torch.as_tensor(whole(norm))


def agree(training: Training, terms: dict[str, Tensor], told: bool) -> tuple[dict[str, float], bool]:
    """The terms' means over processes, and whether any process was told to end: one all-reduce for both.

    A value that is not finite on one process is not finite in the mean, so all decide alike.
    """
    values = [*terms.values(), torch.tensor(float(told))]
    stacked = torch.stack([value.to(training.accelerator.device).double() for value in values])
    if training.accelerator.num_processes > 1:
        torch.distributed.all_reduce(stacked)
        stacked /= training.accelerator.num_processes
    *means, share_told = stacked.tolist()
    return dict(zip(terms, means, strict=True)), share_told > 0


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Of all groups of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def first_non_finite(model: nn.Module, terms: dict[str, float]) -> str:
    """The name of the first gradient that is not finite, else of the first such term of the loss; the same on all."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(whole(parameter.grad)).all()):
            return f"the gradient of {name}"
    return next(name for name, value in terms.items() if not math.isfinite(value))


def as_numbers(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Scalars by name, for which a GPU is waited for once."""
    if not scalars:
        return {}
    return dict(zip(scalars, torch.stack([value.float() for value in scalars.values()]).tolist(), strict=True))


def add_to_window(training: Training, player: str, means: dict[str, float]) -> None:
    """Add to the sums of which the next report is the mean."""
    for name, value in means.items():
        key = name if len(training.task.players) == 1 else f"{player}/{name}"
        total, count = training.window.get(key, (0.0, 0))
        training.window[key] = [total + value, count + 1]


def count_skipped(training: Training, culprit: str) -> None:
    """Count the step. Raises `UserError` if it is the tenth in a row."""
    training.skipped += 1
    training.skipped_in_a_row += 1
    if training.skipped_in_a_row >= MAX_SKIPPED:
        raise UserError(
            f"step {training.step}: {MAX_SKIPPED} steps in a row were not finite; the first such tensor is "
            f"{culprit}. The last good state is kept; try a lower train.lr or train.clip"
        )
