"""Spread-out orders: what is drawn at once is apart."""

import time

import pytest
import torch

from prior.orders import block_numbers, make_order, make_partition


def touching(name, shape):
    """How many pairs of neighbours (at a side) are drawn at once: one number for each block."""
    order, blocks = make_partition(name, shape)
    numbers = block_numbers(order, blocks).view(shape)
    down, across = numbers[1:][numbers[1:] == numbers[:-1]], numbers[:, 1:][numbers[:, 1:] == numbers[:, :-1]]
    return torch.cat([down, across]).bincount(minlength=len(blocks))


def van_der_corput(number, base):
    value, unit = 0.0, 1.0
    while number:
        unit *= base
        value, number = value + number % base / unit, number // base
    return value


@pytest.mark.parametrize("shape", [(7, 7), (16, 16), (12, 4), (3, 5), (1, 6), (6, 1), (1, 1)])
def test_halton_visits_cells_as_its_points_fall(shape):
    """By the definition, one point after another."""
    seen = []
    for number in range(1, 2000):
        row = int(shape[0] * van_der_corput(number, 2) + 1e-9)
        col = int(shape[1] * van_der_corput(number, 3) + 1e-9)
        if row * shape[1] + col not in seen:
            seen.append(row * shape[1] + col)
    assert make_order("halton", shape).tolist() == seen


@pytest.mark.parametrize("shape", [(64, 64), (1, 500), (500, 1), (2, 300), (100, 7)])
@pytest.mark.parametrize("name", ["halton", "spread:16"])
def test_any_rectangle_is_covered_soon(name, shape):
    start = time.process_time()
    assert torch.equal(make_order(name, shape).sort().values, torch.arange(shape[0] * shape[1]))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("kind", ["halton", "spread"])
def test_blocks_are_spread_out(kind):
    """No neighbours while half of the grid is drawn; over all, fewer than by chance, and than in rows."""
    pairs = touching(f"{kind}:16", (16, 16))
    assert pairs[:9].sum() == 0
    assert pairs.sum() < touching("random:0:16", (16, 16)).sum() / 2
    assert pairs.sum() < touching("rows", (16, 16)).sum() / 10


@pytest.mark.parametrize("shape", [(7, 7), (8, 8), (5, 3), (12, 4), (1, 6)])
def test_spread_begins_in_the_middle_and_goes_on_near_what_is_known(shape):
    order, blocks = make_partition("spread", shape)
    cells = torch.stack([order // shape[1], order % shape[1]], -1)
    assert cells[0].tolist() == [shape[0] // 2, shape[1] // 2] and set(blocks) == {1}
    for rank in range(1, len(cells)):
        assert (cells[:rank] - cells[rank]).abs().amax(-1).min() == 1


def test_a_block_of_spread_is_near_the_known_and_apart():
    """Four blocks of growing size on 9x9: of the second, all touch the first and none touches another."""
    order, blocks = make_partition("spread/4", (9, 9))
    first, second = order.split(blocks)[:2]
    rows, cols = order // 9, order % 9
    steps = torch.maximum((rows[:, None] - rows).abs(), (cols[:, None] - cols).abs())
    assert steps[4:8, :4].amin(1).tolist() == [1, 1, 1, 1]
    assert (steps[4:8, 4:8] + 9 * torch.eye(4)).min() >= 2 and (steps[:4, :4] + 9 * torch.eye(4)).min() >= 4
    assert len(first) == len(second) == 4


def test_spread_prefers_the_most_support():
    """The third cell touches both of the two before it."""
    order = make_order("spread", (9, 9))
    rows, cols = order // 9, order % 9
    assert torch.maximum((rows[:2] - rows[2]).abs(), (cols[:2] - cols[2]).abs()).tolist() == [1, 1]
    assert (rows[0] - rows[1]).abs() + (cols[0] - cols[1]).abs() == 1
