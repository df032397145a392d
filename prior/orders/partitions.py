"""The names of orders: what each may look like, what is wrong with one, and what it makes of a grid.

NAME          raster, hilbert, diagonal, ...
NAME:K        with a number: halton:8 (blocks), wave:2 (steps), regions:4, random:SEED, random:SEED:K
NAME/K        an order of one token a block, in blocks of K tokens: raster/4
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .curves import CURVES
from .sets import KeyOf, dyadic, grouped, region_counts, regions, rows, wave
from .sizes import even, growing
from .spread import halton, spread

FORMS = {
    "raster": ("",),
    **{name: ("",) for name in CURVES},
    "random": ("SEED", "SEED:K"),
    "halton": ("", "K"),
    "spread": ("", "K"),
    "diagonal": ("",),
    "wave": ("S",),
    "rows": ("",),
    "dyadic": ("",),
    "regions": ("K",),
}
"""What may follow a name, after a colon."""
OWN_BLOCKS = ("diagonal", "wave", "rows", "dyadic", "regions")
ANY_AXES = ("raster", "random")
LAST_SEED = (1 << 64) - 1  # of torch


class Partition(NamedTuple):
    """An order of a grid's cells, cut into blocks; the cells of a block are drawn at once."""

    order: Tensor
    """(N,) int64; `order[r]` is the raster index of the r-th token."""
    blocks: tuple[int, ...]
    """Sizes that sum to N and cut the ranks into blocks."""


class Name(NamedTuple):
    """The parts of KIND:NUMBER:NUMBER/SIZE, as text."""

    kind: str
    numbers: tuple[str, ...]
    size: str | None


def read_name(name: str) -> Name:
    """The parts of a name, whatever they are."""
    head, slash, size = name.partition("/")
    kind, *numbers = head.split(":")
    return Name(kind, tuple(numbers), size if slash else None)


def written(kind: str) -> list[str]:
    """How an order of this kind is written."""
    return [f"{kind}:{form}" if form else kind for form in FORMS[kind]]


def order_problem(name: str, shape: tuple[int, ...]) -> str | None:
    """What is wrong with the order `name` on a grid of this shape, in one line that says what is allowed, or None."""
    kind, numbers, size = read_name(name)
    shown = repr(name if len(name) <= 40 else f"{name[:40]}...")
    if kind not in FORMS:
        known = ", ".join(form for each in FORMS for form in written(each))
        return f"no order is called {shown}; there are {known}, and NAME/K for blocks of K tokens"
    if kind == "random" and not (numbers and is_number(numbers[0], 0, LAST_SEED)):
        return f"'random' needs a seed, 0 to {LAST_SEED}, as in random:0 (got {shown})"
    if kind not in ANY_AXES and len(shape) != 2:
        return f"{shown} walks a grid of two axes, this one has {len(shape)}; use raster or random:SEED"
    if len(numbers) not in [len(form.split(":")) if form else 0 for form in FORMS[kind]]:
        return f"{kind!r} is written {' or '.join(written(kind))} (got {shown})"
    if problem := number_problem(kind, numbers, shape):
        return f"{problem} (got {shown})"
    if size is None:
        return None
    if has_blocks(kind, numbers):
        return f"{shown}: /K cuts an order of one token a block, and {name.partition('/')[0][:40]!r} has its own blocks"
    return None if is_number(size, 1, math.prod(shape)) else f"/K {limit('tokens', math.prod(shape))} (got {shown})"


def number_problem(kind: str, numbers: tuple[str, ...], shape: tuple[int, ...]) -> str | None:
    """What is wrong with the numbers that follow `kind`, of which there are as many as there may be."""
    if kind == "wave":
        width = shape[1]
        return None if is_number(numbers[0], 1, width) else f"wave:S {limit('columns', width)}"
    count = numbers[1:] if kind == "random" else numbers
    if not count:
        return None
    form, cells = written(kind)[-1], math.prod(shape)
    if not is_number(count[0], 1, cells):
        return f"{form} {limit('regions' if kind == 'regions' else 'blocks', cells)}"
    if kind == "regions" and not region_counts(int(count[0]), (shape[0], shape[1])):
        height, width = shape
        return f"no {count[0]} regions fit a grid of {height}x{width}: K is a * b, with a <= {height} and b <= {width}"
    return None


def limit(what: str, largest: int) -> str:
    """The rest of a sentence about a number of these."""
    return f"is a number of {what}, from 1 to {largest} here"


def is_number(text: str, lowest: int, highest: int) -> bool:
    """Whether it is a whole number from `lowest` to `highest`, in at most twenty digits."""
    return text.isascii() and text.isdecimal() and len(text) <= 20 and lowest <= int(text) <= highest


def has_blocks(kind: str, numbers: tuple[str, ...]) -> bool:
    """Whether the name says itself which tokens are a block."""
    return kind in OWN_BLOCKS or len(numbers) > (kind == "random")


def make_partition(name: str, shape: tuple[int, ...]) -> Partition:
    """The order called `name` over a grid of `shape`, and its blocks. Raises `ValueError` as `order_problem` says."""
    if problem := order_problem(name, shape):
        raise ValueError(problem)
    kind, numbers, size = read_name(name)
    if kind in OWN_BLOCKS:
        order, blocks = grouped(key_of(kind, numbers, (shape[0], shape[1])), (shape[0], shape[1]))
        return Partition(torch.tensor(order, device="cpu"), blocks)
    cells = math.prod(shape)
    if has_blocks(kind, numbers):
        blocks = growing(cells, int(numbers[-1]))
    else:
        blocks = even(cells, int(size or 1))
    if kind == "raster":
        return Partition(torch.arange(cells, device="cpu"), blocks)
    if kind == "random":
        generator = torch.Generator().manual_seed(int(numbers[0]))
        return Partition(torch.randperm(cells, generator=generator, device="cpu"), blocks)
    height, width = shape
    if kind == "halton":
        order = halton(height, width)
    elif kind == "spread":
        order = spread(height, width, blocks)
    else:
        order = [row * width + col for row, col in CURVES[kind](height, width)]
    return Partition(torch.tensor(order, device="cpu"), blocks)


def key_of(kind: str, numbers: tuple[str, ...], shape: tuple[int, int]) -> KeyOf:
    """What the cells of a block have in common."""
    if kind == "regions":
        return regions(int(numbers[0]), shape)
    if kind == "wave":
        return wave(int(numbers[0]))
    return {"diagonal": wave(1), "rows": rows(), "dyadic": dyadic()}[kind]


def make_order(name: str, shape: tuple[int, ...]) -> Tensor:
    """The order called `name` over a grid of `shape`, without its blocks: int64 `(N,)`. Raises as `make_partition`."""
    return make_partition(name, shape).order


def order_of(order: Any, rows: slice | Sequence[int], count: int) -> Any:
    """The part of an order, in whichever form, that belongs to some of `count` images, where each has its own. Raises
    `ValueError` for one of another number of images."""
    if order is None or isinstance(order, str):
        return order
    if isinstance(order, Partition):
        return Partition(order_of(order.order, rows, count), order.blocks)
    walks = as_tensor(order)
    if walks.ndim < 2:
        return walks
    if len(walks) != count:
        raise ValueError(f"order: got {len(walks)} for {count} images; give one, or one per image")
    return walks[rows]


def as_tensor(values: Any, device: torch.device | None = None) -> Tensor:
    """Numbers, in whatever holds them, as a tensor."""
    listed = isinstance(values, (list, tuple)) and any(isinstance(one, (Tensor, np.ndarray)) for one in values)
    if listed or isinstance(values, np.ndarray):
        values = np.asarray(values, order="C")  # torch takes no list of tensors, and no array that is flipped
    return torch.as_tensor(values, device=device)


def block_numbers(order: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """The number of the block of each cell, in raster order: int64, as `order`, `(N,)` or `(B, N)`."""
    sizes = torch.tensor(blocks, device=order.device)
    numbers = torch.arange(len(blocks), device=order.device).repeat_interleave(sizes, output_size=order.shape[-1])
    return torch.empty_like(order).scatter_(-1, order, numbers.expand_as(order))
