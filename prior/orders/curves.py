"""Walks over a grid of two axes, one cell after another.

Scan orders as compared by Esser et al. 2021 (taming transformers, fig. 47) and Yu et al. 2024 (RAR, table 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
    """Hilbert's curve over the enclosing square of a power of two, cells outside the grid left out."""
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
    """Every second cell of every second row first, then the three interleaved quarter grids."""
    offsets = [(0, 0), (0, 1), (1, 0), (1, 1)]
    return [(r, c) for dr, dc in offsets for r in range(dr, height, 2) for c in range(dc, width, 2)]


CURVES: dict[str, Callable[[int, int], Iterable[Cell]]] = {
    "column": column,
    "snake": snake,
    "spiral_in": spiral_in,
    "spiral_out": spiral_out,
    "z_curve": z_curve,
    "hilbert": hilbert,
    "subsample": subsample,
}
"""A walk by its name; `raster` and `random:SEED`, which take grids of any axes, are not here."""
