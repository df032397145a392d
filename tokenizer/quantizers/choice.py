"""One code of many is chosen, and every code gets a gradient: that of a soft choice (Jang et al. 2017, section 2.2).

Vectors give logits over codes; the largest, perhaps with Gumbel noise, is chosen, and the gradient is that of the
softmax. Written down plainly, this holds a matrix of (vectors x codes) for every operation: 1 GB each for 16,384 of
both. Here a block of vectors is taken at a time, and the backward pass computes the block's logits, and draws its
noise, again. With s the softmax of logits and noise, and G the gradient of the chosen values v,

    d logits = s (h - sum(s h)) / temperature,   h = G v'

and for q, the softmax at the temperature of the entropies, whose terms have the gradient w in q,

    d logits = q (w - sum(q w)) / entropy_temperature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at a time on a CPU, whose cache they fit; on a GPU 64 times as many. A block needs six such arrays.
BLOCK_ELEMENTS = 1 << 17
LEAST = -60.0  # logits below the largest by more count as so much: no probability is 0, or too small to be fast


class How(NamedTuple):
    """`temperature` of the softmax that gradients pass; `entropy_temperature` of the one, without noise, that entropies
    are of; `hard`: the value is that of the chosen code, else the mean under the softmax; `seed` of the Gumbel noise,
    None for none."""

    temperature: float = 1.0
    entropy_temperature: float = 1.0
    hard: bool = True
    seed: int | None = None


class Choice(NamedTuple):
    """`values` (n, dim); `tokens` (n,) int64; of p(code | row), `entropy`, its mean over rows, a scalar in nats, and
    `mean` (codes,), the mean of p itself."""

    values: Tensor
    tokens: Tensor
    entropy: Tensor
    mean: Tensor


def choose(rows: Tensor, weight: Tensor, bias: Tensor, values: Tensor, how: How) -> Choice:
    """Choose for each of `rows` (n, width) a code by its logits, rows weight' + bias, of `weight` (codes, width) and
    `bias` (codes,), and look it up in `values` (codes, dim). Gradients reach all four."""
    return Choice(*_Choice.apply(rows, weight, bias, values, how))


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, values: Tensor, how: How
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        across, noise = weight.t().contiguous(), _Noise(how.seed, rows)
        entropy, mean = rows.new_zeros(()), torch.zeros_like(bias)
        tokens, soft = [], []
        for part in rows.split(_rows_held(rows, weight)):
            logits = torch.addmm(bias, part, across)
            scaled, p = _probabilities(logits, how.entropy_temperature)
            entropy -= (torch.linalg.vecdot(p, scaled) + p.amax(1).log()).sum()  # log p = scaled + log max p
            mean += p.sum(0)
            tokens.append(noise.add_to(logits).argmax(1))
            if not how.hard:
                soft.append((logits / how.temperature).softmax(1) @ values)
        chosen = torch.cat(tokens)
        ctx.how = how
        ctx.save_for_backward(rows, weight, bias, values, chosen)
        ctx.mark_non_differentiable(chosen)
        value = F.embedding(chosen, values) if how.hard else torch.cat(soft)
        return value, chosen, entropy.clamp_(min=0) / rows.shape[0], mean / rows.shape[0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, _: None, of_entropy: Tensor, of_mean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        rows, weight, bias, values, chosen = ctx.saved_tensors
        how, held = ctx.how, _rows_held(rows, weight)
        across, values_across, noise = weight.t().contiguous(), values.t().contiguous(), _Noise(how.seed, rows)
        d_rows, d_across, d_bias = torch.empty_like(rows), torch.zeros_like(across), torch.zeros_like(bias)
        d_values = torch.zeros_like(values)
        if how.hard:
            d_values.index_add_(0, chosen, gradient)
        with torch.autocast(rows.device.type, enabled=False):
            for part, of_value, d_part in zip(rows.split(held), gradient.split(held), d_rows.split(held), strict=True):
                logits = torch.addmm(bias, part, across)
                scaled, p = _probabilities(logits, how.entropy_temperature)
                d_logits = _through_softmax(p, scaled.mul_(-of_entropy).add_(of_mean), how.entropy_temperature)
                d_logits /= len(rows)
                p = noise.add_to(logits).div_(how.temperature).softmax(1)
                if not how.hard:
                    d_values.addmm_(p.t(), of_value)
                d_logits += _through_softmax(p, of_value @ values_across, how.temperature)
                torch.mm(d_logits, across.t(), out=d_part)
                d_across.addmm_(part.t(), d_logits)  # several times faster than its transpose, where rows are narrow
                d_bias += d_logits.sum(0)
        return d_rows, d_across.t(), d_bias, d_values, None


class _Noise:
    """Gumbel noise, block after block of rows: the same again for the same seed."""

    def __init__(self, seed: int | None, rows: Tensor) -> None:
        self.generator = None if seed is None else torch.Generator(rows.device).manual_seed(seed)

    def add_to(self, logits: Tensor) -> Tensor:
        """Add the next rows of noise to `logits`, in place."""
        if self.generator is None:
            return logits
        tiny = torch.finfo(logits.dtype).tiny
        uniform = torch.rand(logits.shape, generator=self.generator, dtype=logits.dtype, device=logits.device)
        return logits.sub_(uniform.clamp_(min=tiny).log_().neg_().log_())


def _rows_held(rows: Tensor, weight: Tensor) -> int:
    """How many rows make a block."""
    held = BLOCK_ELEMENTS if rows.device.type == "cpu" else 64 * BLOCK_ELEMENTS
    return max(1, held // len(weight))


def _probabilities(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits over temperature, less their largest, and their softmax, both `(n, codes)`."""
    scaled = (logits - logits.amax(1, keepdim=True)).div_(temperature).clamp_(min=LEAST)
    return scaled, scaled.softmax(1)


def _through_softmax(p: Tensor, upstream: Tensor, temperature: float) -> Tensor:
    """The gradient of logits from that of their softmax `p` (n, codes), which it overwrites."""
    upstream -= torch.linalg.vecdot(p, upstream).unsqueeze(1)
    return upstream.mul_(p).div_(temperature)
