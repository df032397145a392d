"""One step of training: every player's turn, the same on all processes, and nothing at all where it is not finite."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import UserError
from .checkpoints.sharded import whole

if TYPE_CHECKING:
    from .state import Training

MAX_SKIPPED = 10


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
        norm = whole(accelerator.clip_grad_norm_(parameters, training.config.clip))
        asked = torch.tensor(float(training.stop.asked()))
        means = averaged_over_ranks(training, {**terms, "gradient_norm": torch.as_tensor(norm), "stop": asked})
        training.stopping |= means.pop("stop") > 0
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
        batch = tuple(
            part.to(accelerator.device, non_blocking=True) if isinstance(part, Tensor) else part for part in batch
        )
        with ExitStack() as stack:
            if index < count - 1 and not training.sharded:  # there, whole gradients are what memory is short of
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
    """The name of the first gradient that is not finite, else of the first such term of the loss; the same on all."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(whole(parameter.grad)).all()):
            return f"the gradient of {name}"
    return next(name for name, value in terms.items() if not math.isfinite(value))
