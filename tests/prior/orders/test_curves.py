"""Every order is a walk over the whole grid, and is the walk that its name says."""

import pytest
import torch

from prior.orders import make_order
from prior.orders.curves import CURVES

SHAPES = [(1, 1), (1, 6), (6, 1), (4, 4), (3, 5), (7, 7), (5, 8)]


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


def test_random_is_seeded():
    assert torch.equal(make_order("random:4", (5, 5)), make_order("random:4", (5, 5)))
    assert not torch.equal(make_order("random:4", (5, 5)), make_order("random:5", (5, 5)))


@pytest.mark.parametrize(("name", "message"), [("zigzag", "no order"), ("random", "seed"), ("random:x", "seed")])
def test_unknown_orders(name, message):
    with pytest.raises(ValueError, match=message):
        make_order(name, (2, 2))
