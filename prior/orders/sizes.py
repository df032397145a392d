"""How many cells each block of an order has."""

from __future__ import annotations

import math
from collections.abc import Sequence


def growing(cells: int, blocks: int) -> tuple[int, ...]:
    """Sizes that grow: after block b of K, about the share 1 - cos(pi/2 * b/K) of the cells is known.

    MaskGIT's schedule (Chang et al. 2022). Each is at least 1, none is smaller than the one before, their sum is
    `cells`. blocks: at least 1, at most `cells`.
    """
    ends = [0]
    for block in range(1, blocks + 1):
        known = cells * (1 - math.cos(math.pi / 2 * block / blocks))
        # A half is rounded up on every machine, however its cosine rounds. As 1 - cos is convex, one more each time
        # always leaves enough for the blocks to come.
        ends.append(max(ends[-1] + 1, math.floor(known + 0.5 + 1e-9)))
    return tuple(sorted(end - start for start, end in zip(ends, ends[1:], strict=False)))


def even(cells: int, size: int) -> tuple[int, ...]:
    """Blocks of `size` cells; the last has what is left over."""
    rest = cells % size
    return (size,) * (cells // size) + ((rest,) if rest else ())


def blocks_problem(blocks: Sequence[int], cells: int) -> str | None:
    """What is wrong with these sizes of blocks on a grid of so many cells, in one line, or None."""
    if small := [size for size in blocks if size < 1]:
        return f"blocks: each size is at least 1 (got {small[0]})"
    if sum(blocks) != cells:
        return f"blocks: sizes sum to {sum(blocks)}, the grid has {cells} tokens"
    return None
