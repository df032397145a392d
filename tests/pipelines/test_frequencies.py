"""The frequencies of classes: counted, stored, and conditioned on other columns.

Covers: pipelines/frequencies.py.
"""

import json
import math

import pytest
import torch

from pipelines import frequencies
from pipelines.frequencies import FREQUENCIES, Frequencies
from prior.columns import ClassColumn, FlagsColumn, NumberColumn
from prior.given import Given
from tokenizer.files import FormatError

COLUMNS = {
    "label": ClassColumn.numbered(4),
    "view": ClassColumn(names=["frontal", "lateral", "oblique"]),
    "tags": FlagsColumn(names=["red", "old"]),
    "age": NumberColumn(mean=[40.0], std=[15.0], low=[0.0], high=[99.0]),
}


def draw_split(count=500):
    """Rows of all columns: the class 3 never occurs, and some values are null."""
    rows = {name: column.draw(count) for name, column in COLUMNS.items()}
    rows["label"] = torch.randint(3, (count,))
    rows["view"] = torch.where(rows["label"] == 0, 0, rows["view"])
    rows["view"][::7] = -1
    rows["tags"][::5] = math.nan
    return Given(COLUMNS, rows, count)


def share_of(split, agrees, name="label"):
    """p(c | o) by its formula; agrees: the rows in which the other columns are as given."""
    size, ids = COLUMNS[name].num_classes, split.rows[name]
    whole = torch.stack([(ids == number).sum() for number in range(size)]).double()
    found = torch.stack([((ids == number) & agrees).sum() for number in range(size)]).double()
    return (found + whole / whole.sum()) / (found.sum() + 1)


def test_classes_are_as_frequent_as_in_the_split_given_the_other_columns(monkeypatch):
    monkeypatch.setattr(frequencies, "CHUNK", 64)
    split = draw_split()
    found, rows = Frequencies.count(split), split.rows
    everything = torch.ones(500, dtype=torch.bool)
    red = rows["tags"][:, 0] == 1
    given = {
        "nothing": ({}, everything),
        "a view": ({"view": torch.tensor([1])}, rows["view"] == 1),
        "a null view": ({"view": torch.tensor([-1])}, everything),
        "some flags": ({"tags": torch.tensor([[1.0, math.nan]])}, red),
        "both": (
            {"view": torch.tensor([0]), "tags": torch.tensor([[1.0, 0.0]])},
            (rows["view"] == 0) & red & (rows["tags"][:, 1] == 0),
        ),
        "a number": ({"age": torch.tensor([[30.0]])}, everything),
    }
    for name, (values, agrees) in given.items():
        nats = found.log_prob("label", Given(COLUMNS, values, 1))
        assert (nats.exp()[0] - share_of(split, agrees)).abs().max() < 1e-12, name
        assert nats[0, 3] < -3 and abs(float(nats.exp().sum()) - 1) < 1e-12
    assert found.log_prob("label", Given(COLUMNS, {}, 2))[:, 3].tolist() == [-math.inf] * 2
    together = Given(COLUMNS, {"view": torch.tensor([1, -1, 0, 1])}, 4)
    nats = found.log_prob("label", together)
    for row in range(4):
        assert torch.equal(nats[row : row + 1], found.log_prob("label", together[row : row + 1]))
    views = found.log_prob("view", Given(COLUMNS, {"label": torch.tensor([2])}, 1))
    assert (views.exp()[0] - share_of(split, rows["label"] == 2, "view")).abs().max() < 1e-12


def test_what_never_occurred_together_leaves_the_share_of_each_class():
    split = Given(COLUMNS, {"label": torch.tensor([0, 0, 1]), "view": torch.tensor([0, 0, 0])}, 3)
    nats = Frequencies.count(split).log_prob("label", Given(COLUMNS, {"view": torch.tensor([2])}, 1))
    assert torch.allclose(nats.exp(), torch.tensor([[2 / 3, 1 / 3, 0, 0]]).double())


def test_too_many_combinations_leave_each_column_of_classes_alone(monkeypatch):
    monkeypatch.setattr(frequencies, "MOST", 12)
    split = draw_split()
    found = Frequencies.count(split)
    assert [list(table.columns) for table in found.tables] == [["label"], ["view"]]
    nats = found.log_prob("label", Given(COLUMNS, {"view": torch.tensor([1])}, 1))
    assert (nats.exp()[0] - share_of(split, torch.ones(500, dtype=torch.bool))).abs().max() < 1e-12


def test_without_a_count_all_classes_are_equally_likely():
    null = Given(COLUMNS, {"label": torch.tensor([1, 2])}, 2)
    for found, name in ((Frequencies(), "label"), (Frequencies.count(null), "view")):
        assert torch.allclose(
            found.log_prob(name, Given(COLUMNS, {}, 2)).exp(), torch.tensor(1.0).double() / 3, atol=0.1
        )
    assert Frequencies.count(Given({"tags": COLUMNS["tags"], "age": COLUMNS["age"]}, {}, 3)).find_table("tags") is None


def test_a_prior_of_some_columns_has_their_frequencies_and_no_others():
    split = draw_split()
    some = {name: COLUMNS[name] for name in ("label", "tags", "age")}
    found = Frequencies.count(split).of_columns(some)
    given = Given(some, {"tags": torch.tensor([[1.0, 0.0]])}, 1)
    direct = Frequencies.count(Given(some, {name: split.rows[name] for name in some}, 500))
    assert torch.equal(found.log_prob("label", given), direct.log_prob("label", given))
    assert not Frequencies.count(split).of_columns({"label": ClassColumn.numbered(5)}).tables


@pytest.mark.parametrize(("label", "view"), [(1 << 17, 0), (1 << 10, 1 << 5)])
def test_every_file_that_is_written_can_be_read(label, view, tmp_path):
    """Also of many classes and combinations; without counts there is none."""
    sizes = {name: size for name, size in (("label", label), ("view", view)) if size}
    columns, count = {name: ClassColumn.numbered(size) for name, size in sizes.items()}, label * max(1, view)
    rows = {name: torch.arange(count) // (1 if name == "label" else label) % size for name, size in sizes.items()}
    found = Frequencies.count(Given(columns, rows, count))
    found.save(tmp_path)
    for one, other in zip(Frequencies.load(tmp_path, columns).tables, found.tables, strict=True):
        assert one.values.equal(other.values) and one.counts.equal(other.counts)
    assert bool(found.tables) == (label <= 1 << 16)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tables": [{"columns": ["label"], "values": [[0], [1]], "counts": [1]}]}, "tables.0: values"),
        ({"tables": [{"columns": ["label"], "values": [[4]], "counts": [1]}]}, "values: label: ids"),
        ({"tables": [{"columns": ["tags"], "values": [[0, 257]], "counts": [1]}]}, "values: tags: too large"),
        ({"tables": [{"columns": ["age"], "values": [[0]], "counts": [1]}]}, "expected columns of classes and flags"),
        ({"tables": [{"columns": ["label", "label"], "values": [[0, 0]], "counts": [1]}]}, "each once"),
        ({"format_version": 2}, "a newer Smalti is needed"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(change, problem, tmp_path):
    (tmp_path / FREQUENCIES).write_text(json.dumps({"format_version": 1, "tables": [], **change}))
    with pytest.raises(FormatError, match=problem) as caught:
        Frequencies.load(tmp_path, COLUMNS)
    assert "\n" not in str(caught.value) and FREQUENCIES in str(caught.value)
