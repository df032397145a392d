"""Decoding by confidence: draw all masked tokens, keep those that the model is surest of, and again (MaskGIT, Chang et
al. 2022). And the schedules that say how many are masked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenizer.base import TokenGrid, in_finest

from ..requests import Rows
from .noise import GumbelNoise, gumbel
from .settings import Sampler, is_number
from .watching import Watch

SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (u * (math.pi / 2)).cos(),
    "arccos": lambda u: u.acos() * (2 / math.pi),
    "square": lambda u: 1 - u**2,
}
"""The share of tokens that is masked, from 1 at u = 0 to 0 at u = 1. All are concave, so that K steps of sampling
reveal a token each."""
ROUNDS_DOWN = 1e-9  # a whole number may come out a hair below


@dataclass(frozen=True)
class MaskedSampler(Sampler):
    """steps: draw in so many passes; None takes a pass per block of the order. `schedule` says how many tokens stay
    masked after each.

    With an `order`, a pass draws the next tokens of it. **This is exact**: it is an ordered partition of the grid
    (`Masked.stepwise`), whose density `log_prob` has.

    Without one, each pass draws all unknown tokens and keeps the most confident ones, as MaskGIT does, by log p plus
    Gumbel noise times `confidence_temperature`, which falls to 0. Known tokens stay as they are and are seen by all
    others. **This is not exact**: what is kept depends on what was drawn, so that the samples' distribution is not that
    of any `log_prob`; more steps, and a higher `confidence_temperature` (random orders), come closer. A position has
    one draw of noise for all steps, so where the tokens are independent the distribution is right for any number of
    steps. Here rounding may let an image depend on its batch. A step is a block: guidance with an end takes for all its
    tokens the share that is known before it.
    """

    steps: int | None = None
    confidence_temperature: float = 4.5
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        heat = self.confidence_temperature
        if not (is_number(heat) and 0 <= heat < float("inf")):
            raise ValueError(f"confidence_temperature must be a finite number >= 0 (got {heat})")
        if self.schedule not in list(SCHEDULES):
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} (got {self.schedule!r})")

    def check(self, grid: TokenGrid) -> None:
        """Raise `ValueError` for more steps than tokens."""
        if self.steps is not None and (type(self.steps) is not int or not 1 <= self.steps <= len(grid)):
            raise ValueError(f"steps must be a whole number from 1 to {len(grid)} (got {self.steps})")

    def for_a_walk(self) -> MaskedSampler:
        """Without `steps`, which cut an order otherwise, or find one of their own."""
        return replace(self, steps=None)

    def passes(self) -> list[tuple[float, float]]:
        """For each step the share of the unknown tokens that stays masked, and how much noise counts against
        confidence."""
        assert self.steps is not None
        share = torch.arange(1, self.steps + 1, dtype=torch.float64, device="cpu") / self.steps
        masked = SCHEDULES[self.schedule](share).tolist()
        noise = (self.confidence_temperature * (1 - share)).tolist()
        return list(zip(masked, noise, strict=True))

    def sizes(self, unknown: int) -> tuple[int, ...]:
        """How many of so many tokens each step draws, where it draws any."""
        left, sizes = unknown, []
        for share, _ in self.passes():
            still = max(0, min(left - 1, int(unknown * share + ROUNDS_DOWN)))
            sizes.append(left - still)
            left = still
        return tuple(size for size in sizes if size)

    def last_size(self, unknown: Tensor) -> Tensor:
        """How many of `unknown` (B,) tokens the last step draws that draws any."""
        left = last = unknown
        for share, _ in self.passes():
            left = still_masked(left, unknown, share)
            last = torch.where(left > 0, left, last)
        return last


def still_masked(left: Tensor, unknown: Tensor, share: float) -> Tensor:
    """How many tokens stay masked, `(B,)`, where `share` of the `unknown` should, and before the step `left` were. At
    least one is revealed, until none is left."""
    return torch.minimum(left - 1, (in_finest(unknown) * share + ROUNDS_DOWN).long()).clamp(min=0)


def fill_in(prior: Any, rows: Rows, sampler: MaskedSampler, watch: Watch) -> Tensor:
    """Tokens `(B, N)`, raster order, in as many passes as there are steps."""
    size = rows.given.shape[1]
    labels = sampler.doubled(rows.labels, prior.num_classes)
    noise = GumbelNoise(rows.generators, size, prior.mask, prior.device).of(0, size)
    ids = torch.where(rows.keep, rows.given, prior.mask)
    left = unknown = (~rows.keep).sum(1)
    before_last = (size - sampler.last_size(unknown)).clamp(min=1)
    for share, temperature in watch.over(sampler.passes()):
        if not bool(left.any()):
            break
        decided = ((size - left) / before_last).clamp(max=1)
        scale = sampler.scale_at(decided[:, None])
        logits = sampler.guide(prior.predict(sampler.doubled(ids), labels).float(), scale)
        drawn = sampler.choose(logits, noise)
        confidence = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        jitter = torch.stack([gumbel((size,), generator) for generator in rows.generators]).to(prior.device)
        confidence = (confidence + temperature * jitter).masked_fill(ids != prior.mask, torch.inf)
        left = still_masked(left, unknown, share)
        ranks = confidence.argsort(dim=1, descending=True, stable=True).argsort(1)
        ids = torch.where((ids == prior.mask) & (ranks < (size - left)[:, None]), drawn, ids)
        watch.took(rows, ids, ids != prior.mask)
    watch.drew(rows, ids)
    return ids
