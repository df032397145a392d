"""Orders: the sequence in which the cells of a grid are drawn, and how many at once.

NAME          raster, hilbert, diagonal, ...
NAME:K        with a number: halton:8 (blocks), wave:2 (steps), regions:4, random:SEED, random:SEED:K
NAME/K        an order of single tokens, cut into blocks of K: raster/4

Scan orders as compared by Esser et al. 2021 (taming transformers, fig. 47) and Yu et al. 2024 (RAR, table 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FORMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("raster", "column", "snake", "spiral_in", "spiral_out", "z_curve", "hilbert", "subsample"), ("",)),
    "random": ("SEED", "SEED:K"),
    "halton": ("", "K"),
    "spread": ("", "K"),
    "diagonal": ("",),
    "wave": ("S",),
    "rows": ("",),
    "dyadic": ("",),
    "regions": ("K",),
}
"""The numbers that may follow a name, after a colon."""
OWN_BLOCKS = ("diagonal", "wave", "rows", "dyadic", "regions")
ANY_AXES = ("raster", "random")
LAST_SEED = (1 << 64) - 1  # the largest seed that torch accepts


class Partition(NamedTuple):
    """An order of a grid's cells, cut into blocks; the cells of a block are drawn at once."""

    order: Tensor  # (N,) int64; order[r] is the raster index of the r-th token
    blocks: tuple[int, ...]  # sizes that sum to N and cut the ranks into blocks


def parse_name(name: str) -> tuple[str, tuple[str, ...], str | None]:
    """Split KIND:NUMBER:NUMBER/SIZE into its parts, without checking them."""
    head, slash, size = name.partition("/")
    kind, *numbers = head.split(":")
    return kind, tuple(numbers), size if slash else None


def name_forms(kind: str) -> list[str]:
    return [f"{kind}:{form}" if form else kind for form in FORMS[kind]]


def order_problem(name: str, shape: tuple[int, ...]) -> str | None:
    """Return the problem with the order `name` on a grid of this shape, and what is allowed, in one line; or None."""
    kind, numbers, size = parse_name(name)
    quoted = repr(name if len(name) <= 40 else f"{name[:40]}...")
    if kind not in FORMS:
        known = ", ".join(form for each in FORMS for form in name_forms(each))
        return f"no order is called {quoted}; available: {known}, and NAME/K for blocks of K tokens"
    if kind == "random" and not (numbers and is_within(numbers[0], 0, LAST_SEED)):
        return f"'random' needs a seed, 0 to {LAST_SEED}, as in random:0 (got {quoted})"
    if kind not in ANY_AXES and len(shape) != 2:
        return f"{quoted} needs a grid of two axes, but this one has {len(shape)}; use raster or random:SEED"
    if len(numbers) not in [len(form.split(":")) if form else 0 for form in FORMS[kind]]:
        return f"{kind!r} is written {' or '.join(name_forms(kind))} (got {quoted})"
    if problem := number_problem(kind, numbers, shape):
        return f"{problem} (got {quoted})"
    if size is None:
        return None
    if has_blocks(kind, numbers):
        return f"{quoted}: /K cuts an order of single tokens, but {name.partition('/')[0][:40]!r} has its own blocks"
    return None if is_within(size, 1, math.prod(shape)) else f"/K {limit('tokens', math.prod(shape))} (got {quoted})"


def number_problem(kind: str, numbers: tuple[str, ...], shape: tuple[int, ...]) -> str | None:
    """Return why the numbers after `kind:` are invalid, or None. Their count has been checked."""
    count = numbers[1:] if kind == "random" else numbers
    if not count:
        return None
    what = {"wave": "columns", "regions": "regions"}.get(kind, "blocks")
    most = shape[1] if kind == "wave" else math.prod(shape)
    if not is_within(count[0], 1, most):
        return f"{name_forms(kind)[-1]} {limit(what, most)}"
    if kind == "regions" and not region_counts(int(count[0]), (shape[0], shape[1])):
        height, width = shape
        return f"no {count[0]} regions fit a grid of {height}x{width}: K is a * b, with a <= {height} and b <= {width}"
    return None


def limit(what: str, largest: int) -> str:
    return f"is a number of {what}, from 1 to {largest} here"


def is_within(text: str, lowest: int, highest: int) -> bool:
    """Return whether `text` is a whole number from `lowest` to `highest`, in at most twenty digits."""
    return text.isascii() and text.isdecimal() and len(text) <= 20 and lowest <= int(text) <= highest


def has_blocks(kind: str, numbers: tuple[str, ...]) -> bool:
    return kind in OWN_BLOCKS or len(numbers) > (kind == "random")


def make_partition(name: str, shape: tuple[int, ...]) -> Partition:
    """Return the order `name` and its blocks on a grid of `shape`. Raises `ValueError` (see `order_problem`)."""
    if problem := order_problem(name, shape):
        raise ValueError(problem)
    kind, numbers, size = parse_name(name)
    cells = math.prod(shape)
    blocks = even(cells, int(size or 1))
    if kind not in OWN_BLOCKS and has_blocks(kind, numbers):
        blocks = growing(cells, int(numbers[-1]))
    if kind == "raster":
        return Partition(torch.arange(cells, device="cpu"), blocks)
    if kind == "random":
        generator = torch.Generator().manual_seed(int(numbers[0]))
        return Partition(torch.randperm(cells, generator=generator, device="cpu"), blocks)
    height, width = shape
    if kind == "halton":
        order = halton_order(height, width)
    elif kind == "spread":
        order = spread_order(height, width, blocks)
    elif kind in CURVES:
        order = [row * width + col for row, col in CURVES[kind](height, width)]
    else:
        keys = {"diagonal": wave(1), "rows": lambda row, col: (row,), "dyadic": dyadic}
        if kind == "regions":
            key = regions(int(numbers[0]), (height, width))
        else:
            key = wave(int(numbers[0])) if kind == "wave" else keys[kind]
        order, blocks = group_cells(key, (height, width))
    return Partition(torch.tensor(order, device="cpu"), blocks)


def make_order(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the order `name` on a grid of `shape`, int64 `(N,)`. Raises as `make_partition` does."""
    return make_partition(name, shape).order


def block_numbers(order: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Return the block number of each cell, in raster order: int64, `(N,)` or `(B, N)` like `order`."""
    sizes = torch.tensor(blocks, device=order.device)
    numbers = torch.arange(len(blocks), device=order.device).repeat_interleave(sizes, output_size=order.shape[-1])
    return torch.empty_like(order).scatter_(-1, order, numbers.expand_as(order))


# Block sizes


def growing(cells: int, blocks: int) -> tuple[int, ...]:
    """Return growing block sizes: after block b of K, a share of about 1 - cos(pi/2 * b/K) of the cells is known.

    MaskGIT's schedule (Chang et al. 2022). Sizes are at least 1, never decrease, and sum to `cells`. blocks: from 1 to
    `cells`."""
    ends = [0]
    for block in range(1, blocks + 1):
        known = cells * (1 - math.cos(math.pi / 2 * block / blocks))
        # The small term makes halves round up on every machine, however its cosine rounds. Since 1 - cos is convex,
        # taking at least one cell per block leaves enough for later blocks.
        ends.append(max(ends[-1] + 1, math.floor(known + 0.5 + 1e-9)))
    return tuple(sorted(end - start for start, end in zip(ends, ends[1:], strict=False)))


def even(cells: int, size: int) -> tuple[int, ...]:
    """Return blocks of `size` cells; the last one may be smaller."""
    rest = cells % size
    return (size,) * (cells // size) + ((rest,) if rest else ())


def blocks_problem(blocks: Sequence[int], cells: int) -> str | None:
    """Return the problem with these block sizes on a grid of `cells` tokens, in one line; or None."""
    if small := [size for size in blocks if size < 1]:
        return f"blocks: sizes must be at least 1 (got {small[0]})"
    if sum(blocks) != cells:
        return f"blocks: sizes sum to {sum(blocks)}, but the grid has {cells} tokens"
    return None


# Known tokens first


def known_first(order: Tensor, known: Tensor) -> Tensor:
    """Move known tokens to the front of `order`, so that all other tokens are conditioned on them; both groups keep
    their relative order. Returns `(B, N)`. known: bool `(B, N)`, raster order."""
    order = order.expand(known.shape)
    return order.gather(1, torch.argsort(~known.gather(1, order), dim=1, stable=True))


def blocks_after_known(blocks: tuple[int, ...], known: int) -> tuple[int, ...]:
    """Merge the first `known` tokens into one block, keeping the later block boundaries."""
    cuts = [0, *([known] if known else []), *(cut for cut in accumulate(blocks) if cut > known)]
    return tuple(end - begin for begin, end in zip(cuts, cuts[1:], strict=False))


# One cell after another


Cell = tuple[int, int]


def column(height: int, width: int) -> Iterable[Cell]:
    """Down each column, left to right."""
    return ((row, col) for col in range(width) for row in range(height))


def snake(height: int, width: int) -> Iterable[Cell]:
    """Row by row, every second row from right to left."""
    return ((row, col if row % 2 == 0 else width - 1 - col) for row in range(height) for col in range(width))


def spiral_in(height: int, width: int) -> list[Cell]:
    """Clockwise from the top left corner to the centre."""
    ring: list[Cell] = []
    top, left, bottom, right = 0, 0, height - 1, width - 1
    while top <= bottom and left <= right:
        ring += [(top, col) for col in range(left, right + 1)]
        ring += [(row, right) for row in range(top + 1, bottom + 1)]
        ring += [(bottom, col) for col in range(right - 1, left - 1, -1) if top < bottom]
        ring += [(row, left) for row in range(bottom - 1, top, -1) if left < right]
        top, left, bottom, right = top + 1, left + 1, bottom - 1, right - 1
    return ring


def spiral_out(height: int, width: int) -> list[Cell]:
    """From the centre outwards: `spiral_in` backwards."""
    return spiral_in(height, width)[::-1]


def z_curve(height: int, width: int) -> list[Cell]:
    """Morton order: interleave the bits of row and column."""
    bits = max(height, width).bit_length()

    def key(cell: Cell) -> int:
        return sum(((cell[0] >> i & 1) << (2 * i + 1)) | ((cell[1] >> i & 1) << (2 * i)) for i in range(bits))

    return sorted(((row, col) for row in range(height) for col in range(width)), key=key)


def hilbert(height: int, width: int) -> list[Cell]:
    """Hilbert's curve on the smallest enclosing square with a power-of-two side, skipping cells outside the grid."""
    side = 1 << max(0, (max(height, width) - 1).bit_length())

    def key(cell: Cell) -> int:
        row, col = cell
        distance, half = 0, side // 2
        while half:
            down, right = int(row & half > 0), int(col & half > 0)
            distance += half * half * ((3 * right) ^ down)
            if down == 0:  # turn the quadrant so that its curve starts where the last one ended
                if right:
                    row, col = side - 1 - row, side - 1 - col
                row, col = col, row
            half //= 2
        return distance

    return sorted(((row, col) for row in range(height) for col in range(width)), key=key)


def subsample(height: int, width: int) -> list[Cell]:
    """Every second cell of every second row, then the other three interleaved subgrids."""
    offsets = [(0, 0), (0, 1), (1, 0), (1, 1)]
    return [(r, c) for dr, dc in offsets for r in range(dr, height, 2) for c in range(dc, width, 2)]


CURVES: dict[str, Callable[[int, int], Iterable[Cell]]] = {
    curve.__name__: curve for curve in (column, snake, spiral_in, spiral_out, z_curve, hilbert, subsample)
}


# Blocks of cells that share a key: a diagonal, a row, a scale, a position within a region


Key = tuple[int, ...]
KeyOf = Callable[[int, int], Key]
"""The key of the cell at (row, column)."""


def wave(steps: int) -> KeyOf:
    """Group cells of equal steps * row + column: each row starts `steps` columns behind the one above.

    With 1 step, blocks are the h + w - 1 diagonals from the top left corner (NAR, He et al. 2025, arXiv 2503.10696);
    with as many steps as columns, this is raster order."""
    return lambda row, col: (steps * row + col,)


def dyadic(row: int, col: int) -> Key:
    """Draw from coarse to fine: first the corner; then, for strides s = ..., 8, 4, 2, the centres of the squares with
    side s between known cells, followed by the midpoints of their sides.

    A cell's half stride is the largest power of two that divides both of its coordinates."""
    half = (row | col) & -(row | col)
    if half == 0:
        return (0,)  # the corner, which every power of two divides
    return (1, -half, 0 if row & half and col & half else 1)


def regions(count: int, shape: tuple[int, int]) -> KeyOf:
    """Draw the first cell of each of `count` regions, one at a time; then draw cells at the same position of all
    regions at once (PAR, Wang et al., CVPR 2025). If the sides are not divisible, some regions are one cell longer."""
    counts = region_counts(count, shape) or ()  # never empty after `order_problem`
    downs, acrosses = (places(side, parts) for side, parts in zip(shape, counts, strict=True))

    def key(row: int, col: int) -> Key:
        (down, r), (across, c) = downs[row], acrosses[col]
        return (0, down, across) if r == c == 0 else (1, r, c)

    return key


def places(side: int, parts: int) -> list[tuple[int, int]]:
    """Return for each of `side` cells the index of its part and its position within the part."""
    starts = [part * side // parts for part in range(parts + 1)]
    return [(part, cell) for part in range(parts) for cell in range(starts[part + 1] - starts[part])]


def region_counts(count: int, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Return the numbers of parts of rows and columns for `count` regions, as square as possible, or None."""
    height, width = shape
    fits = [(a, count // a) for a in range(1, min(height, count) + 1) if count % a == 0 and count // a <= width]

    def elongation(cut: tuple[int, int]) -> Fraction:
        ratio = Fraction(height * cut[1], width * cut[0])
        return max(ratio, 1 / ratio)

    return min(fits, key=elongation, default=None)


def group_cells(key: KeyOf, shape: tuple[int, int]) -> tuple[list[int], tuple[int, ...]]:
    """Return the raster indices of cells block by block, in raster order within a block; and the block sizes."""
    height, width = shape
    blocks: dict[Key, list[int]] = {}
    for row in range(height):
        for col in range(width):
            blocks.setdefault(key(row, col), []).append(row * width + col)
    ordered = [blocks[number] for number in sorted(blocks)]
    return [cell for block in ordered for cell in block], tuple(map(len, ordered))


# Blocks of distant cells, because neighbours drawn at once cannot be consistent with each other


Integers = NDArray[np.int64]
FAR = 1 << 40  # larger than any squared distance
TOUCHING = 2  # largest squared distance between a cell and its eight neighbours


def radical_inverse(numbers: Integers, base: int, digits: int) -> Integers:
    """Reverse the last `digits` digits of each number: van der Corput's fraction, times base**digits."""
    inverse = np.zeros_like(numbers)
    for _ in range(digits):
        inverse = inverse * base + numbers % base
        numbers = numbers // base
    return inverse


def digits_for(count: int, base: int) -> int:
    return next(digits for digits in range(64) if base**digits >= count)


def halton_order(height: int, width: int) -> list[int]:
    """Return the cells (raster indices) in the order in which Halton's sequence first visits them, with base 2 for rows
    and 3 for columns (Besnier et al. 2025). Points are computed with integers, so rounding cannot change them."""
    # This many successive points visit each box of 2**-a x 3**-b. Every cell is at least twice as high and wide as such
    # a box and contains one, so all cells are visited.
    count = 2 ** digits_for(2 * height, 2) * 3 ** digits_for(2 * width, 3)
    numbers = np.arange(1, count + 1, dtype=np.int64)
    twos, threes = digits_for(count + 1, 2), digits_for(count + 1, 3)
    rows = height * radical_inverse(numbers, 2, twos) // 2**twos
    cols = width * radical_inverse(numbers, 3, threes) // 3**threes
    cells = rows * width + cols
    _, first = np.unique(cells, return_index=True)
    found: list[int] = cells[np.sort(first)].tolist()
    return found


def spread_order(height: int, width: int, sizes: Sequence[int]) -> list[int]:
    """Return cells (raster indices) in blocks of these sizes, near known cells but far from each other.

    The rule of Locality-aware Parallel Decoding (Zhang et al. 2025), implemented exactly with integers. Cells of
    earlier blocks are known; cells touch if they share a side or a corner.

    1. The first cell is the centre.
    2. Near cells touch a known cell. Among near cells that do not touch this block, take the one with most support: 2
       for each known cell at a side, 1 at a corner. Break ties by the largest distance to this block.
    3. Otherwise prefer cells that do not touch this block, then cells that touch it only at corners, then any; break
       ties by the largest distance to all known cells and this block (farthest-point sampling).

    Distances are Euclidean; raster order breaks remaining ties. Time is quadratic in the number of cells: 0.15 s for 64
    x 64."""
    rows, cols = np.divmod(np.arange(height * width, dtype=np.int64), width)
    free = np.ones(height * width, dtype=bool)
    to_known = np.full(height * width, FAR, dtype=np.int64)  # squared distance to the closest known cell
    support = np.zeros(height * width, dtype=np.int64)
    order: list[int] = []
    for size in sizes:
        to_block = np.full(height * width, FAR, dtype=np.int64)
        block_support = np.zeros_like(support)
        for _ in range(size):
            cell = next_cell(free, to_known, to_block, support) if order else height // 2 * width + width // 2
            distance = (rows - rows[cell]) ** 2 + (cols - cols[cell]) ** 2
            to_block = np.minimum(to_block, distance)
            block_support += np.where(distance <= TOUCHING, 3 - distance, 0)
            free[cell] = False
            order.append(cell)
        to_known = np.minimum(to_known, to_block)
        support += block_support
    return order


def next_cell(free: NDArray[np.bool_], to_known: Integers, to_block: Integers, support: Integers) -> int:
    """Apply rules 2 and 3 of `spread_order` to choose the next cell; `argmax` breaks ties in raster order."""
    near = free & (to_known <= TOUCHING) & (to_block > TOUCHING)
    if near.any():
        return int(np.where(near, support * (FAR + 1) + to_block, -1).argmax())
    apart = np.minimum(to_block, TOUCHING + 1) * (FAR + 1) + np.minimum(to_known, to_block)
    return int(np.where(free, apart, -1).argmax())
