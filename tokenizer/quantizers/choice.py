"""Straight-through softmax over codes: the forward pass chooses one code, and the backward pass is that of the softmax,
so every code gets a gradient (Jang et al. 2017, section 2.2).

Vectors give logits over codes; the largest, optionally with Gumbel noise, is chosen. Plain torch operations would each
hold a (vectors x codes) matrix: 1 GB for 16,384 of both. Here vectors are processed in blocks, and the backward pass
recomputes a block's logits and noise. With s the softmax of logits and noise, and G the gradient of the chosen values
v,

    d logits = s (h - sum(s h)) / temperature,   h = G v'

and for the entropy losses, with gradient w in the softmax q at the entropy temperature,

    d logits = q (w - sum(q w)) / entropy_temperature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits per block on a CPU, so that they fit in cache; a GPU uses 64 times as many. A block needs six such arrays.
BLOCK_ELEMENTS = 1 << 17
MIN_LOGIT = -60.0  # relative to the largest, so that no probability is 0, or denormal and therefore slow


class ChoiceOptions(NamedTuple):
    """temperature: of the softmax that passes gradients. entropy_temperature: of the noise-free softmax whose entropy
    is returned. hard: return the chosen code's value, else the softmax's mean. seed: of the Gumbel noise, if any."""

    temperature: float = 1.0
    entropy_temperature: float = 1.0
    hard: bool = True
    seed: int | None = None


class Choice(NamedTuple):
    """`values` (n, dim); `tokens` (n,) int64; `entropy` of p(code | row), averaged over rows, a scalar in nats; and
    `mean` (codes,), p averaged over rows."""

    values: Tensor
    tokens: Tensor
    entropy: Tensor
    mean: Tensor


def choose(rows: Tensor, weight: Tensor, bias: Tensor, values: Tensor, options: ChoiceOptions) -> Choice:
    """Choose a code for each of `rows` (n, width) by the logits rows weight' + bias, with `weight` (codes, width) and
    `bias` (codes,), and look it up in `values` (codes, dim). Gradients reach all four tensors."""
    return Choice(*_Choice.apply(rows, weight, bias, values, options))


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, values: Tensor, options: ChoiceOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        transposed, noise = weight.t().contiguous(), _Noise(options.seed, rows)
        entropy, mean = rows.new_zeros(()), torch.zeros_like(bias)
        tokens, soft = [], []
        for part in rows.split(_block_size(rows, weight)):
            logits = torch.addmm(bias, part, transposed)
            scaled, p = _probabilities(logits, options.entropy_temperature)
            entropy -= (torch.linalg.vecdot(p, scaled) + p.amax(1).log()).sum()  # log p = scaled + log max p
            mean += p.sum(0)
            tokens.append(noise.add_to(logits).argmax(1))
            if not options.hard:
                soft.append((logits / options.temperature).softmax(1) @ values)
        chosen = torch.cat(tokens)
        ctx.options = options
        ctx.save_for_backward(rows, weight, bias, values, chosen)
        ctx.mark_non_differentiable(chosen)
        value = F.embedding(chosen, values) if options.hard else torch.cat(soft)
        return value, chosen, entropy.clamp_(min=0) / rows.shape[0], mean / rows.shape[0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, _: None, d_entropy: Tensor, d_mean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        rows, weight, bias, values, chosen = ctx.saved_tensors
        options, size, noise = ctx.options, _block_size(rows, weight), _Noise(ctx.options.seed, rows)
        transposed, transposed_values = weight.t().contiguous(), values.t().contiguous()
        d_rows, d_transposed, d_bias = torch.empty_like(rows), torch.zeros_like(transposed), torch.zeros_like(bias)
        d_values = torch.zeros_like(values)
        if options.hard:
            d_values.index_add_(0, chosen, gradient)
        with torch.autocast(rows.device.type, enabled=False):
            for part, d_value, d_part in zip(rows.split(size), gradient.split(size), d_rows.split(size), strict=True):
                logits = torch.addmm(bias, part, transposed)
                scaled, p = _probabilities(logits, options.entropy_temperature)
                d_logits = _softmax_backward(p, scaled.mul_(-d_entropy).add_(d_mean), options.entropy_temperature)
                d_logits /= len(rows)
                p = noise.add_to(logits).div_(options.temperature).softmax(1)
                if not options.hard:
                    d_values.addmm_(p.t(), d_value)
                d_logits += _softmax_backward(p, d_value @ transposed_values, options.temperature)
                torch.mm(d_logits, transposed.t(), out=d_part)
                d_transposed.addmm_(part.t(), d_logits)  # several times faster than the transpose for narrow rows
                d_bias += d_logits.sum(0)
        return d_rows, d_transposed.t(), d_bias, d_values, None


class _Noise:
    """Gumbel noise for successive blocks of rows, reproducible from its seed."""

    def __init__(self, seed: int | None, rows: Tensor) -> None:
        self.generator = None if seed is None else torch.Generator(rows.device).manual_seed(seed)

    def add_to(self, logits: Tensor) -> Tensor:
        if self.generator is None:
            return logits
        tiny = torch.finfo(logits.dtype).tiny
        uniform = torch.rand(logits.shape, generator=self.generator, dtype=logits.dtype, device=logits.device)
        return logits.sub_(uniform.clamp_(min=tiny).log_().neg_().log_())


def _block_size(rows: Tensor, weight: Tensor) -> int:
    elements = BLOCK_ELEMENTS if rows.device.type == "cpu" else 64 * BLOCK_ELEMENTS
    return max(1, elements // len(weight))


def _probabilities(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return logits / temperature, relative to the largest, and their softmax, both `(n, codes)`."""
    scaled = (logits - logits.amax(1, keepdim=True)).div_(temperature).clamp_(min=MIN_LOGIT)
    return scaled, scaled.softmax(1)


def _softmax_backward(p: Tensor, upstream: Tensor, temperature: float) -> Tensor:
    """Return the gradient of the logits from that of their softmax `p` (n, codes), which is overwritten."""
    upstream -= torch.linalg.vecdot(p, upstream).unsqueeze(1)
    return upstream.mul_(p).div_(temperature)
