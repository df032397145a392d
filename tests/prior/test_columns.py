"""The kinds of columns: how values are written, checked and stored, and how they are encoded."""

import math

import pytest
import torch
from givens.columns import (
    AGE,
    COLUMNS,
    GRIDS,
    KINDS,
    OUTLINE,
    POSE,
    SPEED,
    TAGS,
    TEXT,
    VIEW,
    WIND,
    columns_of,
    equal,
    make_conditioned,
)
from hypothesis import given
from hypothesis import strategies as st
from small import make_prior

from prior.columns import NumberColumn, names_problem, read_column
from prior.condition_encoder import AreaResize, GridEncoder, fold, fold_factors
from prior.transformer import reset
from tokenizer import TokenGrid

finite = st.floats(-(2.0**99), 2.0**99, width=32)
half = st.floats(-(2.0**15), 2.0**15, width=16)


def one_value(column):
    """Values of one image as users write them."""
    numbers = finite if column.shape == (1,) else st.lists(finite, min_size=2, max_size=2)
    return {
        "class": st.sampled_from(VIEW.names) | st.integers(0, 2),
        "flags": st.lists(st.sampled_from(TAGS.names)) | st.lists(st.sampled_from([0, 1]), min_size=4, max_size=4),
        "number": numbers,
        "angle": finite if column.shape == (1,) else st.lists(finite, min_size=3, max_size=3),
        "vector": st.lists(half, min_size=6, max_size=6),
        "grid": st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=2, max_size=2),
    }[column.kind]


@pytest.mark.parametrize("name", COLUMNS)
@given(data=st.data())
def test_one_value_and_one_per_image_differ_in_every_form(name, data):
    """Values are the same alone, in a list, as arrays and as tensors; None is null."""
    column = COLUMNS[name]
    values = data.draw(st.lists(st.none() | one_value(column), min_size=1, max_size=4))
    each = [column.parse(value) for value in values]
    assert all(one.shape == column.shape for one in each)
    assert [bool(column.is_null(one[None])) for one in each] == [value is None for value in values]
    stacked = torch.stack(each)
    if not (name == "tags" and all(isinstance(value, (str, int)) for value in values)):
        assert equal(column.parse(values), stacked) and equal(column.parse(tuple(values)), stacked)
    assert equal(column.parse(stacked), stacked) and equal(column.parse(each[0]), each[0])
    if None not in values:
        assert equal(column.parse(stacked.numpy()), stacked)
        assert equal(column.parse([one.numpy() for one in each]), stacked)
        assert equal(column.parse(list(each)), stacked)
    assert equal(column.unpack(column.pack(stacked)), stacked), "as it is read from a file"


def test_values_by_hand():
    assert VIEW.parse("lateral").tolist() == 1 and VIEW.parse(["oblique", None, 0]).tolist() == [2, -1, 0]
    assert TAGS.parse(["wet", "red"]).tolist() == [1, 0, 1, 0] and TAGS.parse([]).tolist() == [0] * 4
    assert TAGS.parse([["wet"], [], "old"]).tolist() == [[0, 0, 1, 0], [0] * 4, [0, 1, 0, 0]]
    assert AGE.parse([63, 5.5]).tolist() == [[63], [5.5]] and SPEED.parse([3, -1]).tolist() == [3, -1]
    assert AGE.parse(torch.tensor([63.0])).shape == (1,) and AGE.parse(torch.tensor([1.0, 2.0])).shape == (2, 1)
    assert WIND.parse([370, -10, 360, -1e-9]).tolist() == [[10], [350], [0], [0]]
    assert POSE.parse([0, 90, 720]).tolist() == [0, 90, 0]
    assert OUTLINE.parse([[0, 1, 2], [3, 0, 1]]).shape == (2, 3) and OUTLINE.parse([]).shape == (0, 2, 3)


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_are_stored_in_small_types(name):
    """Null has a number of its own, also in single cells of grids; there may be no rows."""
    column = COLUMNS[name]
    types = {"class": torch.int32, "flags": torch.uint8, "vector": torch.float16, "grid": torch.uint8}
    rows = torch.cat([column.draw(4), column.null(2), column.draw(1)])
    if name == "outline":
        rows[0, 1, 2] = -1
    for some in (rows, rows[:0], rows.expand(7, *column.shape)):
        stored = column.pack(some)
        assert stored.dtype == column.stored_type == types.get(column.kind, torch.float32)
        assert stored.is_contiguous() and equal(column.unpack(stored), some)


NOT_ALLOWED = [
    ("view", torch.tensor([3]), r"lie in \[0, 3\)"),
    ("tags", torch.full((1, 4), 7.0), r"flags must be 0 or 1 \(got 7\)"),
    ("age", torch.tensor([[math.inf]]), "finite"),
    ("outline", torch.zeros(1, 2, 2).long(), r"the shape \(2, 3\)"),
]


@pytest.mark.parametrize(("name", "rows", "allowed"), NOT_ALLOWED)
def test_what_is_not_allowed_is_neither_written_nor_read(name, rows, allowed):
    column = COLUMNS[name]
    for convert, values in ((column.pack, rows), (column.unpack, rows.to(column.stored_type))):
        with pytest.raises(ValueError, match=allowed):
            convert(values)
    with pytest.raises(ValueError, match="limit of torch.float16"):
        TEXT.pack(torch.full((1, 6), 1e5))


NUMBER = {"kind": "number", "mean": [1.0], "std": [2.0], "low": [0.0], "high": [3.0]}


@pytest.mark.parametrize(
    ("column", "key"),
    [
        ({"kind": ["class"]}, "kind"),
        ({**NUMBER, "extra": 1}, "extra"),
        ({**NUMBER, "low": [0.0, 1.0]}, "equally many"),
        ({"kind": "grid", "grid": {"shape": [1 << 40, 3], "vocab_size": 4}}, "grid"),
    ],
)
def test_bad_columns_are_refused(column, key):
    with pytest.raises(ValueError, match=key) as caught:
        make_prior("gpt", conditions={"one": column})
    assert len(str(caught.value).splitlines()) == 1


def test_names_and_sizes_of_columns_are_checked():
    for name in ("label", "labels", "tokens", "a.b", "../age", "", "1st", "a" * 65):
        assert "cannot name a column" in next(names_problem([name]))
    assert "at most 64" in next(names_problem(f"c{k}" for k in range(65)))
    for kind in KINDS:
        for column in columns_of(kind, (2, 3)).values():
            assert read_column(column.to_dict()) == column == read_column(column)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_fold_joins_the_cells_under_each_position(tall, wide, height, width):
    x = torch.arange(height * tall * width * wide).view(1, height * tall, width * wide, 1)
    factors = fold_factors((height * tall, width * wide), (height, width))
    assert factors == (tall, wide)
    expected = torch.stack(
        [
            torch.stack([x[0, i * tall : (i + 1) * tall, j * wide : (j + 1) * wide].flatten() for j in range(width)])
            for i in range(height)
        ]
    )
    assert torch.equal(fold(x, factors)[0], expected)
    assert fold_factors((height * tall + 1, width), (height * tall, width)) == (1, 1) or height * tall == 1


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.integers(1, 5))
def test_area_resize_averages_what_each_cell_covers(height, width, tall, wide):
    x = torch.randn(2, height, width, 3)
    expected = torch.nn.functional.adaptive_avg_pool2d(x.movedim(-1, 1), (tall, wide)).movedim(1, -1)
    assert (AreaResize((height, width), (tall, wide))(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    "target", [TokenGrid((2, 3), 5), TokenGrid((6,), 5), TokenGrid((11,), 5, ((1, 1), (2, 2), (2, 3)))]
)
def test_grids_lie_over_the_positions_of_the_prior(name, target):
    """A cell moves the features over it most; null differs from every id, and so do its levels."""
    grid = GRIDS[name](2, 3)
    encoder = GridEncoder(grid, target, 8).double()
    tokens, vector = torch.randint(grid.vocab_size, (4, *grid.shape)), torch.zeros(4, 8).double()
    encoded = encoder(tokens, vector)
    assert encoded.shape == (4, len(target), 8) and encoded.isfinite().all()
    assert not torch.equal(encoder(tokens, vector + 1), encoded)
    for cell in range(len(grid)):
        changed = tokens.flatten(1).clone()
        changed[:, cell] = -1
        assert (encoder(changed.view_as(tokens), vector) - encoded).abs().amax((1, 2)).min() > 1e-6
    if name == "same" and target.shape == (2, 3):
        encoder.block.project.weight.data.zero_()
        moved = (encoder(changed.view_as(tokens), vector) - encoder(tokens, vector)).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_numbers_keep_their_precision_in_any_type(dtype):
    """Years differ by less than bfloat16 resolves; they are standardised first."""
    year = NumberColumn(mean=[2013.4], std=[7.3], low=[1999.0], high=[2026.0])
    embed = year.embedding(16, TokenGrid((2, 3), 5))
    exact, years = embed.double(), torch.arange(2020.0, 2027.0)[:, None]
    expected = exact(years)
    found = embed.to(dtype)(years)
    assert found.dtype == dtype and (found.double() - expected).abs().max() < 0.02 * expected.abs().max()
    assert found.unique(dim=0).shape[0] == 7
    assert torch.equal(embed(torch.tensor([[2013.4 + 1000 * 7.3]])), embed(torch.tensor([[1e30]]))), "limited"


@pytest.mark.parametrize("width", [8, 64])
def test_near_angles_have_near_embeddings_across_north(width):
    embed = WIND.embedding(width, TokenGrid((2, 3), 5)).double()
    at_350, at_10, at_100, at_190, null = embed(WIND.parse([350, 10, 100, 190, None]))
    assert (at_350 - at_10).norm() < 0.7 * min((at_10 - at_100).norm(), (at_10 - at_190).norm())
    assert min((null - each).norm() for each in (at_10, at_100, at_190)) > 1e-4 and null.isfinite().all()
    partly = torch.tensor([[10.0, math.nan, 20.0], [10.0, 0.0, 20.0]])
    found = POSE.embedding(width, TokenGrid((2, 3), 5))(partly)
    assert found.isfinite().all() and not torch.equal(*found), "an angle that is null is not 0"


def test_the_encoder_keeps_its_initialization():
    """`reset` initializes matrices of the transformer alone; features of grids start at 1, numbers near 0.02."""
    model = make_conditioned("gpt", "all").float()
    reset(model, model.layers)
    weights = {key: weight.detach() for key, weight in model.condition_encoder.named_parameters()}
    assert 0.7 < float(weights["grids.column_outline.embedding.weight"].std()) < 1.4
    for column in ("age", "speed", "wind", "pose", "text", "tags"):
        assert 0.015 < float(weights[f"vectors.column_{column}.second.weight"].std()) < 0.025
    assert 0.8 < float(model.class_embedding.columns.weight.detach().std()) * 8**0.5 < 1.25
