"""Cross-entropy over a large vocabulary without copies of all logits.

The plain way keeps a float32 copy of the logits and their log-softmax for the backward pass, and has gradients as large
on its way: each takes 537 MB for 32 images of 256 ids below 16,384. From `LARGE` logits on, the logits are kept as the
model made them. Some rows at a time are cast and normalised, and again in the backward pass, which gives the gradient
in their own type. (Hsu et al. 2024, "Liger Kernel", do so in one kernel.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LARGE = 1 << 25
"""The number of logits from which on their copies matter."""
AT_ONCE = 1 << 24
"""About how many are in float32 at a time."""


class Likelihood(nn.Module):
    """A prior and its own loss in one call, which DDP wraps and autocast covers: accelerate casts what a module returns
    to float32, and logits are the largest tensor of a step. `Prior.loss` without its checks, which wait for a GPU."""

    def __init__(self, prior: Any) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, tokens: Tensor, labels: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`Prior.loss` of `tokens` `(B, *grid.shape)`, a scalar in nats per token, and what to log of it: its
        `bits_per_token`, where `is_likelihood`. inputs: `Prior.training_inputs`."""
        loss = self.prior.loss_from_outputs(self.prior.put_out(tokens, labels, **inputs), tokens, **inputs)
        return loss, {"bits_per_token": loss.detach() / math.log(2)} if is_likelihood(self.prior) else {}


def is_likelihood(prior: Any) -> bool:
    """Whether the loss of a prior is its negative log-likelihood per token, or a bound on it. That of `masked` is not
    under a schedule that masks more tokens than the linear one, nor with smoothed labels."""
    schedule = getattr(prior.config, "schedule", "linear")
    return schedule == "linear" and not getattr(prior.config, "label_smoothing", 0.0)


def mean_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean of `token_nats`, a scalar; `tokens` are `(B, ...)`."""
    if logits.numel() < LARGE:
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    return token_nats(logits, tokens).mean()


def token_nats(logits: Tensor, tokens: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log p of each token, float32 `(B, N)`, for logits `(B, N, V)` of any type. label_smoothing: the share of the
    target that is spread over all ids."""
    ids = tokens.flatten(1)
    if logits.numel() < LARGE:
        by_id = logits.float().transpose(1, 2)
        return F.cross_entropy(by_id, ids, reduction="none", label_smoothing=label_smoothing)
    return SomeAtATime.apply(logits.flatten(0, 1), ids.flatten(), label_smoothing).view_as(ids)


class SomeAtATime(torch.autograd.Function):
    """Cross-entropy of rows of logits `(rows, V)` and ids `(rows,)`: float32 `(rows,)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, smoothing: float) -> Tensor:
        """Keeps its arguments alone."""
        ctx.save_for_backward(logits, ids)
        ctx.smoothing = smoothing
        parts = zip(logits.split(rows_at_once(logits)), ids.split(rows_at_once(logits)), strict=True)
        nats = [F.cross_entropy(part.float(), at, reduction="none", label_smoothing=smoothing) for part, at in parts]
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the logits, in their type: what is expected of each id, less what is there."""
        logits, ids = ctx.saved_tensors
        found, smoothing = torch.empty_like(logits), ctx.smoothing
        every = [tensor.split(rows_at_once(logits)) for tensor in (logits, ids[:, None], grad[:, None], found)]
        for part, at, by, place in zip(*every, strict=True):
            shares = part.softmax(-1, dtype=torch.float32)
            if smoothing:
                shares.sub_(smoothing / logits.shape[1])
            shares.scatter_(1, at, shares.gather(1, at) - (1 - smoothing))
            place.copy_(shares.mul_(by))
        return found, None, None


def rows_at_once(logits: Tensor) -> int:
    """How many rows are in float32 at a time."""
    return max(1, AT_ONCE // logits.shape[1])
