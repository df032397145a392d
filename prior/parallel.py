"""Lossless parallel sampling: guess the rest, check all of it in one pass, keep going from the first wrong token.

With the noise of an image fixed, its tokens are the fixed point of a map whose token depends on those of earlier blocks
only, so Jacobi iteration reaches it in at most as many passes as there are blocks (Song et al. 2021; Wiggers &
Hoogeboom 2020, predictive sampling): after each pass everything up to and including the block of the first token that
changed is final. The guess for the rest is the pass's own output: it contains the image's noise, and most of it was
drawn in the right context.

A cheap second prior improves that guess: the pass's logits belong to the tokens that went in, and the second prior says
how logits change with the tokens that came out, logits(new) ~ cheap(new) + 0.8 (logits(old) - cheap(old)). The guess is
the fixed point of that, found in a few cheap passes. The result is the same, whatever the second prior is.

Without one, a GPU that a pass over few images leaves idle tries several guesses of each in the same pass (`guesses`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenizer.base import TokenGrid

from .orders import Partition
from .requests import Model, Rows, given_walk
from .sampling import GumbelNoise, Sampler
from .sampling.guesses import alternatives, guesses_at_once
from .sampling.watching import Watch

CHEAP_PASSES = 8
"""Passes of the guessing prior per pass."""
KEPT = 0.8
"""The share of the difference between both priors that is assumed to stay; 1, and 0.6 and less, take more passes."""
NUMBERS = 1 << 25
"""Logits held at once, on a CPU."""
ON_A_GPU = 8
"""Times as many on a GPU, which fewer leave idle where there are many ids."""


class Parallel(NamedTuple):
    """Tokens `(B, N)` in the order of the walk, which of them rounding could turn, and the number of passes that each
    image took."""

    tokens: Tensor
    close: Tensor
    passes: Tensor


def parallel_rows(grid: TokenGrid, device: torch.device) -> int:
    """The number of rows to sample together on this device: all their logits are held."""
    return max(1, NUMBERS * (ON_A_GPU if device.type == "cuda" else 1) // (len(grid) * grid.vocab_size))


def sample_parallel(prior: Model, rows: Rows, sampler: Sampler, guess: Model | None, watch: Watch) -> Parallel:
    """The tokens that step by step are drawn for `rows`, from passes over the whole grid."""
    (count, size), device = rows.given.shape, rows.given.device
    noise = GumbelNoise(rows.generators, size, prior.grid.vocab_size, device).of(0, size)  # (B, N, V)
    ranks = torch.arange(size, device=device)
    sizes = torch.tensor(rows.blocks, device=device)
    ends = torch.cat([sizes.cumsum(0).repeat_interleave(sizes), sizes.new_tensor([size])])  # of each rank's block
    scale = sampler.scales_by_rank(rows.blocks, device)  # of a token's place, in whichever pass it is drawn
    tolerance = sampler.tolerance(prior.rounding, scale)
    tokens = torch.where(rows.keep, rows.given, noise.argmax(-1))
    close = torch.zeros_like(rows.keep)
    final = tokens.new_zeros(count)  # how many tokens of each image are final, from the first on
    passes = torch.zeros(count, dtype=torch.long)
    if guess is not None:
        zero = torch.zeros((), device=device)
        tokens = corrected(guess, rows, sampler, tokens, final, zero, zero, noise)
    width = guesses_at_once(prior, count) if guess is None else 1
    guesses = tokens[:, None]  # (active, one or `width`, N)
    active = list(range(count))  # the images that are not finished; `rows`, `noise` and `guesses` are theirs
    part = rows
    for _ in watch.over(rows.blocks):
        old, each = guesses.flatten(0, 1), guesses.shape[1]
        many, their_noise, their_final = rows, noise, final[active]
        if each > 1:
            images = [row for row in range(len(active)) for _ in range(each)]
            many, their_noise, their_final = rows[images], noise[images], their_final[images]
        logits = walked_logits(prior, many, old, sampler)
        largest = sampler.largest(logits).cummax(1).values.clamp(min=1)
        guided = sampler.guide(logits, scale)
        widths = sampler.widths(tolerance, prior.readout.steepness(logits))
        drawn, could_turn = sampler.decide(guided, their_noise, tolerance * largest, widths)
        fresh = ranks >= their_final[:, None]
        drawn = torch.where(fresh & ~many.keep, drawn, old)
        changed = torch.cat([drawn != old, torch.ones_like(fresh[:, :1])], 1)
        now_final = ends[changed.int().argmax(1)]  # the block of the first that changed is right by now, too
        if each > 1:
            best = now_final.view(-1, each).argmax(1) + each * torch.arange(len(active), device=device)
            kept = (drawn, could_turn, fresh, now_final, guided)
            drawn, could_turn, fresh, now_final, guided = (of_all[best] for of_all in kept)
        close[active] |= could_turn & fresh & (ranks < now_final[:, None])
        left = torch.nonzero(now_final < size).flatten().tolist()
        if guess is not None and left:
            cheap = walked_logits(guess, rows, old, sampler)
            drawn = corrected(guess, rows, sampler, drawn, now_final, logits, cheap, noise)
        tokens[active] = drawn
        final[active] = now_final
        passes[active] += 1
        watch.took(part, tokens, ranks < final[:, None])
        if not left:
            break
        guesses = drawn[:, None]
        if width > 1:
            free = (ranks >= now_final[:, None]) & ~rows.keep
            guesses = alternatives(drawn, sampler.scores(guided, noise), free, width)
        if len(left) < len(active):  # finished images leave
            guesses = guesses[left]
            active = [active[k] for k in left]
            rows = rows[left]
            noise = noise[left]
    return Parallel(tokens, close, passes)


def settled(prior: Model, row: Rows, sampler: Sampler, tokens: Tensor, close: Tensor) -> Tensor:
    """`tokens` (1, N) with the decisions that are `close` made by passes over this image alone. If one of them comes
    out otherwise, so may all after it."""
    size = tokens.shape[1]
    noise = GumbelNoise(row.generators, size, prior.grid.vocab_size, tokens.device).of(0, size)
    tokens = tokens.clone()
    undecided = close & ~row.keep
    scale = sampler.scales_by_rank(row.blocks, tokens.device)
    while True:
        drawn = sampler.choose(sampler.guide(walked_logits(prior, row, tokens, sampler), scale), noise)
        turned = torch.nonzero((drawn != tokens) & undecided)
        if not len(turned):
            return tokens
        first = int(turned[0, 1])
        tokens[:, first:] = torch.where(row.keep, tokens, drawn)[:, first:]
        undecided[:, first + 1 :] = ~row.keep[:, first + 1 :]


def corrected(
    guess: Model,
    rows: Rows,
    sampler: Sampler,
    tokens: Tensor,
    final: Tensor,
    logits: Tensor,
    cheap: Tensor,
    noise: Tensor,
) -> Tensor:
    """`tokens` (B, N) with those from `final` on drawn from the guess's logits, moved by the difference of `logits`
    from `cheap` ones on the last pass's tokens; a few times over."""
    free = (torch.arange(tokens.shape[1], device=tokens.device) >= final[:, None]) & ~rows.keep
    difference = KEPT * (logits - cheap)
    scale = sampler.scales_by_rank(rows.blocks, tokens.device)
    for _ in range(CHEAP_PASSES):
        better = walked_logits(guess, rows, tokens, sampler) + difference
        drawn = torch.where(free, sampler.choose(sampler.guide(better, scale), noise), tokens)
        if torch.equal(drawn, tokens):
            break
        tokens = drawn
    return tokens


def walked_logits(prior: Model, rows: Rows, tokens: Tensor, sampler: Sampler) -> Tensor:
    """Logits `(B, N, V)` in the order of the walk (guided: of 2 B rows), from one forward pass on `tokens` (B, N)."""
    path = rows.path.expand(tokens.shape)
    raster = torch.empty_like(tokens).scatter_(1, path, tokens).reshape(-1, *prior.grid.shape)
    labels = sampler.doubled(rows.labels, prior.num_classes)
    order = sampler.doubled(rows.path)
    # Of a guess, too, that could go its own way.
    given = given_walk(prior, Partition(order, rows.blocks)) if prior.any_order else {}
    logits = prior(torch.cat([raster] * sampler.copies), labels, **given).float()
    if rows.path.ndim == 1:
        is_raster = torch.equal(rows.path, torch.arange(len(rows.path), device=path.device))
        return logits if is_raster else logits[:, rows.path]
    return logits[torch.arange(len(logits), device=path.device)[:, None], order]
