"""Ids that are intensities: a mixture of discretised logistics, few numbers in place of a logit for each value.

PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517, section 2.1 and 2.2): P(v) is what lies between the neighbouring
values' midpoints; the darkest and the brightest value take a whole tail each. All channels of a pixel share the
mixture's weights, so that what was drawn of red tells which component green and blue come from; their means depend
linearly on the true red and green. The paper has no floor: here a share of 2^-16 is uniform, so that no value costs
more than log2(V) + 16 bits.

With u = exp((h - |x - mean|) / s) and q = exp(-2 h / s), h half the distance of two values, a value's probability under
one logistic is u (1 - q) / ((1 + u) (1 + u q)): nothing cancels, so that it is as exact far out as in the middle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenizer.base import TokenGrid, at_least_float32
from tokenizer.config import ModelConfig

from .base import Head

FEWEST = 16
"""Values of a channel: with fewer, a softmax has hardly more numbers."""
FLOOR = 2.0**-16
"""The share of the mass that is uniform."""
NARROWEST = 16.0
"""h / s of the narrowest logistic, which has all but 3e-7 of its mass on one value."""
WIDEST = -7.0
"""log 1 / s of the widest logistic, which is flat."""
AT_ONCE = 1 << 16
"""About how many numbers of a table are computed at a time: as many as stay in a processor's cache."""
ON_A_GPU = 256
"""Times as many on a GPU."""


class LogisticConfig(ModelConfig):
    """The size of the mixture."""

    components: int = Field(5, ge=1, le=64, description="number of logistics in the mixture; the paper has 10")


class Mixture(NamedTuple):
    """One channel's mixture given the channels before it: log weights, means and inverse scales `(..., K)`."""

    weights: Tensor
    means: Tensor
    inverse: Tensor


class Logistic(Head, name="logistic"):
    """Weights for all channels, means and scales for each, coefficients for each pair of channels; K of each."""

    Config = LogisticConfig
    spread: Tensor

    def __init__(self, config: LogisticConfig, grid: TokenGrid) -> None:
        super().__init__(config, grid)
        count, channels = config.components, self.together
        self.size = count * (1 + 2 * channels + channels * (channels - 1) // 2)
        self.h = 1 / (grid.vocab_size - 1)  # of the distance between two values, in units of x in [-1, 1]
        spread = torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)
        self.register_buffer("spread", spread, persistent=False)

    @classmethod
    def problem(cls, config: LogisticConfig, grid: TokenGrid) -> str | None:
        """Ids are intensities, and there are enough of them."""
        if not grid.channels:
            return "logistic is for grids of pixels, whose ids are intensities, and this grid's are codes"
        if grid.vocab_size < FEWEST:
            return f"logistic is for pixels of at least {FEWEST} levels, and this grid has {grid.vocab_size}"
        return None

    def next_logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """The next channel's whole table; some positions at a time."""
        rows = outputs.flatten(0, -2)
        numbers = AT_ONCE * (ON_A_GPU if outputs.is_cuda else 1)
        at_once = max(1, numbers // (self.vocab_size * self.config.components))
        parts = zip(rows.split(at_once), ids.reshape(len(rows), ids.shape[-1]).split(at_once), strict=True)
        return torch.cat([self.table(some, known) for some, known in parts]).unflatten(0, outputs.shape[:-1])

    def table(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """`next_logits` of rows `(rows, size)` and `(rows, l)`: log P of each value."""
        _, mixture = self.given(outputs, ids)
        every = self.intensities(torch.arange(self.vocab_size, device=outputs.device), mixture.means.dtype)
        means, inverse = (
            mixture.means[..., None],
            mixture.inverse[..., None],
        )  # of (rows, K, V)
        u = ((self.h - (every - means).abs()) * inverse).exp()
        scale, shrunk = -torch.expm1(-2 * self.h * inverse), (-2 * self.h * inverse).exp()
        shares = u * scale / ((1 + u) * (1 + u * shrunk))
        darkest = ((every[:1] + self.h - means) * inverse).sigmoid()
        brightest = ((means - every[-1:] + self.h) * inverse).sigmoid()
        shares = torch.cat([darkest, shares[..., 1:-1], brightest], -1)
        total = (mixture.weights.exp()[..., None] * shares).sum(1)
        return (total * (1 - FLOOR) + FLOOR / self.vocab_size).log()

    def steepness(self, logits: Tensor) -> Tensor:
        """That of log P along the values, as a mean that moves takes it along: its change to a neighbour per unit of
        intensity, up to 1 / s of a narrow logistic, thousands; for each number that a mean is the sum of, and half as
        much for its scale and weight."""
        change = logits.diff(dim=-1).abs() * (self.together + 0.5) / (2 * self.h)
        return torch.maximum(F.pad(change, (1, 0)), F.pad(change, (0, 1)))

    def log_probs(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """From the true values alone: a table would have V times as many numbers."""
        found, _ = self.given(outputs, ids)
        least = torch.full_like(found[0], math.log(FLOOR / self.vocab_size))
        return torch.stack([torch.logaddexp(each + math.log1p(-FLOOR), least) for each in found], -1)

    def given(self, outputs: Tensor, ids: Tensor) -> tuple[list[Tensor], Mixture]:
        """log P, before the floor, of `ids` `(..., l)` of the first l channels, `(...)` each; and the mixture of the
        channel after them (of the last one, if there is none)."""
        count, channels = self.config.components, self.together
        numbers = at_least_float32(outputs).unflatten(-1, (-1, count))
        weights, means, scales, coefficients = numbers.split(
            [1, channels, channels, numbers.shape[-2] - 1 - 2 * channels], -2
        )
        means, log_weights = means + self.spread.to(means.dtype), weights[..., 0, :].log_softmax(-1)
        inverse = (2 - scales).clamp(WIDEST, math.log(NARROWEST / self.h)).exp()
        slopes = iter(coefficients.tanh().unbind(-2))
        x = self.intensities(ids, means.dtype)[..., None]
        found: list[Tensor] = []
        for channel in range(channels):
            mean = means[..., channel, :]
            for earlier in range(channel):
                mean = mean + next(slopes) * x[..., earlier, :]
            mixture = Mixture(log_weights, mean, inverse[..., channel, :])
            if channel == ids.shape[-1]:
                break
            joint = log_weights + self.of_value(mixture, ids[..., channel, None])
            found.append(joint.logsumexp(-1))
            log_weights = joint - found[-1][..., None]
        return found, mixture

    def of_value(self, mixture: Mixture, ids: Tensor) -> Tensor:
        """log P of `ids` `(..., 1)` under each of a mixture's logistics, `(..., K)`."""
        away = self.intensities(ids, mixture.means.dtype) - mixture.means
        upper = F.logsigmoid((away + self.h) * mixture.inverse)  # log of what lies below the value's upper end
        lower = F.logsigmoid((self.h - away) * mixture.inverse)  # and of what lies above its lower end
        inside = upper + lower + (-torch.expm1(-2 * self.h * mixture.inverse)).log()
        return torch.where(ids == 0, upper, torch.where(ids == self.vocab_size - 1, lower, inside))

    def intensities(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Ids as intensities in [-1, 1]."""
        return ids.to(dtype) * (2 * self.h) - 1
