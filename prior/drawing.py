"""Drawing tokens along a walk, step by step or in whole passes, so that both give the same.

Other batches, cached steps and whole passes round otherwise, and so might decide otherwise where two ids are that
close. They leave these decisions to one computation: a pass over the image alone (`parallel.settled`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tokenizer.base import full_float32

from .parallel import parallel_rows, sample_parallel, settled
from .requests import Model, Rows, Walk, choose_walk
from .sampling import GumbelNoise, Sampler, progress_over

FEW_ROWS = 4
"""With fewer rows, a matrix product is bound by reading the weights."""
FINE = (torch.float32, torch.float64)
"""The types of weights for which it is promised that caches and batches do not matter: logits are precise enough."""


@contextmanager
def evaluating(prior: Any) -> Iterator[None]:
    """Eval mode and full precision: with autocast or TF32, steps and whole passes would not agree.

    cuDNN's attention is off as well: it plans anew, for tens of milliseconds, whenever there is one more key.
    """
    training, cudnn = prior.training, torch.backends.cuda.cudnn_sdp_enabled()
    prior.eval()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with full_float32(), torch.autocast(prior.device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        prior.train(training)


@dataclass
class State:
    """What a half-sampled batch remembers where nothing is cached: the tokens so far `(B, N)`, raster order. path and
    blocks: as of `Rows`; given: what `forward` is told of them."""

    tokens: Tensor
    labels: Tensor
    path: Tensor
    blocks: tuple[int, ...]
    given: dict[str, Tensor] = field(default_factory=dict)
    block: int = 0
    rank: int = 0

    def advance(self, tokens: Tensor | None) -> Tensor:
        """Write the last block's `tokens` `(B, m)`; returns the next block's raster indices `(B, n)`."""
        path = self.path.expand(self.tokens.shape)
        if tokens is not None:
            self.tokens.scatter_(1, path[:, self.rank - tokens.shape[1] : self.rank], tokens)
        begin, self.rank = self.rank, self.rank + self.blocks[self.block]
        self.block += 1
        return path[:, begin : self.rank]


def draw(prior: Model, rows: Rows, sampler: Sampler, walk: Walk, progress: bool) -> Tensor:
    """Tokens `(B, N)` for `rows`, both in raster order."""
    rows = rows.along(choose_walk(prior, walk.order, walk.num_orders, rows), prior)
    most = parallel_rows(prior.grid) if walk.parallel else prior.rows_at_once() or len(rows)
    walked = torch.empty_like(rows.given)
    for at, alike in rows.alike(prior):
        parts = alike.cut(max(FEW_ROWS, most // sampler.copies))
        walked[at] = torch.cat([draw_part(prior, part, sampler, walk, progress) for part in parts])
    return torch.empty_like(walked).scatter_(1, rows.path.expand(walked.shape), walked)


def draw_part(prior: Model, rows: Rows, sampler: Sampler, walk: Walk, progress: bool) -> Tensor:
    """Tokens `(B, N)` in the order of the walk, of rows that go through the model together."""
    states = [generator.get_state() for generator in rows.generators]
    if walk.parallel:
        tokens, close, _ = sample_parallel(prior, rows, sampler, walk.guess, progress)
    else:
        tokens, close = step_by_step(prior, rows, sampler, walk.cache, progress)
    close = close & ~rows.keep & (prior.dtype in FINE)
    for k in torch.nonzero(close.any(1)).flatten().tolist():
        rows.generators[k].set_state(states[k])
        tokens[k] = settled(prior, rows[[k]], sampler, tokens[[k]], close[[k]])
    return tokens


def step_by_step(prior: Model, rows: Rows, sampler: Sampler, cache: bool, progress: bool) -> tuple[Tensor, Tensor]:
    """Tokens `(B, N)` in the order of the walk, and which of them rounding could turn."""
    noise = GumbelNoise(rows.generators, len(prior.grid), prior.grid.vocab_size, prior.device)
    labels = sampler.doubled(rows.labels, prior.num_classes)
    start, next_logits = (prior.start, prior.next_logits) if cache else (prior.start_slow, prior.next_logits_slow)
    state: Any = start(len(labels), labels, rows.walk(sampler.copies))
    cuts = [0, *accumulate(rows.blocks)]
    some_keep, all_keep = rows.keep.any(0).tolist(), rows.keep.all(0).tolist()  # at each rank
    last = max((rank for rank, kept in enumerate(all_keep) if not kept), default=-1)
    drawn = rows.given.clone()
    could_turn = []  # in each block
    largest = torch.ones(len(rows), 1, device=prior.device)  # |logit| of each image so far
    tolerance = sampler.tolerance(prior.rounding)
    tokens = None
    blocks = [(begin, end) for begin, end in zip(cuts, cuts[1:], strict=False) if begin <= last]
    for begin, end in progress_over(blocks, progress, unit="pass"):
        if isinstance(state, State) and all(all_keep[begin:end]):  # nothing to compute, and nothing to cache
            state.advance(tokens)
            chosen = drawn[:, begin:end]
            could_turn.append(torch.zeros_like(chosen, dtype=torch.bool))
        else:
            logits = next_logits(state, tokens).float()
            sizes = torch.maximum(largest, sampler.largest(logits))
            if end - begin > 1:
                sizes = sizes.cummax(1).values
            chosen, close = sampler.decide(sampler.guide(logits), noise.of(begin, end), tolerance * sizes)
            largest = sizes[:, -1:]
            could_turn.append(close)
            if any(some_keep[begin:end]):
                chosen = torch.where(rows.keep[:, begin:end], drawn[:, begin:end], chosen)
            drawn[:, begin:end] = chosen
        tokens = torch.cat([chosen] * sampler.copies) if sampler.copies > 1 else chosen
    left = rows.keep.new_zeros(len(rows), drawn.shape[1] - sum(part.shape[1] for part in could_turn))
    return drawn, torch.cat([*could_turn, left], 1)
