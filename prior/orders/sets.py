"""Blocks of cells that share something: a diagonal, a row, a scale, a place in their region.

Each function gives every cell of a grid a key; cells of equal keys are a block, and the smallest key comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

Key = tuple[int, ...]
KeyOf = Callable[[int, int], Key]
"""The key of the cell at (row, column)."""


def wave(steps: int) -> KeyOf:
    """Equal steps * row + column: a row starts so many columns behind the one above.

    1 is the diagonals from the top left corner (NAR, He et al. 2025, arXiv 2503.10696), of which h x w cells have
    h + w - 1; the width of the grid is raster order.
    """
    return lambda row, col: (steps * row + col,)


def rows() -> KeyOf:
    """A row of the grid is a block."""
    return lambda row, col: (row,)


def dyadic() -> KeyOf:
    """From coarse to fine: the corner; then, for strides s = ..., 8, 4, 2, the middles of the squares of side s between
    the known cells, and after them the middles of the sides.

    A cell's half stride is the largest power of two that divides both of its coordinates.
    """

    def key(row: int, col: int) -> Key:
        half = (row | col) & -(row | col)
        if half == 0:
            return (0,)  # the corner, which every power of two divides
        return (1, -half, 0 if row & half and col & half else 1)

    return key


def regions(count: int, shape: tuple[int, int]) -> KeyOf:
    """The first cell of each of `count` regions, one after another; then all cells that have the same place in their
    regions (PAR, Wang et al., CVPR 2025). Where the sides do not divide, some regions are a cell longer.

    Raises `ValueError` where `region_counts` finds none.
    """
    counts = region_counts(count, shape)
    if counts is None:
        raise ValueError(f"no {count} regions fit a grid of {shape[0]}x{shape[1]}")
    downs, acrosses = (places(side, parts) for side, parts in zip(shape, counts, strict=True))

    def key(row: int, col: int) -> Key:
        (down, r), (across, c) = downs[row], acrosses[col]
        return (0, down, across) if r == c == 0 else (1, r, c)

    return key


def places(side: int, parts: int) -> list[tuple[int, int]]:
    """The part in which each of `side` cells lies, and its place there."""
    starts = [part * side // parts for part in range(parts + 1)]
    return [(part, cell) for part in range(parts) for cell in range(starts[part + 1] - starts[part])]


def region_counts(count: int, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Into how many regions the rows and the columns are cut, so that there are `count`, as square as can be; None
    where there is no such cut."""
    height, width = shape
    fits = [(a, count // a) for a in range(1, min(height, count) + 1) if count % a == 0 and count // a <= width]

    def elongation(cut: tuple[int, int]) -> Fraction:
        ratio = Fraction(height * cut[1], width * cut[0])
        return max(ratio, 1 / ratio)

    return min(fits, key=elongation, default=None)


def grouped(key: KeyOf, shape: tuple[int, int]) -> tuple[list[int], tuple[int, ...]]:
    """The raster indices of the cells, block after block, in raster order within a block; and the blocks' sizes."""
    height, width = shape
    blocks: dict[Key, list[int]] = {}
    for row in range(height):
        for col in range(width):
            blocks.setdefault(key(row, col), []).append(row * width + col)
    ordered = [blocks[number] for number in sorted(blocks)]
    return [cell for block in ordered for cell in block], tuple(map(len, ordered))
