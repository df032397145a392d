"""What is given of the images of a batch: reading what users write, once, and what is done with rows."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from givens.columns import AGE, draw_values, make_conditioned
from givens.columns import COLUMNS as OTHERS
from givens.columns import equal as equal_rows
from hypothesis import given as drawn_by
from hypothesis import strategies as st
from small import draw_tokens, generators, make_prior

from prior.columns import AngleColumn, ClassColumn, FlagsColumn, VectorColumn
from prior.given import Given

COLUMNS = {"label": ClassColumn(names=["cat", "dog", "eel"]), **OTHERS}


def draw(count=4, columns=COLUMNS):
    """Rows of all columns, null in the second image."""
    rows = {name: draw_values(column, count) for name, column in columns.items()}
    for name, raw in rows.items():
        raw[1] = columns[name].null(1)[0]
    return Given(columns, rows, count)


def equal(one, other):
    """Whether all rows are equal, or null in both; a column without rows is null."""
    same = all(equal_rows(one.raw(name), other.raw(name)) for name in one.columns)
    return len(one) == len(other) and list(one.columns) == list(other.columns) and same


@pytest.mark.parametrize(
    ("labels", "condition", "count", "expected"),
    [
        (None, None, None, 1),
        (None, {}, 0, 0),
        ("dog", None, None, 1),
        (["dog", None, 0], None, None, 3),
        (np.array([1, 0, 2, 2], dtype=np.uint8), None, None, 4),
        ("dog", {"age": [1, 2]}, None, 2),
        (None, {"age": 3, "speed": [1, 2], "pose": [0, 90, 180]}, 5, 5),
        (None, {"label": None, "age": None}, 5, 5),
    ],
    ids=str,
)
def test_there_are_as_many_images_as_values_or_as_asked_for(labels, condition, count, expected):
    """One value is that of all images. What is None, or not there, has no rows."""
    found = Given.read(COLUMNS, labels, condition, count=count)
    assert len(found) == found.count == expected
    assert len(Given.read(COLUMNS, "cat", {"age": 3}, default=7)) == 7
    wanted = {name: value for name, value in {"label": labels, **(condition or {})}.items() if value is not None}
    assert found.names == tuple(name for name in COLUMNS if name in wanted)
    for name, value in wanted.items():
        raw, column = COLUMNS[name].parse(value), COLUMNS[name]
        assert torch.equal(found.raw(name), raw.expand(expected, *column.shape)), name
    for name in COLUMNS.keys() - wanted.keys():
        assert bool(COLUMNS[name].is_null(found.raw(name)).all())


def test_labels_and_the_column_label_are_the_same():
    one, other = Given.read(COLUMNS, ["dog", None]), Given.read(COLUMNS, None, {"label": ["dog", None]})
    assert equal(one, other) and one.rows["label"].tolist() == [1, -1]
    for condition in ({"label": 1}, one):
        with pytest.raises(ValueError, match="give labels, or 'label' in condition, not both"):
            Given.read(COLUMNS, ["cat", "cat"], condition)
    assert Given.read(COLUMNS, "cat", {"label": None}).rows["label"].tolist() == [0]


def test_what_is_already_read_is_taken_as_it_is():
    """Its columns may be those of a pipeline, with names of classes, and it may lack some of the reader's."""
    whole = draw()
    assert equal(Given.read(COLUMNS, None, whole, count=4), whole)
    some = draw(columns={"age": OTHERS["age"]})
    found = Given.read(COLUMNS, [0, 1, None, 2], some)
    assert found.names == ("label", "age") and list(found.columns) == list(COLUMNS)
    assert found.rows["label"].tolist() == [0, 1, -1, 2] and equal(found.without(["label"]), some.of_columns(COLUMNS))
    for numbered in ({"label": ClassColumn.numbered(3)}, {"age": AGE.model_copy(update={"mean": [0.0]})}):
        assert equal(replace(Given.read({**COLUMNS, **numbered}, None, whole), columns=COLUMNS), whole)
    for labels, rows, count in ((None, whole, 3), ([0, 1, 2], some, None)):
        with pytest.raises(ValueError, match="4 images"):
            Given.read(COLUMNS, labels, rows, count=count)


@pytest.mark.parametrize(
    "other",
    [
        {"label": ClassColumn(names=["dog", "cat", "eel"])},
        {"label": ClassColumn.numbered(2)},
        {"text": VectorColumn(size=6, encoder="ngrams:8")},
        {"tags": FlagsColumn(names=["old", "red", "wet", "loud"])},
        {"age": AngleColumn()},
    ],
    ids=str,
)
def test_rows_of_columns_with_another_meaning_are_refused(other):
    given, (name,) = draw(), other
    for rows in (given, *([Given(COLUMNS, {}, 4).over("label")] if name == "label" else [])):
        with pytest.raises(ValueError, match=f"{name}: was read for another column"):
            Given.read({**COLUMNS, **other}, None, rows)
    assert len(Given.read({**COLUMNS, **other}, None, given.without([name]))) == 4


WRONG = [
    ("agee", 3, "unknown column 'agee'; did you mean 'age'"),
    ("label", "eagle", "'eagle' is not a class"),
    ("view", 3, "3 is not a class"),
    ("view", [1.0, 2.0], "1.0 is not a class"),
    ("view", torch.tensor([0.5, 1.0]), "whole numbers"),
    ("tags", "blue", "'blue' is not a flag"),
    ("tags", ["red", 1], "expected names of flags"),
    ("age", "old", "expected a number"),
    ("age", [1, math.nan], "finite"),
    ("age", [1, 2, 3], "got a list of 3 for 2 images"),
    ("speed", 3, "expected 2 numbers"),
    ("text", torch.zeros(2, 5), r"expected the shape \(6,\)"),
    ("outline", [[0, 1, 2], [0, 1]], "expected token ids of shape"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_bad_values_are_refused_in_one_line_that_names_the_column(name, value, allowed):
    with pytest.raises(ValueError, match=allowed) as caught:
        Given.read(COLUMNS, None, {name: value}, count=2)
    assert f"condition: {name}" in str(caught.value) or "unknown column" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_columns_are_refused_wherever_conditions_go():
    for model in (make_conditioned("gpt", "number"), make_prior("gpt", num_classes=0)):
        with pytest.raises(ValueError, match="expected values by column"):
            model.log_prob(draw_tokens(model, 2), condition=[63])
        for request in ({"condition": {"givn": 1}}, {"guidance_scale": 2.0, "guidance_on": ["givn"]}):
            with pytest.raises(ValueError, match="unknown column 'givn'"):
                model.sample(2, **request)


def test_a_prior_reads_its_number_of_classes_as_null():
    model, tokens = make_prior("gpt"), draw_tokens(make_prior("gpt"), 3)
    expected = model.log_prob(tokens, [0, None, 2])
    for labels in ([0, 3, 2], [*np.array([0, 3, 2])], torch.tensor([0, -1, 2]), np.array([0, 3, 2], dtype=np.uint8)):
        given = model.read_given(labels, None, 3)
        assert given.rows["label"].tolist() == [0, -1, 2] and model.encode_given(given).labels.tolist() == [0, 3, 2]
        assert torch.equal(model.log_prob(tokens, labels), expected)
        assert torch.equal(model.log_prob(tokens, condition={"label": given.rows["label"]}), expected)
        assert torch.equal(model.log_prob(tokens, condition=given), expected)
    assert torch.equal(model.log_prob(tokens, 2), model.log_prob(tokens, [2, 2, 2])), "one for all images"
    plain = make_prior("gpt", num_classes=0)
    for labels in (None, [None] * 3, [0, 0, 0], torch.tensor([-1, -1, -1])):
        assert model.read_given(None, None, 3).names == plain.read_given(labels, None, 3).names == ()


def test_only_what_is_given_can_be_guided():
    model = make_conditioned("gpt", "all")
    with pytest.raises(ValueError, match="guidance_scale other than 1 needs labels or a condition"):
        model.sample(2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance_scale other than 1 needs a value of age"):
        model.sample(2, condition={"view": 1, "age": None}, guidance_scale=2.0, guidance_on=["age"])
    for request in ({"labels": [None, 3]}, {"condition": {"age": [None, None]}}):  # as images of a larger batch
        plain = model.sample(2, generator=generators(2))
        assert torch.equal(model.sample(2, generator=generators(2), guidance_scale=2.0, **request), plain)


@drawn_by(st.lists(st.integers(0, 3)), st.integers(0, 3), st.integers(0, 4))
def test_rows_are_selected_and_repeated(at, begin, times):
    given = draw()
    for index in (slice(begin, None), torch.tensor(at, dtype=torch.long), at, torch.arange(4) % 2 == 0):
        some = given[index]
        assert len(some) == len(torch.arange(4)[index]) and some.names == given.names
        for name, raw in some.rows.items():
            assert torch.equal(raw.nan_to_num(-7), given.rows[name][index].nan_to_num(-7))
        nothing = Given(COLUMNS, {}, 4)[index]
        assert len(nothing) == len(some) and nothing.names == ()
    rows = torch.arange(4).repeat_interleave(times)
    assert equal(given.repeat(times), given[rows]) and equal(given[:1].expand(times), given[[0] * times])
    assert len(Given(COLUMNS, {}, 4).repeat(times)) == 4 * times and len(Given(COLUMNS, {}, 1).expand(times)) == times


def test_columns_are_removed_by_name_or_in_some_rows():
    given = draw()
    assert given.without().names == () and len(given.without()) == 4
    some = given.without(["label", "tags"])
    assert {*given.names} - {*some.names} == {"label", "tags"} and given.names == tuple(COLUMNS)
    assert bool(COLUMNS["tags"].is_null(some.raw("tags")).all())
    digest, rows = given.digest, torch.tensor([True, False, True, False])
    found = given.without({name: rows for name in COLUMNS})
    for name, column in COLUMNS.items():
        assert column.is_null(found.raw(name)).tolist() == [True, True, True, False]
        assert torch.equal(found.raw(name)[3], given.raw(name)[3])
    assert given.digest == digest, "the rows that were there are not written to"
    assert equal(some.without({"label": rows}), some)


def test_rows_are_replaced_and_limited():
    given = draw().with_rows(age=torch.tensor([[-3.0], [math.nan], [120.0], [50.0]]))
    assert given.limit().raw("age").nan_to_num(-7).tolist() == [[0], [-7], [99], [50]]
    inside = given.limit()
    for name in ("label", "tags", "wind", "text", "outline"):
        assert torch.equal(inside.raw(name).nan_to_num(-7), given.raw(name).nan_to_num(-7))
    assert Given(COLUMNS, {}, 4).with_rows(age=given.raw("age")).names == ("age",)


def test_rows_on_a_disk_are_read():
    """Anything that an index turns into a tensor."""

    class Rows:
        def __init__(self, rows):
            self.rows = rows

        def __getitem__(self, at):
            return self.rows[at]

    given = draw()
    stored = Given(COLUMNS, {name: Rows(raw) for name, raw in given.rows.items()}, 4)
    assert equal(Given.read(COLUMNS, None, stored, device=torch.device("cpu")), given)


def digest_of_03(rows):
    """The sha256 of raw columns by their names, as version 0.3 computed it."""
    digest = hashlib.sha256()
    for name in sorted(rows):
        values = rows[name].contiguous()
        if values.is_floating_point():
            values = torch.where(values.isnan(), math.nan, values + 0.0)
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_a_digest_is_that_of_03():
    """Of all columns, null or not, and of the class if it is given, whose null was the number of classes."""
    given = draw()
    others = {name: given.raw(name) for name in OTHERS}
    assert given.without(["label"]).digest == digest_of_03(others)
    labels = torch.where(given.raw("label") < 0, 3, given.raw("label"))
    assert given.digest == digest_of_03({**others, "label": labels})
    assert given.without(list(OTHERS)).digest == digest_of_03(
        {**{name: column.null(4) for name, column in OTHERS.items()}, "label": labels}
    )


def test_a_digest_depends_on_values_names_and_shapes_alone():
    given = draw()
    turned = {name: given.rows[name].clone() for name in reversed(given.rows)}
    found, age = given.digest, {"age": OTHERS["age"]}
    assert found == Given(dict(reversed(COLUMNS.items())), turned, 4).digest
    odd = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)  # another NaN
    assert Given(age, {"age": odd[None]}, 1).digest == Given(age, {}, 1).digest
    assert Given(age, {"age": torch.tensor([[-0.0]])}, 1).digest == Given(age, {"age": torch.zeros(1, 1)}, 1).digest
    others = [given.without([name]) for name in COLUMNS] + [given[:2], Given({}, {}, 4)]
    assert len({found, *(other.digest for other in others)}) == 1 + len(others)
