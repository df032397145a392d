"""Lossless parallel sampling: guess the rest, check all of it in one pass, keep going from the first wrong token.

With the noise of an image fixed, its tokens are the fixed point of a map whose token r depends on earlier ones only, so
Jacobi iteration reaches it in at most N passes (Song et al. 2021; Wiggers & Hoogeboom 2020, predictive sampling): after
each pass everything up to and including the first token that changed is final. The guess for the rest is the pass's own
output: it knows the image's noise, and most of it was drawn in the right context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .requests import Rows
from .sampling import GumbelNoise, Sampler

if TYPE_CHECKING:
    from .base import Prior

ROUNDING = 0.1
"""Share of `Sampler.tolerance`: a whole pass and a cached step differ by about 1e-6, both with many rows."""


class Parallel(NamedTuple):
    """Tokens `(B, N)` in the order of the walk, and how many passes each image needed, `(B,)`; `redrawn` images had a
    decision so close that rounding may have turned it, and were drawn again step by step."""

    tokens: Tensor
    passes: Tensor
    redrawn: int


def sample_parallel(prior: Prior, rows: Rows, sampler: Sampler) -> Parallel:
    """The tokens that `Prior._sample` draws for `rows`, from passes over the whole grid."""
    states = [generator.get_state() for generator in rows.generators]
    tokens, passes, leads = fixed_point(prior, rows, sampler)
    close = torch.nonzero(leads <= ROUNDING * sampler.tolerance).flatten().tolist()
    if close:
        again = rows[close]
        for k, generator in zip(close, again.generators, strict=True):
            generator.set_state(states[k])
        tokens[close] = prior._draw(again, sampler, cache=True, parallel=False, progress=False)
    return Parallel(tokens, passes, len(close))


def fixed_point(prior: Prior, rows: Rows, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, passes, and by how much the closest decision of each image was won, `(B,)`."""
    count, size = rows.given.shape
    device = rows.given.device
    noise = GumbelNoise(rows.generators, size, prior.grid.vocab_size, prior.device).whole()  # (B, N, V)
    tokens = torch.where(rows.keep, rows.given, noise.argmax(-1))
    passes, frontier = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long, device=device)
    leads = torch.full((count,), torch.inf, device=device)
    ranks = torch.arange(size, device=device)
    active = list(range(count))
    while active:
        now, began = rows[active], frontier[active]
        first = int(began.min())
        scores = sampler.scores(walked_logits(prior, now, tokens[active], sampler, first), noise[active, first:])
        best, ids = scores.topk(min(2, scores.shape[-1]))
        drawn = torch.where(now.keep[:, first:], now.given[:, first:], ids[..., 0])
        fresh = ranks[first:] >= began[:, None]
        drawn = torch.where(fresh, drawn, tokens[active, first:])
        wrong = torch.cat([drawn != tokens[active, first:], torch.ones_like(drawn[:, :1], dtype=torch.bool)], 1)
        ended = (wrong.int().argmax(1) + first + 1).clamp(max=size)  # the first that changed is right by now, too
        if scores.shape[-1] > 1:
            final = fresh & ~now.keep[:, first:] & (ranks[first:] < ended[:, None])
            lead = (best[..., 0] - best[..., 1]).masked_fill(~final, torch.inf)
            leads[active] = torch.minimum(leads[active], lead.min(1).values)
        tokens[active, first:] = drawn
        frontier[active] = ended
        passes[active] += 1
        active = [k for k, end in zip(active, ended.tolist(), strict=True) if end < size]
    return tokens, passes, leads


def walked_logits(prior: Prior, rows: Rows, tokens: Tensor, sampler: Sampler, first: int) -> Tensor:
    """Guided logits `(B, N - first, V)` of the ranks from `first` on, from one forward pass on `tokens` (B, N)."""
    path = (prior.order if rows.order is None else rows.order).expand(tokens.shape)
    raster = torch.empty_like(tokens).scatter_(1, path, tokens).reshape(-1, *prior.grid.shape)
    labels, order = sampler.doubled(rows.labels, prior.num_classes), sampler.doubled(rows.order)
    given = {} if order is None else {"order": order}
    logits = prior(torch.cat([raster] * sampler.copies), labels, **given)
    at = torch.cat([path[:, first:]] * sampler.copies)[..., None].expand(-1, -1, logits.shape[-1])
    return sampler.guide(logits.gather(1, at).float())
