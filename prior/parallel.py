"""Lossless parallel sampling: guess the remaining tokens, check them in one pass, and continue from the first wrong
token.

For fixed noise, an image's tokens are the fixed point of a map in which each token depends only on earlier blocks.
Jacobi iteration therefore converges in at most one pass per block (Song et al. 2021; Wiggers & Hoogeboom 2020,
predictive sampling): after each pass, everything up to and including the block of the first changed token is final. The
guess for the remaining tokens is the pass's own output, which uses the image's noise and mostly the right context."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenizer.base import TokenGrid
from tokenizer.precision import at_least_float32

from .condition_encoder import Encoded
from .options import SamplingOptions
from .sampling import Monitor, SampleBatch, encode_rows

if TYPE_CHECKING:
    from .base import Prior

LOGITS_ON_CPU, LOGITS_ON_GPU = 1 << 25, 1 << 28
"""Maximum number of logits held at once."""


def rows_per_pass(grid: TokenGrid, device: torch.device) -> int:
    return max(1, (LOGITS_ON_GPU if device.type == "cuda" else LOGITS_ON_CPU) // (len(grid) * grid.vocab_size))


def sample_parallel(
    prior: Prior, batch: SampleBatch, options: SamplingOptions, monitor: Monitor
) -> tuple[Tensor, Tensor]:
    """Draw the same tokens as `sample_blocks` by passes over the whole grid. Return the tokens `(B, N)`, in decoding
    order, and the number of passes per image, `(B,)`."""
    (count, size), device = batch.tokens.shape, batch.tokens.device
    noise = batch.noise(prior.grid).of_ranks(0, size)
    ranks, sizes = torch.arange(size, device=device), torch.tensor(batch.blocks, device=device)
    ends = torch.cat([sizes.cumsum(0).repeat_interleave(sizes), sizes.new_tensor([size])])  # of each rank's block
    scale = options.scale_by_rank(batch.blocks, device)
    tokens = torch.where(batch.known, batch.tokens, noise.argmax(-1))
    final = tokens.new_zeros(count)  # number of leading tokens of each image that are final
    passes = torch.zeros(count, dtype=torch.long)
    active, part = torch.arange(count, device=device), batch  # unfinished images
    encoded = encode_rows(prior, batch, options)
    for _ in monitor.iterate(batch.blocks):
        old = tokens[active]
        sampled = options.choose(options.guide(logits_in_order(prior, part, encoded, old, options), scale), noise)
        free = (ranks >= final[active, None]) & ~part.known
        sampled = torch.where(free, sampled, old)
        changed = torch.cat([sampled != old, torch.ones_like(free[:, :1])], 1)
        tokens[active], final[active] = sampled, ends[changed.int().argmax(1)]  # correct up to the first change
        passes[active.cpu()] += 1
        monitor.report(batch, tokens, ranks < final[:, None])
        left = torch.nonzero(final[active] < size)[:, 0]
        if not len(left):
            break
        if len(left) < len(active):
            encoded = encoded[torch.cat([left, len(active) + left]) if options.guides else left]
            active, part, noise = active[left], part[left], noise[left]
    monitor.finish(batch, tokens)
    return tokens, passes


def logits_in_order(
    prior: Prior, batch: SampleBatch, encoded: Encoded, tokens: Tensor, options: SamplingOptions
) -> Tensor:
    """Return logits `(B, N, V)` in decoding order (2 B rows with guidance) of `tokens` (B, N), from one pass."""
    raster = options.with_unconditional(batch.to_raster(tokens)).unflatten(1, prior.grid.shape)
    partition = batch.partition(options)
    order, inputs = (batch.order, {}) if partition is None else (partition.order, prior.order_inputs(partition))
    logits = at_least_float32(prior(raster, encoded, **inputs))
    return logits[:, order] if order.ndim == 1 else logits.take_along_dim(order[..., None], 1)
