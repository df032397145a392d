"""Values of columns, their encoding, and what is refused.

Covers: prior/conditions.py, prior/condition_encoder.py.
"""

import math

import pytest
import torch
from givens.columns import AGE, GRIDS, KINDS, SPEED, TAGS, TEXT, VIEW, columns_of, draw_values, make_conditioned
from hypothesis import given
from hypothesis import strategies as st
from prior.conditions import (
    ConditionEmbedding,
    GridColumn,
    NumberColumn,
    conditions_problem,
    digest_condition,
    make_condition,
    read_column,
    select_rows,
)
from small import draw_tokens, make_prior

from prior.condition_encoder import AreaResize, GridEncoder, fold, fold_factors, make_embedding
from prior.transformer import reset
from tokenizer import TokenGrid

OUTLINE = GridColumn(grid=TokenGrid((2, 3), 4))
COLUMNS = {"view": VIEW, "tags": TAGS, "age": AGE, "speed": SPEED, "text": TEXT, "outline": OUTLINE}
finite = st.floats(-(2.0**99), 2.0**99, width=32)


def lists(column):
    """Values of one image as users write them."""
    return {
        "class": st.sampled_from(VIEW.names) | st.integers(0, 2),
        "flags": st.lists(st.sampled_from(TAGS.names)) | st.lists(st.sampled_from([0, 1]), min_size=4, max_size=4),
        "number": finite if column.shape == (1,) else st.lists(finite, min_size=2, max_size=2),
        "vector": st.lists(finite, min_size=6, max_size=6),
        "grid": st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=2, max_size=2),
    }[column.kind]


def equal(one, other):
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(-7), other.nan_to_num(-7))


@pytest.mark.parametrize("name", COLUMNS)
@given(data=st.data())
def test_one_value_and_one_per_image_differ_in_every_form(name, data):
    """Values are the same alone, in a list, as arrays and as tensors; None is null."""
    column = COLUMNS[name]
    values = data.draw(st.lists(st.none() | lists(column), min_size=1, max_size=4))
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
    batch = make_condition({name: column}, {name: values[0]}, 3)[name]
    assert equal(batch, torch.stack([each[0]] * 3))


def test_values_by_hand():
    assert VIEW.parse("lateral").tolist() == 1 and VIEW.parse(["oblique", None, 0]).tolist() == [2, -1, 0]
    assert TAGS.parse(["wet", "red"]).tolist() == [1, 0, 1, 0] and TAGS.parse([]).tolist() == [0] * 4
    assert TAGS.parse([["wet"], [], "old"]).tolist() == [[0, 0, 1, 0], [0] * 4, [0, 1, 0, 0]]
    assert AGE.parse([63, 5.5]).tolist() == [[63], [5.5]] and SPEED.parse([3, -1]).tolist() == [3, -1]
    assert AGE.parse(torch.tensor([63.0])).shape == (1,) and AGE.parse(torch.tensor([1.0, 2.0])).shape == (2, 1)
    assert OUTLINE.parse([[0, 1, 2], [3, 0, 1]]).shape == (2, 3)
    assert make_condition(COLUMNS, None, 0)["outline"].shape == (0, 2, 3)


WRONG = [
    ("agee", 3, "unknown column 'agee'; did you mean 'age'\\? the columns are view"),
    ("view", "latral", "'latral' is not a class; allowed are frontal, lateral, oblique"),
    ("view", 3, "3 is not a class"),
    ("view", True, "True is not a class"),
    ("view", torch.tensor([0.5, 1.0]), "whole numbers"),
    ("view", torch.tensor([0, 3]), r"lie in \[0, 3\)"),
    ("tags", "blue", "'blue' is not a flag; allowed are red, old, wet, loud"),
    ("tags", ["red", 1], "expected names of flags, or a number 0 or 1 for each of 4"),
    ("tags", [0, 1, 2, 0], r"flags must be 0 or 1 \(got 2\)"),
    ("age", 10**400, "finite"),
    ("age", "old", "expected a number per image"),
    ("age", [1, math.nan], "finite"),
    ("age", torch.tensor([math.inf, 1.0]), "finite"),
    ("age", [1, 2, 3], "got a list of 3 for 2 images; give one value, or one per image"),
    ("speed", 3, "expected 2 numbers per image"),
    ("text", torch.zeros(2, 5), r"expected the shape \(6,\) for one image, or \(n, 6\) for n images \(got \(2, 5\)\)"),
    ("outline", [[0, 1, 2], [0, 1]], r"expected token ids of shape \(2, 3\)"),
    ("outline", "file.png", r"expected token ids of shape \(2, 3\)"),
    ("outline", torch.full((2, 3), 4), r"lie in \[0, 4\)"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_bad_values_are_refused_in_one_line_that_names_the_column(name, value, allowed):
    with pytest.raises(ValueError, match=allowed) as caught:
        make_condition(COLUMNS, {name: value}, 2)
    assert f"condition: {name}" in str(caught.value) or "unknown column" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_columns_are_refused_wherever_conditions_go():
    for model, there in (
        (make_conditioned("gpt", "number"), "the columns are given"),
        (make_prior("gpt"), "no columns"),
    ):
        tokens = draw_tokens(model, 2)
        for call in (model, model.log_prob, model.loss, model.features):
            with pytest.raises(ValueError, match=f"unknown column 'givn'.*{there}"):
                call(tokens, condition={"givn": torch.zeros(2, 1)})
        with pytest.raises(ValueError, match=f"expected values by column .got .63.*{there}"):
            model.log_prob(tokens, condition=[63])
        with pytest.raises(ValueError, match=f"unknown column 'givn'.*{there}"):
            model.sample(2, condition={"givn": 1})
        with pytest.raises(ValueError, match="guidance_on: unknown column 'givn'"):
            model.sample(2, torch.tensor([0, 1]), guidance_scale=2.0, guidance_on=["givn"])
    model = make_conditioned("gpt", "all")
    with pytest.raises(ValueError, match="guidance_scale other than 1 needs labels or a condition"):
        model.sample(2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance_scale other than 1 needs a value of age"):
        model.sample(2, condition={"view": 1}, guidance_scale=2.0, guidance_on=["age"])


NUMBER = {"kind": "number", "mean": [1.0], "std": [2.0], "low": [0.0], "high": [3.0]}


@pytest.mark.parametrize(
    ("column", "key"),
    [
        ({"kind": "words"}, "kind"),
        ({"kind": ["class"]}, "kind"),
        ({"kind": "class", "names": []}, "names"),
        ({**NUMBER, "std": [0.0]}, "std"),
        ({**NUMBER, "std": [math.nan]}, "std"),
        ({**NUMBER, "extra": 1}, "extra"),
        ({"kind": "vector", "size": 1 << 20}, "size"),
        ({"kind": "grid", "grid": {"shape": [0, 3], "vocab_size": 4}}, "grid"),
    ],
)
def test_bad_columns_are_refused(column, key):
    with pytest.raises(ValueError, match=key) as caught:
        make_prior("gpt", conditions={"one": column})
    assert len(str(caught.value).splitlines()) == 1


def test_names_and_sizes_of_columns_are_checked():
    for name in ("label", "labels", "a.b", "", "1st", "a" * 65):
        assert "cannot name a column" in next(conditions_problem({name: VIEW}))
    assert "equally many" in next(conditions_problem({"age": read_column({**NUMBER, "low": [0.0, 1.0]})}))
    assert "at most 64" in next(conditions_problem({f"c{k}": VIEW for k in range(65)}))
    for kind in KINDS:
        for column in columns_of(kind, (2, 3)).values():
            assert read_column(column.to_dict()) == column == read_column(column)


def test_digest_depends_on_values_names_and_shapes_alone():
    condition = {name: draw_values(column, 3) for name, column in COLUMNS.items()}
    found = digest_condition(condition)
    assert found == digest_condition({name: condition[name].clone() for name in reversed(condition)})
    odd = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)  # another NaN
    assert digest_condition({"age": odd[None]}) == digest_condition({"age": torch.tensor([[math.nan]])})
    assert digest_condition({"age": torch.tensor([[-0.0]])}) == digest_condition({"age": torch.tensor([[0.0]])})
    others = [{**condition, name: COLUMNS[name].null(3)} for name in condition]
    others += [select_rows(condition, slice(2)), {}, {"old": condition["age"]}, {"age": condition["age"]}]
    assert len({found, *(digest_condition(other) for other in others)}) == 1 + len(others)


# Encoding


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
    embed = make_embedding(year, 16)
    exact, years = embed.double(), torch.arange(2020.0, 2027.0)[:, None]
    expected = exact(years)
    found = embed.to(dtype)(years)
    assert found.dtype == dtype and (found.double() - expected).abs().max() < 0.02 * expected.abs().max()
    assert found.unique(dim=0).shape[0] == 7
    assert torch.equal(embed(torch.tensor([[2013.4 + 1000 * 7.3]])), embed(torch.tensor([[1e30]]))), "limited"


def test_null_is_not_the_mean_nor_zero():
    for column in (AGE, SPEED, TEXT, TAGS):
        embed = make_embedding(column, 8)
        middle = torch.tensor(column.mean) if column.kind == "number" else torch.zeros(column.shape)
        null = embed(column.null(1))
        assert null.isfinite().all() and (embed(middle[None]) - null).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["gpt", "blocks", "masked", "next_scale"])
def test_the_encoder_keeps_its_initialization(name):
    """`reset` initializes matrices of the transformer alone; features of grids start at 1, numbers near 0.02."""
    model = make_conditioned(name, "all").float()
    reset(model, model.layers)
    weights = {key: weight.detach() for key, weight in model.condition_encoder.named_parameters()}
    assert 0.8 < float(weights["grids.column_outline.embedding.weight"].std()) < 1.25
    for column in ("age", "speed", "text", "tags"):
        assert 0.015 < float(weights[f"vectors.column_{column}.second.weight"].std()) < 0.025
        assert weights[f"vectors.column_{column}.second.bias"].abs().max() == 0
    assert 0.8 < float(model.class_embedding.columns.weight.detach().std()) * 8**0.5 < 1.25
    assert float(model.class_embedding.weight.detach().std()) < 0.03


def test_columns_add_weights_only_where_there_are_columns():
    plain, conditioned = make_prior("gpt"), make_conditioned("gpt", "all")
    assert set(plain.state_dict()) == {
        name for name in conditioned.state_dict() if "condition_encoder" not in name and ".columns." not in name
    }
    assert plain.class_embedding.columns is None and plain.condition_encoder is None
    assert "conditions" not in plain.config.to_dict() and "condition_width" not in plain.config.to_dict()


def test_the_embedding_follows_the_order_of_each_image():
    model = make_conditioned("gpt", "grid same")
    embed, size = model.class_embedding, len(model.grid)
    assert isinstance(embed, ConditionEmbedding)
    encoded = model.encode_condition(None, 3, {"outline": draw_values(model.conditions["outline"], 3)})
    orders, raster = torch.stack([torch.randperm(size) for _ in range(3)]), embed.at_positions(encoded)
    for k in range(3):
        assert torch.equal(embed.at_positions(encoded, orders)[k], raster[k, orders[k]])
        assert torch.equal(embed.at_positions(encoded, orders[0])[k], raster[k, orders[0]])
    assert torch.equal(embed.on_map(encoded, 4).flatten(1, 2), raster)
