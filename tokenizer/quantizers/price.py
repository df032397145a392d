"""Codes with a price: entropy-constrained vector quantization (Chou, Lookabaugh and Gray 1989).

The nearest code costs the second stage -ln p(code) nats, whether it is much nearer than a frequent one or hardly. With
a rate, a search minimises distance and length together,

    |z - e|^2 + rate * s * -ln p(code),

with p the running frequency of the code, and s the running mean of |z - e|^2 to the *nearest* code, so that `rate` has
no unit. (With the mean distance to the chosen code, a higher price would raise the price.) If a vector is a sum of
codes, s is the mean square of what all levels leave, so that a nat costs the same at every level.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from ..config import ModelConfig
from .updates import SelfUpdating, mean_over_ranks, sum_over_ranks

DECAY = 0.98  # of p and s, per training batch
WARM_UP = 100  # training batches without a price: first, the codes have to move apart
FLOOR = 1 / 8  # of p, as a share of the mean: a code that moved has to be affordable
MEASURED = 256  # vectors of a batch that s is measured on


class PricedConfig(ModelConfig):
    rate: float = Field(
        0.0,
        ge=0,
        description="price of a code's -ln p, in units of the mean distance to the nearest code; 0: choose the nearest",
    )

    @model_serializer(mode="wrap")
    def _omit_zero(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a rate of 0, as files without it do, so that fingerprints stay."""
        return {key: value for key, value in handler(self).items() if key != "rate" or value}


class Price(SelfUpdating):
    """The price of each code at each level. parts: the relative number of ids of each level. Its buffers change in
    training only."""

    frequencies: Tensor  # (levels, codes), running means of p(code); each row sums to 1
    distance: Tensor  # (), s; 0 during the warm-up

    def __init__(self, rate: float, codes: int, parts: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.rate, self.parts = rate, parts
        self.register_buffer("frequencies", torch.full((len(parts), codes), 1 / codes))
        self.register_buffer("distance", torch.zeros(()))

    def nats(self) -> Tensor:
        """Return -ln p of each code, `(levels, codes)`."""
        return -self.frequencies.clamp(min=FLOOR / self.frequencies.shape[1]).log()

    def of_codes(self) -> Tensor:
        """Return the price of each code in units of squared distances, `(levels, codes)`."""
        return self.rate * self.distance * self.nats()

    def record_ids(self, vectors: Tensor, tokens: Tensor, distances: Tensor) -> None:
        """Record the ids `(n, ids)` of a batch of vectors, and squared distances of some to the nearest codes, which
        are NaN if any of the vectors is not finite."""
        self.record(tokens, distances.where(torch.isfinite(vectors).all(), math.nan))

    def update(self, tokens: Tensor, distances: Tensor) -> None:  # type: ignore[override]
        """Move p towards the shares of the ids in `tokens` `(n, ids)`, and s towards the mean of `distances`; ignore
        batches that are not finite."""
        counts = sum_over_ranks(self.count(tokens).float())
        distance = mean_over_ranks(distances.mean())
        finite, weight = torch.isfinite(distance), 1 - DECAY
        self.frequencies.lerp_(torch.where(finite, shares(counts), self.frequencies), weight)
        if self.step >= WARM_UP:
            known = torch.where(self.distance == 0, distance, self.distance)
            self.distance.copy_(torch.where(finite, known.lerp(distance, weight), self.distance))
        super().update()

    def count(self, tokens: Tensor) -> Tensor:
        """Count the ids of each level in `tokens` (B, *grid), `(levels, codes)`."""
        factor = tokens[0].numel() // sum(self.parts)
        return count_tokens(tokens, tuple(factor * part for part in self.parts), self.frequencies.shape[1])

    def total(self, tokens: Tensor) -> Tensor:
        """Return the sum of the prices of `tokens` (B, *grid), a scalar."""
        return (self.of_codes() * self.count(tokens)).sum()

    def set_counts(self, counts: Tensor) -> None:
        """Set p to the shares of these counts, `(levels, codes)`."""
        self.frequencies.copy_(shares(counts))


def shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def count_tokens(tokens: Tensor, parts: tuple[int, ...], vocab_size: int) -> Tensor:
    """Return how often each id occurs in each part of `tokens` (B, *grid), int64 `(parts, vocab_size)`. parts: the
    number of tokens in each of the consecutive parts."""
    shape = (len(parts), vocab_size)
    each = tokens.long().flatten(1).split(parts, 1)
    ids = torch.cat([(part + number * vocab_size).flatten() for number, part in enumerate(each)])
    return uses(ids, math.prod(shape)).reshape(shape)


def uses(tokens: Tensor, size: int) -> Tensor:
    """Count each id in `tokens` `(n,)`, int64 `(size,)`. (`torch.bincount` would sync with the GPU.)"""
    return tokens.new_zeros(size).index_add_(0, tokens, torch.ones_like(tokens))
