"""Orders: every name is a partition of the grid, and the one that its name says."""

import math
import time

import pytest
import torch

from prior.orders import (
    CURVES,
    FORMS,
    Partition,
    block_numbers,
    blocks_after_known,
    blocks_problem,
    even,
    growing,
    known_first,
    make_order,
    make_partition,
    name_forms,
    order_problem,
    region_counts,
)
from prior.sampling import select_order

SHAPES = [(1, 1), (1, 6), (6, 1), (3, 5), (5, 3), (7, 7), (8, 8), (5, 8), (12, 4)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


# Partitions


ONE_BY_ONE = ["raster", *CURVES, "random:0", "halton", "spread"]


def is_partition(partition: Partition, cells: int) -> bool:
    order, blocks = partition
    whole = order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(cells))
    return whole and sum(blocks) == cells and min(blocks) >= 1


@pytest.mark.sparse
@every_shape
@pytest.mark.parametrize("name", [*ONE_BY_ONE, "random:3"])
def test_a_name_is_a_partition_in_blocks_of_one_token_of_so_many_or_so_many_blocks(name, shape):
    cells = math.prod(shape)
    expected = {name: (1,) * cells}
    expected |= {f"{name}/{size}": even(cells, size) for size in (1, min(4, cells), min(7, cells), cells)}
    if name in ("halton", "spread", "random:3"):
        expected |= {f"{name}:{count}": growing(cells, count) for count in (1, min(5, cells), cells)}
    for written, blocks in expected.items():
        partition = make_partition(written, shape)
        assert is_partition(partition, cells) and partition.blocks == blocks
        assert torch.equal(make_order(written, shape), partition.order)
        assert name == "spread" or torch.equal(partition.order, make_order(name, shape))


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


def test_a_block_has_its_number():
    order, blocks = make_partition("halton:6", (4, 5))
    numbers = block_numbers(order, blocks)
    assert numbers.shape == (20,) and numbers.bincount().tolist() == list(blocks)
    assert (numbers[order].diff() >= 0).all()
    rows = torch.stack([order, order.flip(0)])
    both = block_numbers(rows, blocks)
    assert torch.equal(both[0], numbers) and torch.equal(both[1], block_numbers(order.flip(0), blocks))


LONG = "9" * 5000
PROBLEMS = {
    "no order is called": ["zigzag", "", "x" * 5000],
    "seed": ["random", "random:x", "random:-1", f"random:{LONG}", f"random:{1 << 64}"],
    "number of blocks, from 1 to 49": [
        *("random:0:", "random:0:0", "halton:0", "halton:x", "halton:²", "halton:\u0663", "halton:50", "spread:"),
        *("halton:99999999999", f"halton:{LONG}"),
    ],
    "is written": ["random:0:1:2", "raster:3", "diagonal:2", "wave", "regions"],
    "number of columns, from 1 to 7": ["wave:0", "wave:8"],
    "number of regions, from 1 to 49": ["regions:50", "regions:0"],
    "no 11 regions": ["regions:11"],
    "number of tokens, from 1 to 49": ["raster/", "raster/0", "raster/50", "raster/4/4", "hilbert/-1"],
    "has its own blocks": ["diagonal/3", "halton:8/2", "random:0:8/2"],
}


@pytest.mark.parametrize("words", PROBLEMS)
def test_what_is_wrong_with_a_name_is_one_line(words):
    for name in PROBLEMS[words]:
        problem = order_problem(name, (7, 7))
        assert problem is not None and words in problem and len(problem) < 400 and "\n" not in problem
        with pytest.raises(ValueError) as raised:
            make_partition(name, (7, 7))
        assert str(raised.value) == problem


def test_valid_names_have_no_problem():
    for name in ("random:0", f"random:{(1 << 64) - 1}", "random:0:49", "wave:7", "regions:49", "raster/49", "wave:1"):
        assert order_problem(name, (7, 7)) is None, name
    assert order_problem("random:1:12", (12,)) is None and order_problem("raster/3", (2, 3, 4)) is None
    for kind in FORMS:
        for form in name_forms(kind) if kind not in ("raster", "random") else ():
            problem = order_problem(form, (16,))
            assert problem is not None and "two axes" in problem


# One cell after another


def peeled(grid):
    """Clockwise from outside: the top row, then the rest turned to the left."""
    return [*grid[0].tolist(), *peeled(grid[1:].T.flip(0))] if grid.numel() else []


@every_shape
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


@every_shape
@pytest.mark.parametrize(("name", "curve"), [("z_curve", z), ("hilbert", hilbert)])
def test_curves_of_quadrants_are_those_of_their_recursion(name, curve, shape):
    """Over the smallest square that holds the grid; what lies outside is left out."""
    side = 1 << (max(shape) - 1).bit_length()
    inside = [cell for cell in quadrants(curve, side) if cell[0] < shape[0] and cell[1] < shape[1]]
    assert make_order(name, shape).tolist() == [row * shape[1] + col for row, col in inside]


# Blocks of cells that share a key


def cells_of(name, shape):
    """Row and column of the cells, a list for each block."""
    order, blocks = make_partition(name, shape)
    return [[divmod(cell, shape[1]) for cell in block.tolist()] for block in order.split(blocks)]


@every_shape
def test_diagonals(shape):
    blocks = cells_of("diagonal", shape)
    assert len(blocks) == sum(shape) - 1
    assert [{row + col for row, col in block} for block in blocks] == [{number} for number in range(len(blocks))]


@every_shape
def test_waves(shape):
    for steps in range(1, shape[1] + 1):
        numbers = [{steps * row + col for row, col in block} for block in cells_of(f"wave:{steps}", shape)]
        assert numbers == [{number} for number in sorted(set().union(*numbers))]
    assert cells_of("wave:1", shape) == cells_of("diagonal", shape)
    assert cells_of(f"wave:{shape[1]}", shape) == cells_of("raster", shape)


@every_shape
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


# Sizes


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


def test_even_sizes_leave_the_rest_to_the_last():
    assert even(49, 4) == (4,) * 12 + (1,) and even(48, 4) == (4,) * 12 and even(3, 3) == (3,)


def test_explicit_sizes_have_to_fit():
    assert blocks_problem((1, 48), 49) is None
    for sizes in ((24, 24), (), (50, -1), (49, 0)):
        problem = blocks_problem(sizes, 49)
        assert problem is not None and problem.startswith("blocks: ")


# Spread out


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


# Known tokens first


def test_known_tokens_come_first_each_part_in_its_order():
    walk = torch.tensor([3, 1, 4, 0, 2])
    keep = torch.tensor([[True, False, True, False, False], [False] * 5])
    assert known_first(walk, keep).tolist() == [[0, 2, 3, 1, 4], [3, 1, 4, 0, 2]]
    assert known_first(walk.expand(2, -1), keep).equal(known_first(walk, keep))


@pytest.mark.parametrize(
    ("known", "left"), [(0, (1, 2, 4)), (1, (1, 2, 4)), (2, (2, 1, 4)), (3, (3, 4)), (5, (5, 2)), (7, (7,))]
)
def test_what_is_left_keeps_its_cuts(known, left):
    assert blocks_after_known((1, 2, 4), known) == left


# The orders of some images


def test_an_order_of_some_images_is_theirs():
    each = torch.rand(4, 6).argsort(1)
    for order in (None, "halton"):
        assert select_order(order, [1, 2], 4) is order
    assert select_order(torch.arange(6), [1, 2], 4).tolist() == list(range(6))
    for rows in (slice(1, 3), [3, 0]):
        assert torch.equal(select_order(each, rows, 4), each[rows])
        found = select_order(Partition(each, (2, 4)), rows, 4)
        assert torch.equal(found.order, each[rows]) and found.blocks == (2, 4)
    assert torch.equal(select_order(each.numpy(), [2], 4), each[[2]])
    assert torch.equal(select_order(list(each), [2], 4), each[[2]])
    with pytest.raises(ValueError, match="order"):
        select_order(each, [0], 3)
