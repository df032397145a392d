"""Grids of tokens larger than a prior's own: a window slides over a canvas, tokens that are there are known, and the
prior continues them.

    p(canvas | condition) = prod_w p(tokens that window w adds | its tokens that are there, condition of w)

Each factor is the prior's own exact conditional, so this is a density, from which `draw_canvas` draws. It is that of
the chain: the order of the windows and, in each of them, of its tokens. No token sees further than its window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenizer.base import TokenGrid
from tokenizer.precision import in_finest

from .base import Prior, evaluation_mode
from .given import Given
from .options import DecodingOptions, SamplingOptions
from .sampling import Monitor, OnStep, SampleBatch, SamplingStep, equal_batches, show_progress

LONGEST = 1 << 20  # positions along a side; numbers of places do not depend on the size of the canvas
AT_ONCE = 64  # windows that are drawn together
SCORED_AT_ONCE = 256


@dataclass(frozen=True)
class Chain:
    """The order in which a canvas is drawn: windows row by row, or outwards from known tokens, and in each window its
    unknown tokens in `order` (None: the prior's own).

    grid: that of a window. size: rows and columns of positions of the canvas. stride: positions from one window to the
    next, down and right; the last windows are flush with the border. wrap: whether the bottom continues at the top, and
    the right side at the left: up to half a window is then left open, and closed by windows that lie across the border,
    after all others. Raises `ValueError` for what does not fit."""

    grid: TokenGrid
    size: tuple[int, int]
    stride: tuple[int, int]
    wrap: tuple[bool, bool] = (False, False)
    order: str | None = None

    def __post_init__(self) -> None:
        if len(self.grid.shape) != 2 or self.grid.scales:
            raise ValueError(
                f"canvas: needs tokens on a grid of two axes, which each stand for one place (got {self.grid})"
            )
        for side, window, stride, wraps in zip(self.size, self.window, self.stride, self.wrap, strict=True):
            if side < window + wraps:
                what = "not larger, as a side that wraps must be," if side == window else "smaller"
                raise ValueError(f"canvas: {self.size} is {what} than a window of {self.window} positions")
            if not 1 <= stride <= window:
                raise ValueError(
                    f"stride: must be from 1 to {window} positions, so that no gaps are left (got {stride})"
                )
        assert self.canvas  # too large a grid raises here

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of positions of a window."""
        rows, columns = self.grid.positions.shape
        return rows, columns

    def grid_of(self, size: tuple[int, int]) -> TokenGrid:
        """Return the grid of tokens for a canvas or window of `size` positions."""
        return replace(self.grid, shape=(size[0] * self.grid.ids_per_position, size[1]))

    @property
    def half(self) -> tuple[int, int]:
        """Half a window, the usual stride."""
        return max(1, self.window[0] // 2), max(1, self.window[1] // 2)

    @cached_property
    def canvas(self) -> TokenGrid:
        return self.grid_of(self.size)

    @cached_property
    def starts(self) -> tuple[list[int], list[int]]:
        """Where windows begin, down and right; a last one may lie across a border."""
        sides = []
        for side, window, step, wraps in zip(self.size, self.window, self.stride, self.wrap, strict=True):
            starts, end = [*range(0, side - window, step)], side - window
            if wraps:  # the last window sees both sides of what is left open
                most = max(1, window // 2)
                if side - starts[-1] - window > most:
                    starts.append(side - most - window)
                open_from = starts[-1] + window
                end = open_from - (window - (side - open_from)) // 2
            sides.append([*starts, end])
        return sides[0], sides[1]

    @property
    def corners(self) -> list[tuple[int, int]]:
        """The upper left position of each window, row by row."""
        return [(top, left) for top in self.starts[0] for left in self.starts[1]]

    def select(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the raster indices, in the canvas, of the tokens of a grid of these rows and columns of positions."""
        several = self.grid.ids_per_position
        cells = self.canvas.cells.view(*self.size, several)[rows % self.size[0]][:, columns % self.size[1]]
        part = self.grid_of((len(rows), len(columns)))
        return torch.empty(len(part), dtype=torch.long).scatter_(0, part.cells.flatten(), cells.flatten())

    @cached_property
    def indices(self) -> Tensor:
        """The raster indices, in the canvas, of the tokens of each window: `(windows, N)`."""
        rows, columns = (torch.arange(side) for side in self.window)
        return torch.stack([self.select(top + rows, left + columns) for top, left in self.corners])

    @cached_property
    def places(self) -> Tensor:
        """The number of each token's noise, `(len(canvas),)`; that of a place is the same in a canvas of any size."""
        rows, columns = (torch.arange(side) for side in self.size)
        several = self.grid.ids_per_position
        numbers = (rows[:, None] * LONGEST + columns).view(-1, 1) * several + torch.arange(several)
        return torch.empty(len(self.canvas), dtype=torch.long).scatter_(
            0, self.canvas.cells.flatten(), numbers.flatten()
        )

    @property
    def waves(self) -> list[list[int]]:
        """The waves of a canvas of which nothing is known; see `plan_waves`."""
        return self.plan_waves(torch.zeros(len(self.canvas), dtype=torch.bool))

    def sort_windows(self, known: Tensor) -> list[int]:
        """Return the numbers of all windows in the order of the chain, if the tokens `known` `(M,)` are there: those
        across a border last; before that, outwards from what is known; else row by row."""
        rings, reached = [0] * len(self.indices), known.clone()
        left = set(range(len(rings))) if bool(known.any()) else set[int]()
        ring = 0
        while left:
            at = [number for number in sorted(left) if bool(reached[self.indices[number]].any())]
            for number in at:
                rings[number] = ring
            reached[self.indices[at]] = True
            left.difference_update(at)
            ring += 1
        closing = [
            [wraps and start == starts[-1] for start in starts]
            for wraps, starts in zip(self.wrap, self.starts, strict=True)
        ]
        across = [(down, right) for down in closing[0] for right in closing[1]]
        return sorted(range(len(rings)), key=lambda number: (across[number], rings[number]))

    def plan_waves(self, known: Tensor) -> list[list[int]]:
        """Return the numbers of the windows that are drawn at once, if the tokens `known` `(M,)` are there: each window
        as soon as all earlier ones that it overlaps are there. With k windows in reach of one, window (i, j) of a
        canvas without known tokens is in wave k i + j."""
        last, waves, there = torch.zeros(len(self.canvas), dtype=torch.long), dict[int, list[int]](), known.clone()
        for number in self.sort_windows(known):
            tokens = self.indices[number]
            if bool(there[tokens].all()):
                continue
            wave = int(last[tokens].max()) + 1
            last[tokens], there[tokens] = wave, True
            waves.setdefault(wave, []).append(number)
        return [waves[wave] for wave in sorted(waves)]

    def check(self, prior: Prior, known: Tensor) -> None:
        """Raise `ValueError` unless `prior` continues every window exactly, if the tokens `known` `(B, M)` are
        there."""
        if prior.grid != self.grid:
            raise ValueError(f"canvas: is made of windows of {self.grid}, but the prior's grid is {prior.grid}")
        if not prior.exact:
            raise ValueError("canvas: needs exact conditionals, but this prior has exact=False; set prior.exact = True")
        prior.check_order(self.order, 1)
        for _, _, _, there in () if prior.any_order else self.steps(known):
            if not bool(prior.sees_all_known(there).all()):
                raise ValueError(
                    f"canvas: this {prior.name} prior has one order, {prior.config.order!r}, and cannot continue "
                    "tokens on all sides; use an any-order prior (masked; blocks or gpt with any_order; made with "
                    "order_agnostic), or, in raster order, a canvas that is one window wide"
                )

    def steps(self, known: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield the windows of each wave that have unknown tokens: for each of them, the row of its canvas, its number,
        the raster indices of its tokens, `(n, N)`, and which are there, bool `(n, N)`. known: bool `(B, M)`."""
        known = known.cpu().clone()
        patterns, which = known.unique(dim=0, return_inverse=True)
        plans = [self.plan_waves(pattern) for pattern in patterns]
        for wave in range(max(map(len, plans), default=0)):
            pairs = [
                (row, number)
                for row, own in enumerate(which.tolist())
                for at_once in plans[own][wave : wave + 1]
                for number in at_once
            ]
            rows, windows = torch.tensor(pairs).unbind(1)
            tokens = self.indices[windows]
            there = known[rows[:, None], tokens]
            known[rows[:, None], tokens] = True
            yield rows, windows, tokens, there


@dataclass(frozen=True)
class Canvas:
    """Drawn or encoded tokens `(B, *chain.canvas.shape)`, their chain, and which of them were there before, bool of the
    same shape. prior: the fingerprint of the prior that drew them."""

    tokens: Tensor
    chain: Chain
    known: Tensor
    prior: str

    def __len__(self) -> int:
        return len(self.tokens)

    def require(self, prior: Prior) -> None:
        """Raise `ValueError` unless the canvas was made for this prior."""
        if self.prior != prior.fingerprint():
            raise ValueError(
                f"canvas: was made with another prior (fingerprint {self.prior[:12]}, not this pipeline's)"
            )


def draw_canvas(
    prior: Prior,
    chain: Chain,
    given: Given,
    keys: Tensor,
    tokens: Tensor,
    known: Tensor,
    sampling: SamplingOptions,
    decoding: DecodingOptions,
    *,
    batch_size: int = AT_ONCE,
    progress: bool | Mapping[str, Any] = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw the tokens of canvases that are not `known`; return all, `(B, *chain.canvas.shape)`.

    given: a row for each window of each canvas, the windows of one after those of another. keys: `(B,)`, of the noise:
    a token's noise is a function of its canvas's key, its place and its id. tokens, known: `(B, *chain.canvas.shape)`.
    batch_size: windows at a time, which does not matter otherwise. Raises `ValueError` if the prior has no such
    conditionals."""
    decoding, device = replace(decoding, order=chain.order), prior.device
    tokens, known = tokens.flatten(1).to(device).clone(), known.flatten(1).to(device).clone()
    tokens = torch.where(known, tokens.long(), 0)
    prior.check_sampling_options(sampling)
    sampling.check_guidance(given.names)
    chain.check(prior, known)
    raster, places = torch.arange(len(prior.grid), device=device), chain.places.to(device)
    count, keys = len(chain.corners), keys.to(device)

    def report(number: int) -> None:
        def read() -> tuple[Tensor, Tensor]:
            return tokens.unflatten(1, chain.canvas.shape).clone(), known.unflatten(1, chain.canvas.shape).clone()

        if on_step is not None:
            with torch.inference_mode(False), torch.no_grad():
                on_step(SamplingStep(number, known.clone(), read))

    with torch.inference_mode(), evaluation_mode(prior):
        steps = list(chain.steps(known))
        for number, (rows, windows, at, there) in enumerate(show_progress(steps, progress, unit="wave")):
            for some in equal_batches(len(rows), batch_size):
                row, place = rows[some].to(device), at[some].to(device)
                cells, own = (row[:, None], place), given[(rows[some] * count + windows[some]).to(device)]
                keep = there[some].to(device)
                order = torch.arange(len(row), device=device)
                batch = SampleBatch(
                    own, keys[row], tokens[cells], keep, raster, prior.blocks, order, places=places[place]
                )
                monitor = Monitor(False, None, batch, prior.grid)
                prior.draw(batch, sampling, decoding, monitor)
                tokens[cells] = monitor.tokens
                known[cells] = True
            report(number)
    return tokens.unflatten(1, chain.canvas.shape).clone()


def canvas_log_probs(
    prior: Prior, chain: Chain, given: Given, tokens: Tensor, known: Tensor, *, batch_size: int = SCORED_AT_ONCE
) -> Tensor:
    """Return log p of each token that is not `known`, given those that are there when it is drawn:
    `(B, *chain.canvas.shape)` nats in float64, 0 where known. The arguments are those of `draw_canvas`."""
    device, shape = prior.device, chain.canvas.shape
    chain.canvas.check(tokens)
    flat, before = tokens.flatten(1).long().to(device), known.flatten(1)
    chain.check(prior, before)
    steps = list(chain.steps(before))
    nats = torch.zeros(flat.shape, dtype=torch.float64, device="cpu")
    if not steps:
        return nats.unflatten(1, shape)
    rows, windows, at, there = (torch.cat([step[part] for step in steps]) for part in range(4))
    for some in equal_batches(len(rows), batch_size):
        own = given[(rows[some] * len(chain.corners) + windows[some]).to(device)]
        part = flat[rows[some, None].to(device), at[some].to(device)].unflatten(1, prior.grid.shape)
        with torch.no_grad(), evaluation_mode(prior):
            each = prior.chain_log_probs(part, own, chain.order, known=there[some].to(device)).flatten(1)
        new = ~there[some]
        nats[rows[some, None].expand_as(new)[new], at[some][new]] = in_finest(each).cpu()[new].double()
    return nats.unflatten(1, shape)
