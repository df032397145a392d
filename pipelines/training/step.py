"""One step of training: every player's turn, the same on all processes, and nothing at all where it is not finite.

The optimizer takes no step before all processes have found the turn finite. (A codebook has moved by then, in the
forward pass.) Whether it is, a GPU decides by itself, and goes on: the host learns it a step later, and does then what
can wait (`settle`).
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.base import in_finest

from ..config import UserError
from .checkpoints.sharded import whole
from .schedule import copy_buffers, move_average
from .state import Training, Turn, Unread
from .task import Task

MAX_SKIPPED = 10


def take_step(training: Training, micro_batches: list[Any], lr: float) -> None:
    """Every player's turn with these micro-batches. Raises `UserError` if turns were skipped ten times in a row.

    On a GPU what came of it is read, and its weights are averaged, in the next step, or by `settle`: so the GPU has
    work meanwhile. After a step that was skipped, and on a CPU, it is read at once.
    """
    seed_step(training)
    playing = training.task.playing(training.step)
    turns = [play_turn(training, player, micro_batches, lr) for player in playing]
    training.step += 1
    copy_buffers(training.averaged, training.task.model)
    training.unread = sent(turns)
    if training.skipped_in_a_row or training.unread.arrived is None:
        settle(training)


def play_turn(training: Training, player: str, micro_batches: list[Any], lr: float) -> Turn:
    """Gradients over the micro-batches, then an optimizer step, if all is finite on all processes."""
    task, optimizer = training.task, training.optimizers[player]
    train_only(task, player)
    terms = accumulate(training, player, micro_batches)
    terms["gradient_norm"] = clip_gradients(training, player)
    values = agree(training, terms, training.stop.asked())
    taken = torch.isfinite(values).all()
    settle(training)  # the last step, whose weights are to be averaged before they move
    culprit = first_non_finite(task.model) if training.skipped_in_a_row and not bool(taken) else ""
    set_learning_rate(optimizer, lr * task.rates.get(player, 1.0))
    step_if(taken, optimizer)
    optimizer.zero_grad()
    return Turn(player, list(terms), values, culprit)


def sent(turns: list[Turn]) -> Unread:
    """On their way to the CPU, for which the host does not wait."""
    values = torch.cat([turn.values for turn in turns])
    if values.device.type != "cuda":
        return Unread(turns, values.cpu(), None)
    values, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
    arrived.record()
    return Unread(turns, values, arrived)


def settle(training: Training) -> None:
    """Read what came of the last step, if that was not done: its figures join the next report, and its weights the
    average, or it counts as skipped. To be called before anything of these is looked at. Raises `UserError` if it was
    the tenth such step in a row."""
    unread, training.unread = training.unread, None
    if unread is None:
        return
    if unread.arrived is not None:
        unread.arrived.synchronize()
    culprit, sizes = "", [len(turn.values) for turn in unread.turns]
    for turn, values in zip(unread.turns, unread.values.split(sizes), strict=True):
        told, *numbers = values.tolist()
        training.stopping |= told > 0
        sick = [name for name, value in zip(turn.names, numbers, strict=True) if not math.isfinite(value)]
        if sick:
            culprit = turn.culprit or sick[0]
        else:
            add_to_window(training, turn.player, dict(zip(turn.names, numbers, strict=True)))
    if culprit:
        count_skipped(training, culprit)
    else:
        move_average(training.averaged, training.task.model, training.config.ema_decay)
        training.skipped_in_a_row = 0


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
    """Add up gradients over the micro-batches, which are on the device (DDP sends only at the last); returns the mean
    of the logged terms."""
    task, accelerator, count = training.task, training.accelerator, len(micro_batches)
    totals: dict[str, Tensor] = {}
    for index, batch in enumerate(micro_batches):
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


def agree(training: Training, terms: dict[str, Tensor], told: bool) -> Tensor:
    """Whether any process was `told` to end (above 0), and the terms' means over processes, `(1 + len(terms),)`
    float64: one all-reduce for both.

    A value that is not finite on one process is not finite in the mean, so all decide alike.
    """
    device = training.accelerator.device
    values = [torch.full((), float(told), device=device), *(value.to(device) for value in terms.values())]
    stacked = in_finest(torch.stack(values))
    if training.accelerator.num_processes > 1:
        torch.distributed.all_reduce(stacked)
        stacked /= training.accelerator.num_processes
    return stacked


def step_if(taken: Tensor, optimizer: Any) -> None:
    """An optimizer step, if `taken`, a bool on the device: fused AdamW looks there, and does nothing if not."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if inner.defaults["fused"]:
        parameter = inner.param_groups[0]["params"][0]  # of a sharded run, it may be on the CPU
        inner.found_inf = (~taken).float().to(parameter.device)
        optimizer.step()
    elif bool(taken):
        optimizer.step()


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Of all groups of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def first_non_finite(model: nn.Module) -> str:
    """The name of the first gradient that is not finite; empty if there is none. The same on all processes."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(whole(parameter.grad)).all()):
            return f"the gradient of {name}"
    return ""


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
