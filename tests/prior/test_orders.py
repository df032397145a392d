"""Orders: every name is a partition of the grid, and the one that it says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prior.options import select_order
from prior.orders import (
    CURVES,
    FORMS,
    Partition,
    block_numbers,
    blocks_after_known,
    even,
    growing,
    known_first,
    make_order,
    make_partition,
    name_forms,
    order_problem,
)

examples = settings(deadline=None, max_examples=60, derandomize=True)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def is_partition(partition: Partition, cells: int) -> bool:
    order, blocks = partition
    whole = order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(cells))
    return whole and sum(blocks) == cells and min(blocks) >= 1


@pytest.mark.parametrize("name", ["raster", *CURVES, "halton", "spread", "random:3"])
@examples
@given(shapes, st.data())
def test_an_order_is_drawn_token_by_token_in_blocks_of_a_size_or_in_a_number_of_blocks(name, shape, data):
    cells = math.prod(shape)
    number = data.draw(st.integers(1, cells))
    expected = {name: (1,) * cells, f"{name}/{number}": even(cells, number)}
    if name in ("halton", "spread", "random:3"):
        expected[f"{name}:{number}"] = growing(cells, number)
    for written, blocks in expected.items():
        partition = make_partition(written, shape)
        assert is_partition(partition, cells) and partition.blocks == blocks
        assert name == "spread" or torch.equal(partition.order, make_order(name, shape))


@examples
@given(shapes, st.data())
def test_orders_with_blocks_of_their_own_are_partitions_of_known_lengths(shape, data):
    height, width = shape
    steps, regions = data.draw(st.integers(1, width)), data.draw(st.integers(1, height)) * width
    lengths = {"diagonal": height + width - 1, "rows": height, f"wave:{width}": height * width, "regions:1": None}
    lengths |= {f"wave:{steps}": None, f"regions:{regions}": None, "dyadic": None}
    for name, length in lengths.items():
        if order_problem(name, shape) is None:  # not every number of regions fits
            partition = make_partition(name, shape)
            assert is_partition(partition, height * width) and length in (None, len(partition.blocks))
    assert len(make_partition("dyadic", shape).blocks) <= 1 + 2 * (max(height, width) - 1).bit_length()


@pytest.mark.parametrize("shape", [(16,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["raster", "raster/4", "random:1", "random:1/3", "random:1:5"])
def test_grids_of_one_and_three_axes(name, shape):
    assert is_partition(make_partition(name, shape), math.prod(shape))


def test_blocks_are_numbered_in_raster_order():
    order, blocks = make_partition("halton:6", (4, 5))
    numbers = block_numbers(order, blocks)
    assert numbers.shape == (20,) and numbers.bincount().tolist() == list(blocks)
    assert (numbers[order].diff() >= 0).all()
    both = block_numbers(torch.stack([order, order.flip(0)]), blocks)
    assert torch.equal(both[0], numbers) and torch.equal(both[1], block_numbers(order.flip(0), blocks))


PROBLEMS = {
    "no order": ["zigzag", "x" * 5000],
    "seed": ["random", "random:x", f"random:{1 << 64}"],
    "blocks": ["random:0:0", "halton:x", "halton:\u0663", "halton:50", f"halton:{'9' * 5000}"],
    "written": ["random:0:1:2", "raster:3", "wave"],
    "columns": ["wave:0", "wave:8"],
    "regions": ["regions:50", "regions:0", "regions:11"],
    "tokens": ["raster/", "raster/0", "raster/50", "raster/4/4"],
    "own blocks": ["diagonal/3", "random:0:8/2"],
}


@pytest.mark.parametrize("words", PROBLEMS)
def test_a_wrong_name_has_a_problem_of_one_line(words):
    for name in PROBLEMS[words]:
        problem = order_problem(name, (7, 7))
        assert problem is not None and words in problem and len(problem) < 400 and "\n" not in problem
        with pytest.raises(ValueError, match=words):
            make_partition(name, (7, 7))
    for kind in FORMS:
        for form in name_forms(kind) if kind not in ("raster", "random") else ():
            assert "two axes" in order_problem(form, (16,))


def peeled(grid):
    """Clockwise from outside: the top row, then the rest turned to the left."""
    return [*grid[0].tolist(), *peeled(grid[1:].T.flip(0))] if grid.numel() else []


@examples
@given(shapes)
def test_scans_follow_their_formulas(shape):
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


def quadrants(curve, side):
    """The cells (row, column) of a curve over a square: four squares of half the side, placed by `curve`."""
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


@pytest.mark.parametrize(("name", "curve"), [("z_curve", z), ("hilbert", hilbert)])
@examples
@given(shapes)
def test_recursive_curves_follow_their_recursion(name, curve, shape):
    """Over the smallest square that holds the grid, without the cells outside the grid."""
    side = 1 << (max(shape) - 1).bit_length()
    inside = [cell for cell in quadrants(curve, side) if cell[0] < shape[0] and cell[1] < shape[1]]
    assert make_order(name, shape).tolist() == [row * shape[1] + col for row, col in inside]


def cells_of(name, shape):
    """Row and column of the cells, a list for each block."""
    order, blocks = make_partition(name, shape)
    return [[divmod(cell, shape[1]) for cell in block.tolist()] for block in order.split(blocks)]


@examples
@given(shapes, st.data())
def test_waves_rows_and_diagonals(shape, data):
    steps = data.draw(st.integers(1, shape[1]))
    numbers = [{steps * row + col for row, col in block} for block in cells_of(f"wave:{steps}", shape)]
    assert numbers == [{number} for number in sorted(set().union(*numbers))]
    assert cells_of("wave:1", shape) == cells_of("diagonal", shape)
    assert cells_of(f"wave:{shape[1]}", shape) == cells_of("raster", shape)
    assert cells_of("rows", shape) == [[(row, col) for col in range(shape[1])] for row in range(shape[0])]


def test_dyadic_halves_its_stride():
    assert block_numbers(*make_partition("dyadic", (5, 5))).view(5, 5).tolist() == [
        [0, 6, 4, 6, 2],
        [6, 5, 6, 5, 6],
        [4, 6, 3, 6, 4],
        [6, 5, 6, 5, 6],
        [2, 6, 4, 6, 1],
    ]
    assert cells_of("dyadic", (1, 6)) == [[(0, 0)], [(0, 4)], [(0, 2)], [(0, 1), (0, 3), (0, 5)]]


def test_regions_draw_their_first_cells_one_by_one_and_then_one_place_of_all():
    blocks = cells_of("regions:4", (8, 8))
    assert blocks[:4] == [[(0, 0)], [(0, 4)], [(4, 0)], [(4, 4)]]
    assert len(blocks) == 4 + 15 and {len(block) for block in blocks[4:]} == {4}
    places = [{(row % 4, col % 4) for row, col in block} for block in blocks[4:]]
    assert places == [{divmod(place, 4)} for place in range(1, 16)]
    unequal = cells_of("regions:4", (7, 7))  # 7 = 3 + 4: the last regions have a row or a column more
    assert unequal[:4] == [[(0, 0)], [(0, 3)], [(3, 0)], [(3, 3)]]
    assert len(unequal) == 4 + 15 and [len(block) for block in unequal[-4:]] == [2, 2, 2, 1]


@examples
@given(st.integers(1, 300), st.data())
def test_growing_sizes_follow_one_minus_cosine_and_never_shrink(cells, data):
    blocks = data.draw(st.integers(1, cells))
    sizes = growing(cells, blocks)
    assert len(sizes) == blocks and sum(sizes) == cells and min(sizes) >= 1 and list(sizes) == sorted(sizes)
    if blocks**2 <= cells:  # else the first blocks, of one token, are ahead of it
        for block in range(1, blocks + 1):
            assert abs(sum(sizes[:block]) - cells * (1 - math.cos(math.pi / 2 * block / blocks))) <= 2


def van_der_corput(number, base):
    value, unit = 0.0, 1.0
    while number:
        unit *= base
        value, number = value + number % base / unit, number // base
    return value


@pytest.mark.parametrize("shape", [(16, 16), (12, 4), (3, 5), (6, 1)])
def test_halton_visits_cells_as_its_points_fall(shape):
    seen = {}
    for number in range(1, 2000):
        row = int(shape[0] * van_der_corput(number, 2) + 1e-9)
        col = int(shape[1] * van_der_corput(number, 3) + 1e-9)
        seen[row * shape[1] + col] = None
    assert make_order("halton", shape).tolist() == list(seen)


@pytest.mark.parametrize("kind", ["halton", "spread"])
def test_blocks_of_the_first_half_hold_no_neighbours(kind):
    order, blocks = make_partition(f"{kind}:16", (16, 16))
    numbers = block_numbers(order, blocks).view(16, 16)
    down, across = numbers[1:][numbers[1:] == numbers[:-1]], numbers[:, 1:][numbers[:, 1:] == numbers[:, :-1]]
    assert torch.cat([down, across]).min() >= 9


def distances(name, shape):
    """How many steps of a king lie between cells, `(N, N)`, in the order."""
    order = make_order(name, shape)
    cells = torch.stack([order // shape[1], order % shape[1]], -1)
    return (cells[:, None] - cells).abs().amax(-1)


@examples
@given(shapes)
def test_spread_begins_in_the_middle_and_continues_beside_known_cells(shape):
    assert int(make_order("spread", shape)[0]) == shape[0] // 2 * shape[1] + shape[1] // 2
    steps = distances("spread", shape)
    assert all(steps[rank, :rank].min() == 1 for rank in range(1, len(steps)))


@examples
@given(st.permutations(range(7)), st.lists(st.booleans(), min_size=7, max_size=7), st.sets(st.integers(1, 6)))
def test_known_tokens_come_first_as_one_block_and_the_rest_keeps_its_order_and_cuts(order, known, cuts):
    ranked = [*(cell for cell in order if known[cell]), *(cell for cell in order if not known[cell])]
    found = known_first(torch.tensor(order), torch.tensor([known, [False] * 7]))
    assert found.tolist() == [ranked, order]
    ends = [*sorted(cuts), 7]
    blocks = tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))
    left = blocks_after_known(blocks, sum(known))
    expected = {*(cut for cut in ends if cut > sum(known)), *([sum(known)] if any(known) else [])}
    assert {sum(left[: k + 1]) for k in range(len(left))} == expected


def test_the_order_of_some_images_is_selected():
    each = torch.rand(4, 6).argsort(1)
    assert select_order("halton", [1, 2], 4) == "halton"
    assert select_order(torch.arange(6), [1, 2], 4).tolist() == list(range(6))
    for rows in (slice(1, 3), [3, 0]):
        found = select_order(Partition(each, (2, 4)), rows, 4)
        assert torch.equal(found.order, each[rows]) and found.blocks == (2, 4)
        assert torch.equal(select_order(each.numpy(), rows, 4), each[rows])
    with pytest.raises(ValueError, match="order"):
        select_order(each, [0], 3)
