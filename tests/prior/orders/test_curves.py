"""Every order is a walk over the whole grid, and is the walk that its name says."""

import pytest
import torch
from prior.orders.curves import CURVES

from prior.orders import make_order

SHAPES = [(1, 1), (1, 6), (6, 1), (4, 4), (3, 5), (7, 7), (5, 8)]


@pytest.mark.sparse
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["raster", *CURVES, "random:0"])
def test_every_cell_once(name, shape):
    assert sorted(make_order(name, shape).tolist()) == list(range(shape[0] * shape[1]))


def steps(name, shape):
    order = make_order(name, shape)
    rows, columns = order // shape[1], order % shape[1]
    return rows.diff().abs() + columns.diff().abs()


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("snake", SHAPES), ("spiral_in", SHAPES), ("spiral_out", SHAPES), ("hilbert", [(2, 2), (4, 4), (16, 16)])],
)
def test_walks_without_jumps(name, shapes):
    for shape in shapes:
        assert (steps(name, shape) == 1).all()


def test_known_walks():
    assert make_order("column", (2, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    assert make_order("snake", (2, 3)).tolist() == [0, 1, 2, 5, 4, 3]
    assert make_order("spiral_in", (3, 3)).tolist() == [0, 1, 2, 5, 8, 7, 6, 3, 4]
    assert make_order("spiral_out", (3, 3)).tolist() == [4, 3, 6, 7, 8, 5, 2, 1, 0]
    assert make_order("z_curve", (4, 4)).tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert make_order("subsample", (4, 4)).tolist()[:8] == [0, 2, 8, 10, 1, 3, 9, 11]


def peeled(grid):
    """Clockwise from outside: the top row, then the rest turned to the left."""
    return [*grid[0].tolist(), *peeled(grid[1:].T.flip(0))] if grid.numel() else []


@pytest.mark.parametrize("shape", SHAPES)
def test_walks_are_those_of_their_formulas(shape):
    grid = torch.arange(shape[0] * shape[1]).view(shape)
    assert torch.equal(make_order("raster", shape), grid.flatten())
    assert torch.equal(make_order("column", shape), grid.T.flatten())
    assert make_order("snake", shape).tolist() == [
        int(cell) for row, cells in enumerate(grid) for cell in (cells.flip(0) if row % 2 else cells)
    ]
    assert make_order("spiral_in", shape).tolist() == peeled(grid)
    assert make_order("spiral_out", shape).tolist() == peeled(grid)[::-1]
    quarters = [grid[row::2, col::2].flatten() for row in (0, 1) for col in (0, 1)]
    assert torch.equal(make_order("subsample", shape), torch.cat(quarters))
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(make_order("random:7", shape), torch.randperm(grid.numel(), generator=generator))


def quadrants(curve, side):
    """The cells (row, column) of a curve over a square: four of half the side, as `curve` says."""
    if side == 1:
        return [(0, 0)]
    half = quadrants(curve, side // 2)
    return [cell for quadrant in curve(side // 2) for cell in map(quadrant, half)]


def z(half):
    return [lambda c, r=r, k=k: (c[0] + r * half, c[1] + k * half) for r in (0, 1) for k in (0, 1)]


def hilbert(half):
    """Down the left half, up the right one; the first quadrant is transposed, the last one along the other diagonal."""
    return [
        lambda c: (c[1], c[0]),
        lambda c: (c[0] + half, c[1]),
        lambda c: (c[0] + half, c[1] + half),
        lambda c: (half - 1 - c[1], 2 * half - 1 - c[0]),
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "curve"), [("z_curve", z), ("hilbert", hilbert)])
def test_curves_of_quadrants_are_those_of_their_recursion(name, curve, shape):
    """Over the smallest square that holds the grid; what lies outside is left out."""
    side = 1 << (max(shape) - 1).bit_length()
    inside = [cell for cell in quadrants(curve, side) if cell[0] < shape[0] and cell[1] < shape[1]]
    assert make_order(name, shape).tolist() == [row * shape[1] + col for row, col in inside]


def test_random_is_seeded():
    assert torch.equal(make_order("random:4", (5, 5)), make_order("random:4", (5, 5)))
    assert not torch.equal(make_order("random:4", (5, 5)), make_order("random:5", (5, 5)))


@pytest.mark.parametrize(("name", "message"), [("zigzag", "no order"), ("random", "seed"), ("random:x", "seed")])
def test_unknown_orders(name, message):
    with pytest.raises(ValueError, match=message):
        make_order(name, (2, 2))
