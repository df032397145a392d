"""Sizes of blocks grow or are even, and always cover the grid."""

import math

import pytest

from prior.orders import blocks_problem, even, growing

GRIDS = [1, 2, 6, 15, 48, 49, 256]


@pytest.mark.parametrize("cells", GRIDS)
def test_growing_sizes_cover_the_grid_and_never_shrink(cells):
    for blocks in range(1, cells + 1):
        sizes = growing(cells, blocks)
        assert len(sizes) == blocks and sum(sizes) == cells
        assert min(sizes) >= 1 and list(sizes) == sorted(sizes)


def test_sizes_grow_as_one_minus_cosine():
    """To a token: sizes are whole."""
    for cells, blocks in [(256, 8), (256, 13), (4096, 32), (49, 5)]:
        sizes = growing(cells, blocks)
        for block in range(1, blocks + 1):
            assert abs(sum(sizes[:block]) - cells * (1 - math.cos(math.pi / 2 * block / blocks))) <= 2
    assert growing(49, 5) == (2, 7, 11, 14, 15)


def test_as_many_blocks_as_cells_are_single_cells():
    assert growing(49, 49) == (1,) * 49 and growing(49, 1) == (49,)


def test_a_half_is_rounded_up_however_its_cosine_is():
    """1 - cos(pi / 3) is a half."""
    assert sum(growing(49, 3)[:2]) == 25


def test_even_sizes_leave_the_rest_to_the_last():
    assert even(49, 4) == (4,) * 12 + (1,) and even(48, 4) == (4,) * 12 and even(3, 3) == (3,)


def test_explicit_sizes_have_to_fit():
    assert blocks_problem((1, 48), 49) is None
    assert blocks_problem((24, 24), 49) == "blocks: sizes sum to 48, the grid has 49 tokens"
    assert blocks_problem((), 49) == "blocks: sizes sum to 0, the grid has 49 tokens"
    assert blocks_problem((50, -1), 49) == "blocks: each size is at least 1 (got -1)"
    assert blocks_problem((49, 0), 49) == "blocks: each size is at least 1 (got 0)"
