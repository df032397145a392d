"""Lossless parallel sampling: guess the rest, check all of it in one pass, keep going from the first wrong token.

With the noise of an image fixed, its tokens are the fixed point of a map whose token r depends on earlier ones only, so
Jacobi iteration reaches it in at most N passes (Song et al. 2021; Wiggers & Hoogeboom 2020, predictive sampling): after
each pass everything up to and including the first token that changed is final. The guess for the rest is the pass's own
output: it knows the image's noise, and most of it was drawn in the right context.

A cheap second prior improves that guess: the pass's logits belong to the tokens that went in, and the second prior says
how logits change with the tokens that came out, logits(new) ~ logits(old) + cheap(new) - cheap(old). The guess is the
fixed point of that, found in a few cheap passes. The result is the same, whatever the second prior is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .sampling import GumbelNoise, Sampler

if TYPE_CHECKING:
    from .base import Prior
    from .requests import Rows

ROUNDING = 0.1
"""Share of `Sampler.tolerance`: a whole pass and a cached step differ by about 1e-6, both with many rows."""
CHEAP_PASSES = 4
"""Passes of the guessing prior per pass; more did not help (measured), fewer did less."""


class Parallel(NamedTuple):
    """Tokens `(B, N)` in the order of the walk, and how many passes each image needed, `(B,)`; `redrawn` images had a
    decision so close that rounding may have turned it, and were drawn again step by step."""

    tokens: Tensor
    passes: Tensor
    redrawn: int


def sample_parallel(prior: Prior, rows: Rows, sampler: Sampler, guess: Prior | None = None) -> Parallel:
    """The tokens that `Prior._sample` draws for `rows`, from passes over the whole grid."""
    states = [generator.get_state() for generator in rows.generators]
    tokens, passes, leads = fixed_point(prior, rows, sampler, guess)
    close = torch.nonzero(leads <= ROUNDING * sampler.tolerance).flatten().tolist()
    if close:
        again = rows[close]
        for k, generator in zip(close, again.generators, strict=True):
            generator.set_state(states[k])
        tokens[close] = prior._draw(again, sampler)
    return Parallel(tokens, passes, len(close))


def fixed_point(prior: Prior, rows: Rows, sampler: Sampler,
                guess: Prior | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Tokens, passes, and by how much the closest decision of each image was won, `(B,)`."""
    (count, size), device = rows.given.shape, rows.given.device
    noise = GumbelNoise(rows.generators, size, prior.grid.vocab_size, device).whole()  # (B, N, V)
    tokens = torch.where(rows.keep, rows.given, noise.argmax(-1))
    frontier, passes = tokens.new_zeros(count), torch.zeros(count, dtype=torch.long)
    leads = torch.full((count,), torch.inf, device=device)
    if guess is not None:
        zero = torch.zeros((), device=device)
        tokens = corrected(guess, rows, sampler, tokens, frontier, zero, zero, noise)
    active = list(range(count))
    while active:
        now, began, old = rows[active], frontier[active], tokens[active]
        logits = walked_logits(prior, now, old, sampler)
        drawn, ended, lead = check(sampler.scores(sampler.guide(logits), noise[active]), now, old, began)
        leads[active] = torch.minimum(leads[active], lead)
        if guess is not None:
            cheap = walked_logits(guess, now, old, sampler)
            drawn = corrected(guess, now, sampler, drawn, ended, logits, cheap, noise[active])
        tokens[active], frontier[active] = drawn, ended
        passes[active] += 1
        active = [k for k, end in zip(active, ended.tolist(), strict=True) if end < size]
    return tokens, passes, leads


def check(scores: Tensor, rows: Rows, tokens: Tensor, began: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `scores` (B, N, V) on `tokens` (B, N) say: the tokens now, how many of them are final, and by how much the
    closest decision among the newly final ones was won."""
    best, ids = scores.topk(min(2, scores.shape[-1]))
    fresh = torch.arange(tokens.shape[1], device=tokens.device) >= began[:, None]
    drawn = torch.where(fresh & ~rows.keep, ids[..., 0], tokens)
    wrong = torch.cat([drawn != tokens, torch.ones_like(fresh[:, :1])], 1)
    ended = (wrong.int().argmax(1) + 1).clamp(max=tokens.shape[1])  # the first that changed is right by now, too
    final = fresh & ~rows.keep & (torch.arange(tokens.shape[1], device=tokens.device) < ended[:, None])
    lead = best[..., 0] - best[..., -1] if best.shape[-1] > 1 else torch.full_like(best[..., 0], torch.inf)
    return drawn, ended, lead.masked_fill(~final, torch.inf).amin(1)


def corrected(guess: Prior, rows: Rows, sampler: Sampler, tokens: Tensor, ended: Tensor, logits: Tensor, cheap: Tensor,
              noise: Tensor) -> Tensor:  # fmt: skip
    """`tokens` (B, N) with those from `ended` on drawn from `logits` + guess(tokens) - `cheap`, a few times over."""
    free = (torch.arange(tokens.shape[1], device=tokens.device) >= ended[:, None]) & ~rows.keep
    for _ in range(CHEAP_PASSES):
        scores = sampler.scores(sampler.guide(logits + walked_logits(guess, rows, tokens, sampler) - cheap), noise)
        drawn = torch.where(free, scores.argmax(-1), tokens)
        if torch.equal(drawn, tokens):
            break
        tokens = drawn
    return tokens


def walked_logits(prior: Prior, rows: Rows, tokens: Tensor, sampler: Sampler) -> Tensor:
    """Logits `(B, N, V)` in the order of the walk (guided: of 2 B rows), from one forward pass on `tokens` (B, N)."""
    path = rows.path.expand(tokens.shape)
    raster = torch.empty_like(tokens).scatter_(1, path, tokens).reshape(-1, *prior.grid.shape)
    labels, order = sampler.doubled(rows.labels, prior.num_classes), sampler.doubled(rows.order)
    given = {} if order is None or not prior.any_order else {"order": order}
    logits = prior(torch.cat([raster] * sampler.copies), labels, **given)
    return logits.gather(1, torch.cat([path] * sampler.copies)[..., None].expand(logits.shape)).float()
