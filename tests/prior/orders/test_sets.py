"""The cells of a block share what the name says."""

import pytest
import torch
from prior.orders.sets import region_counts

from prior.orders import block_numbers, make_partition

SHAPES = [(7, 7), (8, 8), (3, 5), (5, 3), (1, 6), (6, 1), (1, 1), (12, 4)]


def cells_of(name, shape):
    """Row and column of the cells, a list for each block."""
    order, blocks = make_partition(name, shape)
    return [[divmod(cell, shape[1]) for cell in block.tolist()] for block in order.split(blocks)]


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonals(shape):
    blocks = cells_of("diagonal", shape)
    assert len(blocks) == sum(shape) - 1
    assert [{row + col for row, col in block} for block in blocks] == [{number} for number in range(len(blocks))]


@pytest.mark.parametrize("shape", SHAPES)
def test_waves(shape):
    for steps in range(1, shape[1] + 1):
        numbers = [{steps * row + col for row, col in block} for block in cells_of(f"wave:{steps}", shape)]
        assert numbers == [{number} for number in sorted(set().union(*numbers))]
    assert cells_of("wave:1", shape) == cells_of("diagonal", shape)
    assert cells_of(f"wave:{shape[1]}", shape) == cells_of("raster", shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows(shape):
    assert cells_of("rows", shape) == [[(row, col) for col in range(shape[1])] for row in range(shape[0])]


def test_dyadic_halves_its_stride():
    assert block_numbers(*make_partition("dyadic", (5, 5))).view(5, 5).tolist() == [
        [0, 6, 4, 6, 2],
        [6, 5, 6, 5, 6],
        [4, 6, 3, 6, 4],
        [6, 5, 6, 5, 6],
        [2, 6, 4, 6, 1],
    ]
    assert len(cells_of("dyadic", (7, 7))) == 7 and len(cells_of("dyadic", (16, 16))) == 9
    assert cells_of("dyadic", (1, 6)) == [[(0, 0)], [(0, 4)], [(0, 2)], [(0, 1), (0, 3), (0, 5)]]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (1, 1)])
def test_dyadic_draws_no_neighbours_at_once(shape):
    numbers = block_numbers(*make_partition("dyadic", shape)).view(shape)
    assert (numbers[1:] != numbers[:-1]).all() and (numbers[:, 1:] != numbers[:, :-1]).all()


def test_regions():
    """On 8x8 four regions of 4x4: their first cells one by one, then 15 places of four cells each."""
    blocks = cells_of("regions:4", (8, 8))
    assert blocks[:4] == [[(0, 0)], [(0, 4)], [(4, 0)], [(4, 4)]]
    assert len(blocks) == 4 + 15 and {len(block) for block in blocks[4:]} == {4}
    places = [{(row % 4, col % 4) for row, col in block} for block in blocks[4:]]
    assert places == [{divmod(place, 4)} for place in range(1, 16)]


def test_regions_of_unequal_sides():
    """7 = 3 + 4: the regions at the end have a row or a column more, and places of their own."""
    blocks = cells_of("regions:4", (7, 7))
    assert blocks[:4] == [[(0, 0)], [(0, 3)], [(3, 0)], [(3, 3)]]
    assert len(blocks) == 4 + 15 and [len(block) for block in blocks[-4:]] == [2, 2, 2, 1]


def test_regions_are_as_square_as_can_be():
    assert region_counts(4, (8, 8)) == (2, 2) and region_counts(6, (8, 12)) == (2, 3)
    assert region_counts(4, (12, 4)) == (4, 1) and region_counts(3, (12, 4)) == (3, 1)
    assert region_counts(4, (1, 6)) == (1, 4) and region_counts(11, (7, 7)) is None
    assert region_counts(49, (7, 7)) == (7, 7)


def test_a_region_of_one_cell_is_raster_order():
    order, blocks = make_partition("regions:49", (7, 7))
    assert torch.equal(order, torch.arange(49)) and blocks == (1,) * 49
