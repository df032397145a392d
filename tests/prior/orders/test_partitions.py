"""Every name is a partition of the grid with as many blocks as it promises, and every other name has its sentence."""

import math

import pytest
import torch
from prior.orders.curves import CURVES
from prior.orders.partitions import FORMS, OWN_BLOCKS, written

from prior.orders import Partition, block_numbers, even, growing, make_order, make_partition, order_problem

SHAPES = [(7, 7), (8, 8), (3, 5), (5, 3), (1, 6), (6, 1), (1, 1), (12, 4), (9, 3), (16, 16)]
ONE_BY_ONE = ["raster", *CURVES, "random:0", "halton", "spread"]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def is_partition(partition: Partition, cells: int) -> bool:
    order, blocks = partition
    whole = order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(cells))
    return whole and sum(blocks) == cells and min(blocks) >= 1


@pytest.mark.sparse
@every_shape
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_one_by_one(name, shape):
    cells = math.prod(shape)
    partition = make_partition(name, shape)
    assert is_partition(partition, cells) and partition.blocks == (1,) * cells
    assert torch.equal(make_order(name, shape), partition.order)


@pytest.mark.sparse
@every_shape
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_blocks_of_so_many_tokens(name, shape):
    cells = math.prod(shape)
    for size in {1, min(4, cells), min(7, cells), cells}:
        partition = make_partition(f"{name}/{size}", shape)
        assert is_partition(partition, cells) and partition.blocks == even(cells, size)
        assert name == "spread" or torch.equal(partition.order, make_order(name, shape))


@pytest.mark.sparse
@every_shape
@pytest.mark.parametrize("name", ["halton", "spread", "random:3"])
def test_so_many_blocks(name, shape):
    cells = math.prod(shape)
    for count in {1, min(5, cells), cells}:
        partition = make_partition(f"{name}:{count}", shape)
        assert is_partition(partition, cells) and partition.blocks == growing(cells, count)
        assert name == "spread" or torch.equal(partition.order, make_order(name, shape))
    assert torch.equal(make_order(f"{name}:{cells}", shape), make_order(name, shape))


@every_shape
def test_names_with_blocks_of_their_own(shape):
    height, width = shape
    promised = {"diagonal": height + width - 1, "rows": height, "regions:1": height * width}
    promised |= {f"wave:{width}": height * width, f"regions:{height * width}": height * width}
    for name, count in promised.items():
        partition = make_partition(name, shape)
        assert is_partition(partition, height * width) and len(partition.blocks) == count
    levels = max(height, width, 1) - 1
    assert is_partition(make_partition("dyadic", shape), height * width)
    assert len(make_partition("dyadic", shape).blocks) <= 1 + 2 * levels.bit_length()


@pytest.mark.parametrize("shape", [(16,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["raster", "raster/4", "random:1", "random:1/3", "random:1:5"])
def test_grids_of_one_and_three_axes(name, shape):
    assert is_partition(make_partition(name, shape), math.prod(shape))


@pytest.mark.parametrize("name", [name for kind in FORMS if kind not in ("raster", "random") for name in written(kind)])
def test_other_orders_need_two_axes(name):
    said = f"{name!r} walks a grid of two axes, this one has 1; use raster or random:SEED"
    assert order_problem(name, (16,)) == said
    with pytest.raises(ValueError, match="walks a grid of two axes"):
        make_partition(name, (2, 2, 2))


def test_a_block_has_its_number():
    order, blocks = make_partition("halton:6", (4, 5))
    numbers = block_numbers(order, blocks)
    assert numbers.shape == (20,) and numbers.bincount().tolist() == list(blocks)
    assert (numbers[order].diff() >= 0).all()
    rows = torch.stack([order, order.flip(0)])
    both = block_numbers(rows, blocks)
    assert torch.equal(both[0], numbers) and torch.equal(both[1], block_numbers(order.flip(0), blocks))


def test_orders_come_again():
    for name in ("random:4:5", "spread:5", "halton:5"):
        assert torch.equal(make_order(name, (6, 5)), make_order(name, (6, 5)))
    assert not torch.equal(make_order("random:4:5", (6, 5)), make_order("random:5:5", (6, 5)))


LONG = "9" * 5000
PROBLEMS = {
    "zigzag": "no order is called 'zigzag'; there are raster, column, snake, ",
    "": "no order is called ''; there are raster",
    "x" * 5000: f"no order is called '{'x' * 40}...'; there are raster",
    "random": "'random' needs a seed, 0 to 18446744073709551615, as in random:0 (got 'random')",
    "random:x": "'random' needs a seed, 0 to 18446744073709551615, as in random:0 (got 'random:x')",
    "random:-1": "'random' needs a seed, ",
    f"random:{LONG}": "'random' needs a seed, ",
    "random:0:": "random:SEED:K is a number of blocks, from 1 to 49 here (got 'random:0:')",
    "random:0:0": "random:SEED:K is a number of blocks, from 1 to 49 here (got 'random:0:0')",
    "random:0:1:2": "'random' is written random:SEED or random:SEED:K (got 'random:0:1:2')",
    "raster:3": "'raster' is written raster (got 'raster:3')",
    "diagonal:2": "'diagonal' is written diagonal (got 'diagonal:2')",
    "halton:0": "halton:K is a number of blocks, from 1 to 49 here (got 'halton:0')",
    "halton:x": "halton:K is a number of blocks, from 1 to 49 here (got 'halton:x')",
    "halton:²": "halton:K is a number of blocks, from 1 to 49 here (got 'halton:²')",
    "halton:\u0663": "halton:K is a number of blocks, from 1 to 49 here (got 'halton:\u0663')",  # an Arabic three
    "halton:50": "halton:K is a number of blocks, from 1 to 49 here (got 'halton:50')",
    "halton:99999999999": "halton:K is a number of blocks, from 1 to 49 here (got 'halton:99999999999')",
    f"halton:{LONG}": "halton:K is a number of blocks, from 1 to 49 here (got 'halton:999",
    "spread:": "spread:K is a number of blocks, from 1 to 49 here (got 'spread:')",
    "wave": "'wave' is written wave:S (got 'wave')",
    "wave:0": "wave:S is a number of columns, from 1 to 7 here (got 'wave:0')",
    "wave:8": "wave:S is a number of columns, from 1 to 7 here (got 'wave:8')",
    "regions": "'regions' is written regions:K (got 'regions')",
    "regions:50": "regions:K is a number of regions, from 1 to 49 here (got 'regions:50')",
    "regions:11": "no 11 regions fit a grid of 7x7: K is a * b, with a <= 7 and b <= 7 (got 'regions:11')",
    "raster/": "/K is a number of tokens, from 1 to 49 here (got 'raster/')",
    "raster/0": "/K is a number of tokens, from 1 to 49 here (got 'raster/0')",
    "raster/50": "/K is a number of tokens, from 1 to 49 here (got 'raster/50')",
    "raster/4/4": "/K is a number of tokens, from 1 to 49 here (got 'raster/4/4')",
    "hilbert/-1": "/K is a number of tokens, from 1 to 49 here (got 'hilbert/-1')",
    "diagonal/3": "'diagonal/3': /K cuts an order of one token a block, and 'diagonal' has its own blocks",
    "halton:8/2": "'halton:8/2': /K cuts an order of one token a block, and 'halton:8' has its own blocks",
    "random:0:8/2": "'random:0:8/2': /K cuts an order of one token a block, and 'random:0:8' has its own blocks",
}


@pytest.mark.parametrize("name", PROBLEMS, ids=lambda name: name[:20])
def test_what_is_wrong_with_a_name_is_one_line(name):
    problem = order_problem(name, (7, 7))
    assert problem is not None and problem.startswith(PROBLEMS[name]) and len(problem) < 400 and "\n" not in problem
    with pytest.raises(ValueError) as raised:
        make_partition(name, (7, 7))
    assert str(raised.value) == problem


def test_an_unknown_name_hears_of_all_there_are():
    said = order_problem("zigzag", (7, 7))
    assert said is not None and all(name in said for kind in FORMS for name in written(kind))
    assert set(OWN_BLOCKS) <= set(FORMS)


@every_shape
def test_what_makes_a_partition_has_no_problem_and_the_rest_has_one(shape):
    """Each name with each number: a problem, or a partition."""
    cells = math.prod(shape)
    for kind in ("wave", "regions", "halton", "spread", "random:0"):
        for number in (0, 1, 2, 3, 4, 6, 7, 12, cells, cells + 1):
            problem = order_problem(f"{kind}:{number}", shape)
            assert problem is not None or is_partition(make_partition(f"{kind}:{number}", shape), cells)
            assert problem is not None or 1 <= number <= cells


def test_the_words_are_these_to_the_last():
    for name, said in PROBLEMS.items():
        if said.endswith((")", "blocks")):
            assert order_problem(name, (7, 7)) == said
    kinds = "raster, column, snake, spiral_in, spiral_out, z_curve, hilbert, subsample, random:SEED, random:SEED:K, "
    more = "halton, halton:K, spread, spread:K, diagonal, wave:S, rows, dyadic, regions:K"
    said = f"there are {kinds}{more}, and NAME/K for blocks of K tokens"
    assert order_problem("zigzag", (7, 7)) == f"no order is called 'zigzag'; {said}"
    for length, shown in ((40, "x" * 40), (41, f"{'x' * 40}...")):
        assert order_problem("x" * length, (7, 7)) == f"no order is called {shown!r}; {said}"
    axes = "walks a grid of two axes, this one has {}; use raster or random:SEED"
    assert order_problem("snake", (49,)) == f"'snake' {axes.format(1)}"
    assert order_problem("halton:3", (7, 7, 2)) == f"'halton:3' {axes.format(3)}"
    cut = f"'{'halton:8/' + '2' * 31}...': /K cuts an order of one token a block, and 'halton:8' has its own blocks"
    assert order_problem("halton:8/" + "2" * 60, (7, 7)) == cut
    for name in ("random:0", f"random:{(1 << 64) - 1}", "random:0:49", "wave:7", "regions:49", "raster/49", "wave:1"):
        assert order_problem(name, (7, 7)) is None, name
    assert order_problem(f"random:{1 << 64}", (7, 7)) is not None
    assert order_problem("random:1:12", (12,)) is None and order_problem("raster/3", (2, 3, 4)) is None
