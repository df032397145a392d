"""Attention windows: a query sees the tokens near the cell that it predicts.

Image Transformer (Parmar et al. 2018, section 3.2.1): queries are grouped in tiles of cells, and each tile attends to
all keys that any of its queries sees, under a mask. Time and memory are proportional to N times the window size instead
of N squared. Causality follows the decoding order. (NATTEN, Hassani et al. 2023, is causal along each axis, which would
hide the cells above and to the right.)"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .compiling import can_compile

TILE = (4, 16)  # rows and columns of a tile of queries: (nearly) the fastest on a CPU at 28x28 and 64x64 positions
MAX_MASKS = 1 << 27  # elements of all tile masks; limited because masks are built before weights are read
FLEX_TYPES, MIN_FLEX_WIDTH = (torch.float32, torch.bfloat16, torch.float16), 16

Sides = tuple[int, ...]
AXES = {2: "[rows, columns]", 3: "[frames, rows, columns]"}


def window_problem(window: Sides, dilations: Sequence[int], shape: Sides) -> str | None:
    """Return the problem with a window of this reach along the axes of this grid, or None."""
    if len(shape) not in AXES:
        return f"needs a grid of two or three axes (got {shape})"
    if len(window) != len(shape):
        return f"expected {AXES[len(shape)]} for a grid of {len(shape)} axes (got {list(window)})"
    if min(window) < 1:
        return f"{AXES[len(shape)]} must be at least 1 each (got {list(window)})"
    size = math.prod(shape)
    seen = min(size, math.prod(2 * reach + side for reach, side in zip(window, tile_sides(len(shape)), strict=True)))
    if size * seen * sum(not covers(window, dilation, shape) for dilation in set(dilations)) > MAX_MASKS:
        return f"{list(window)} is too large for a grid of {size} tokens; null sees all earlier ones"
    return None


def tile_sides(axes: int) -> Sides:
    return (1,) * (axes - len(TILE)) + TILE


def covers(window: Sides, dilation: int, shape: Sides) -> bool:
    return dilation == 1 and all(reach >= size - 1 for reach, size in zip(window, shape, strict=True))


def make_windows(
    targets: Tensor, sources: Tensor, window: Sides, dilations: Sequence[int], shape: Sides
) -> list[AttentionWindow | None]:
    """Make each layer's window, given its dilation; None if it covers the grid. Arguments: see `AttentionWindow`."""
    made = {
        d: None if covers(window, d, shape) else AttentionWindow(targets, sources, window, d) for d in set(dilations)
    }
    return [made[dilation] for dilation in dilations]


class KeySlots(NamedTuple):
    """Slots for the keys that sampling still needs. The key at rank r is stored in one of `size` slots, `slots[r]`,
    which is reused once no later query sees that key. The query at rank r sees the next `counts[r]` slots in `seen`."""

    size: int
    slots: list[int]
    seen: Tensor
    counts: list[int]


class AttentionWindow(nn.Module):
    """The keys that each query sees: earlier keys at most `window` cells away along each axis: rows and columns, or
    frames, rows and columns.

    With a dilation d, the offsets along all axes are multiples of d, up to d times as far. All queries see keys with a
    negative time, such as a start token."""

    targets: Tensor
    sources: Tensor
    queries: Tensor  # int64 (tiles, q): the queries of each tile, padded with arbitrary ones
    keys: Tensor  # int64 (tiles, k): the keys of each tile, padded with arbitrary ones
    mask: Tensor  # bool (tiles, q, k): whether a query sees a key
    at: Tensor  # int64 (N,): the index of each query among the queries of all tiles

    def __init__(self, targets: Tensor, sources: Tensor, window: Sides, dilation: int = 1) -> None:
        """targets: `(N, 1 + axes)`, the time of each query, and the coordinates of the cell that it predicts; sources:
        `(M, 1 + axes)`, the time (negative: before all queries) and the coordinates of each key's token."""
        super().__init__()
        self.window, self.dilation = window, dilation
        # Created on first use, once for each device.
        self.slots_read: Sequence[Tensor] = ()
        self.block_mask: Any = None
        self.reads_on: torch.device | None = None
        self.blocks_on: torch.device | None = None
        self.register_buffer("targets", targets, persistent=False)
        self.register_buffer("sources", sources, persistent=False)
        if targets.is_meta:  # tiles need the values of the order
            return
        queries, keys, masks = (list(each) for each in zip(*self.tiles(), strict=True))
        most, many = max(map(len, queries)), max(map(len, keys))
        masks = [F.pad(mask, (0, many - mask.shape[1])) for mask in masks]
        # Softmax needs at least one key.
        masks = [F.pad(mask, (0, 0, 0, most - len(mask)), value=True) for mask in masks]
        numbers = [most * tile + torch.arange(len(each), device="cpu") for tile, each in enumerate(queries)]
        at = torch.empty(len(targets), dtype=torch.long, device="cpu")
        at.scatter_(0, torch.cat(queries), torch.cat(numbers))
        self.register_buffer("queries", pad_sequence(queries, batch_first=True), persistent=False)
        self.register_buffer("keys", pad_sequence(keys, batch_first=True), persistent=False)
        self.register_buffer("mask", torch.stack(masks), persistent=False)
        self.register_buffer("at", at, persistent=False)

    def rule(self) -> Callable[[Any, Any], Tensor]:
        """Return a function that tells whether a query sees a key, given broadcastable indices of both."""
        (time, *cells), (since, *from_cells) = self.targets.unbind(1), self.sources.unbind(1)
        axes, d = list(zip(cells, from_cells, self.window, strict=True)), self.dilation

        def sees(query: Any, key: Any) -> Tensor:
            near = since[key] < time[query]
            for cell, from_cell, reach in axes:
                offset = cell[query] - from_cell[key]
                near = near & (offset.abs() <= d * reach)
                if d > 1:
                    near = near & (offset % d == 0)
            return near | (since[key] < 0)

        return sees

    def tiles(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield for each tile its queries, the keys that any of them sees, and which query sees which key. With a
        dilation d, a tile consists of every d-th cell along each axis, whose windows overlap."""
        d, sees, cells = self.dilation, self.rule(), self.targets[:, 1:]
        placed = (self.sources[:, 0] >= 0).nonzero()[:, 0]
        extent = torch.cat([cells, self.sources[placed, 1:]]).amax(0) + 1
        key_at = torch.full(extent.tolist(), -1, dtype=torch.long, device="cpu")
        key_at[tuple(self.sources[placed, 1:].t())] = placed
        always = (self.sources[:, 0] < 0).nonzero()[:, 0]
        sides = torch.tensor(tile_sides(cells.shape[1]), device="cpu")
        tile = torch.cat([cells % d, cells // d // sides], 1)
        _, number, counts = tile.unique(dim=0, return_inverse=True, return_counts=True)
        for queries in number.argsort(stable=True).split(counts.tolist()):
            firsts, lasts = cells[queries].amin(0).tolist(), cells[queries].amax(0).tolist()
            around = [
                torch.arange(max(first - d * reach, first % d), min(last + d * reach + 1, size), d, device="cpu")
                for first, last, reach, size in zip(firsts, lasts, self.window, key_at.shape, strict=True)
            ]
            near = key_at[torch.meshgrid(*around, indexing="ij")].flatten()
            keys = torch.cat([always, near[near >= 0].sort().values])
            mask = sees(queries[:, None], keys)
            yield queries, keys[mask.any(0)], mask[:, mask.any(0)]

    def __getstate__(self) -> dict[str, Any]:
        """Omit FlexAttention's mask, which holds a local function; it is rebuilt on use."""
        return {**vars(self), "block_mask": None, "blocks_on": None}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Attend from queries `(B, N, heads, width)` to keys and values `(B, M, heads, width)`.

        Training on CUDA uses FlexAttention if possible. Everything else, including all scoring and sampling, uses the
        tiles, so that results do not depend on a compiler."""
        if self.training and not dropout and can_flex(q):
            return self.flex(q, k, v, compiled_flex())
        tiled = (take(q, self.queries), take(k, self.keys), take(v, self.keys))
        attended = F.scaled_dot_product_attention(*tiled, attn_mask=self.mask[:, None], dropout_p=dropout)
        untiled = attended.transpose(1, 2).flatten(0, 1).index_select(0, self.at)
        return untiled.unflatten(1, (len(q), q.shape[2])).transpose(0, 1)

    def flex(self, q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Any]) -> Tensor:
        """Attend with `attention`, which is `flex_attention` or its compiled form."""
        if self.blocks_on != q.device:
            from torch.nn.attention.flex_attention import create_block_mask

            sizes, sees = (len(self.targets), len(self.sources)), self.rule()
            of_all = lambda batch, head, query, key: sees(query, key)  # noqa: E731
            with torch.inference_mode(False):  # the cached mask may be used in training
                self.block_mask = create_block_mask(of_all, None, None, *sizes, device=str(q.device))
            self.blocks_on = q.device
        return attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=self.block_mask).transpose(1, 2)

    def seen(self, field: Tensor) -> Tensor:
        """Return which tokens reach each query, bool `(N, tokens)`. field: those that reach each key, `(M, tokens)`."""
        seen = [mask.float() @ field[keys].float() > 0 for mask, keys in zip(self.mask, self.keys, strict=True)]
        return torch.cat(seen)[self.at]

    @property
    def reads(self) -> Sequence[Tensor]:
        """The slots of `key_slots` that the query at each rank sees, created once per device."""
        if self.reads_on != self.at.device:
            slots = self.key_slots
            with torch.inference_mode(False):
                self.slots_read = slots.seen.to(self.at.device).split(slots.counts)
            self.reads_on = self.at.device
        return self.slots_read

    @cached_property
    @torch.inference_mode(False)
    def key_slots(self) -> KeySlots:
        """The slots for decoding, in which queries and keys have the same ranks: a slot is free again after the last
        query that sees its key."""
        at, mask = self.at.cpu(), self.mask.flatten(0, 1).cpu()[self.at.cpu()]
        rank, column = mask.nonzero(as_tuple=True)
        keys = self.keys.cpu()[at[rank] // self.queries.shape[1], column]
        last = torch.arange(len(at), device="cpu").scatter_reduce(0, keys, rank, "amax").tolist()
        leaving, free, slots, size = defaultdict[int, list[int]](list), list[int](), list[int](), 0
        for index, until in enumerate(last):
            if not free:
                free.append(size)
                size += 1
            slots.append(free.pop())
            leaving[until].append(slots[-1])
            free += leaving.pop(index, [])
        return KeySlots(size, slots, torch.tensor(slots, device="cpu")[keys], mask.sum(1).tolist())


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather the rows `index` (tiles, n) of `x` (B, N, heads, width) as `(tiles, B * heads, n, width)`: tiles become
    the batch axis, so all images share the masks."""
    rows = x.transpose(0, 1).index_select(0, index.flatten())
    return rows.flatten(1, 2).unflatten(0, index.shape).transpose(1, 2)


def can_flex(q: Tensor) -> bool:
    """Return whether FlexAttention has a kernel for these queries and may compile it."""
    fits = q.is_cuda and q.dtype in FLEX_TYPES and q.shape[-1] >= MIN_FLEX_WIDTH
    return fits and not torch.compiler.is_compiling() and can_compile(q.device)


@cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
