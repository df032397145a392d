"""Drawing step by step along a walk: as it comes, or from CUDA graphs of the same steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..requests import Model, Rows
from .graphs import Graphs, Recorder, bucket, graphs_of, places, recorder_for
from .noise import GumbelNoise
from .settings import Sampler
from .watching import Watch

Cuts = list[tuple[int, int]]
"""Where blocks begin and end."""


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


@dataclass
class Plan:
    """What is known of a walk before it begins: the blocks until the last rank that not all rows keep; and at each rank
    whether some rows keep their token, or all."""

    cuts: Cuts
    some_keep: list[bool]
    all_keep: list[bool]

    @classmethod
    def of(cls, rows: Rows) -> Plan:
        """That of `rows`."""
        some, every = rows.keep.any(0).tolist(), rows.keep.all(0).tolist()
        last = max((rank for rank, kept in enumerate(every) if not kept), default=-1)
        ends = [0, *accumulate(rows.blocks)]
        return cls([cut for cut in zip(ends, ends[1:], strict=False) if cut[0] <= last], some, every)

    def noise(self, prior: Model, rows: Rows) -> GumbelNoise:
        """That of the rows; for a GPU drawn ahead, as far as it is needed."""
        end = self.cuts[-1][1] if self.cuts and prior.device.type == "cuda" else 0
        return GumbelNoise(rows.generators, len(prior.grid), prior.grid.vocab_size, prior.device, end)


class Steps:
    """Tokens of `rows` so far, `drawn` `(B, N)` in the order of the walk, and which of them rounding could turn. A step
    reads and writes tensors alone, and decides nothing by what is in them: a graph can hold it."""

    def __init__(self, prior: Model, rows: Rows, sampler: Sampler, cache: bool = True) -> None:
        self.rows, self.sampler, self.head = rows, sampler, prior.readout
        self.scales = sampler.scales(rows.blocks)  # numbers, which a graph of the block's step holds
        self.tolerances = [sampler.tolerance(prior.rounding, scale) for scale in self.scales]
        labels = sampler.doubled(rows.labels, prior.num_classes)
        start, self.next_logits = (
            (prior.start, prior.next_logits) if cache else (prior.start_slow, prior.next_logits_slow)
        )
        self.state: Any = start(len(labels), labels, rows.walk(sampler.copies))
        self.drawn = rows.given.clone()
        self.could_turn: list[Tensor] = []  # in each block
        self.largest = torch.ones(len(rows), 1, device=prior.device)  # |logit| of each image so far
        self.tokens: Tensor | None = None  # the last block's, for the model

    def take(self, begin: int, end: int, noise: Tensor, some_keep: bool, all_keep: bool) -> None:
        """Draw the tokens ranked `begin` to `end` - 1 with `noise` `(B, n, V)`, but those that rows keep."""
        if all_keep and isinstance(self.state, State):  # nothing to compute, and nothing to cache
            self.state.advance(self.tokens)
            chosen = self.drawn[:, begin:end]
            self.could_turn.append(torch.zeros_like(chosen, dtype=torch.bool))
        else:
            logits = self.next_logits(self.state, self.tokens).float()
            sizes = torch.maximum(self.largest, self.sampler.largest(logits))
            if end - begin > 1:
                sizes = sizes.cummax(1).values
            block = len(self.could_turn)
            guided = self.sampler.guide(logits, self.scales[block])
            tolerance = self.tolerances[block]
            widths = self.sampler.widths(tolerance, self.head.steepness(logits))
            chosen, close = self.sampler.decide(guided, noise, tolerance * sizes, widths)
            self.largest = sizes[:, -1:]
            self.could_turn.append(close)
            if some_keep:
                chosen = torch.where(self.rows.keep[:, begin:end], self.drawn[:, begin:end], chosen)
            self.drawn[:, begin:end] = chosen
        copies = self.sampler.copies
        self.tokens = torch.cat([chosen] * copies) if copies > 1 else chosen

    def result(self, blocks: int) -> tuple[Tensor, Tensor]:
        """Tokens `(B, N)` after so many blocks, and bool `(B, N)`: those that rounding could turn."""
        could_turn = self.could_turn[:blocks]
        left = self.drawn.shape[1] - sum(part.shape[1] for part in could_turn)
        return self.drawn, torch.cat([*could_turn, self.rows.keep.new_zeros(len(self.drawn), left)], 1)


def step_by_step(prior: Model, rows: Rows, sampler: Sampler, cache: bool, watch: Watch) -> tuple[Tensor, Tensor]:
    """Tokens `(B, N)` in the order of the walk, and which of them rounding could turn."""
    plan, steps = Plan.of(rows), Steps(prior, rows, sampler, cache)
    with plan.noise(prior, rows) as noise:
        for begin, end in watch.over(plan.cuts):
            some, every = any(plan.some_keep[begin:end]), all(plan.all_keep[begin:end])
            steps.take(begin, end, noise.of(begin, end), some, every)
            watch.took(rows, steps.drawn, end)
    return steps.result(len(plan.cuts))


def from_graphs(prior: Model, rows: Rows, sampler: Sampler, watch: Watch) -> tuple[Tensor, Tensor] | None:
    """As `step_by_step` with a cache, from graphs; None where there are none, or where another thread draws from them,
    or this one, from whose `on_step` this is called. Then the rows' generators are as they were."""
    recorder = recorder_for(prior.device) if prior.captures and rows.path.ndim == 1 else None
    if recorder is None:
        return None
    kept = graphs_of(prior)
    if not kept.busy.acquire(blocking=False):
        return None
    try:
        return from_kept(kept, recorder, prior, rows, sampler, watch)
    finally:
        kept.busy.release()


def from_kept(
    kept: Graphs, recorder: Callable[[], Recorder], prior: Model, rows: Rows, sampler: Sampler, watch: Watch
) -> tuple[Tensor, Tensor] | None:
    """`from_graphs`, with those of the model, which nobody else uses."""
    plan = Plan.of(rows)
    path = None if rows.own else tuple(rows.path.tolist())
    if not prior.recomputes:
        plan.all_keep = [False] * len(plan.all_keep)  # which tokens are kept is then no part of a graph
    key = (bucket(len(rows)), sampler, path, rows.blocks, any(plan.some_keep), tuple(plan.all_keep))
    states = [generator.get_state() for generator in rows.generators]
    try:
        found = kept.find(key, places(prior), lambda: Captured(prior, rows, sampler, recorder()))
        return None if found is None else found.draw(rows, plan, watch)
    except BaseException as error:
        kept.drop(key)  # it is left half made
        if watch.failed or not isinstance(error, Exception):
            raise
        kept.refuse(key, error)
        for generator, state in zip(rows.generators, states, strict=True):
            generator.set_state(state)
    return None


class Captured:
    """Graphs of the steps of a number of rows, and the memory that they read: what is asked for, and noise."""

    def __init__(self, prior: Model, rows: Rows, sampler: Sampler, recorder: Recorder) -> None:
        self.prior, self.sampler, self.recorder = prior, sampler, recorder
        size = bucket(len(rows))
        labels, given = rows.labels.new_zeros(size), rows.given.new_zeros(size, rows.given.shape[1])
        self.rows = replace(rows, labels=labels, given=given, keep=given.bool(), generators=[])
        self.noise = torch.zeros(size, max(rows.blocks), prior.grid.vocab_size, device=prior.device)
        self.launches: list[Callable[[], None]] = []
        self.steps: Any = None

    def draw(self, rows: Rows, plan: Plan, watch: Watch) -> tuple[Tensor, Tensor]:
        """As `step_by_step` does; what has no graph yet gets one."""
        count, some_keep = len(rows), any(plan.some_keep)  # a graph holds that there is a mask, and not which
        self.fill(rows)
        with plan.noise(self.prior, rows) as noise:
            self.launch(0, self.begin)
            for number, (begin, end) in enumerate(watch.over(plan.cuts), 1):
                slot = self.noise[:, : end - begin]
                slot[:count] = noise.of(begin, end)
                every = all(plan.all_keep[begin:end])
                self.launch(number, partial(self.take, begin, end, slot, some_keep, every))
                watch.took(rows, self.steps.drawn[:count], end)
        tokens, close = self.steps.result(len(plan.cuts))
        return tokens[:count].clone(), close[:count]

    def fill(self, rows: Rows) -> None:
        """Copy what is asked for; the rows left are of the null class, with noise of none or of a call before."""
        count, mine = len(rows), self.rows
        for kept, given, empty in (
            (mine.labels, rows.labels, self.prior.num_classes),
            (mine.given, rows.given, 0),
            (mine.keep, rows.keep, False),
        ):
            kept[:count] = given
            kept[count:] = empty

    def begin(self) -> None:
        """All that comes before the first step."""
        self.steps = Steps(self.prior, self.rows, self.sampler)

    def take(self, *step: Any) -> None:
        """A step."""
        self.steps.take(*step)

    def launch(self, number: int, run: Callable[[], None]) -> None:
        """Compute what `run` does by its graph."""
        if number == len(self.launches):
            self.launches.append(self.recorder.capture(run))
        self.launches[number]()
