"""`train_prior init=PIPELINE` with other classes and columns: every weight that fits is copied, and log p stays."""

from __future__ import annotations

import pytest
import torch
from small import PRIORS, VARIANTS, draw_tokens, make_prior

from pipelines.tokens.meta import label_column
from pipelines.training.transfer import transfer_weights
from prior import Prior
from prior.columns import ClassColumn, FlagsColumn, GridColumn, NumberColumn, VectorColumn
from tokenizer import TokenGrid

KINDS = [*PRIORS, *VARIANTS, "direct_made"]
OLD, NEW = ["cat", "dog", "eel"], ["eel", "fox", "cat", "dog", "gnu"]
AGE = NumberColumn(mean=[3.0], std=[2.0], low=[0.0], high=[9.0])
COLUMNS = {
    "view": ClassColumn(names=["front", "side"]),
    "tags": FlagsColumn(names=["old", "wet"]),
    "age": AGE,
    "text": VectorColumn(size=3),
    "outline": GridColumn(grid=TokenGrid((3, 4), 6), tokenizer="there"),
}
VALUES = {"view": [0, None, 1, 0], "tags": ["old"], "age": [1, 2, 3, 4], "text": [1.0, 2, 3], "outline": None}


def prior_of(kind, names, columns=None, **more):
    """A small prior with random weights."""
    kind, settings = ("made", {"direct": True}) if kind == "direct_made" else (kind, {})
    return make_prior(kind, num_classes=len(names), conditions=columns or {}, **settings, **more).double()


def takes_columns(kind):
    name = "made" if kind == "direct_made" else VARIANTS.get(kind, (kind,))[0]
    return Prior.find(name).Config.takes_conditions


with_columns = pytest.mark.parametrize("kind", [kind for kind in KINDS if takes_columns(kind)])


def fresh(kind, names, columns=None):
    """A prior as before training: with its own initial weights, unlike `prior_of`."""
    model = prior_of(kind, names, columns)
    return type(model)(model.config).double().eval()


def transfer(model, names, other, other_names):
    """Transfer weights between priors whose classes have these names."""
    columns, others = ({**each.columns, **label_column(some)} for each, some in ((model, names), (other, other_names)))
    return transfer_weights(model, columns, other, others)


@torch.no_grad()
def scores(model, names, asked, condition=None, count=4):
    """log p of some tokens given each of the classes `asked` (None is the null class)."""
    tokens = draw_tokens(model, count)
    labels = [len(names) if name is None else names.index(name) for name in asked]
    return torch.stack([model.log_prob(tokens, torch.full((count,), label), condition=condition) for label in labels])


def compare(model, names, other, other_names, pairs, condition=None, other_condition=None):
    """Assert equal log p for pairs of classes of two priors."""
    torch.manual_seed(1)
    mine = scores(model, names, [new for new, _ in pairs], condition)
    torch.manual_seed(1)
    theirs = scores(other, other_names, [old for _, old in pairs], other_condition)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_matched_by_name_and_new_ones_start_as_the_null_class(kind):
    torch.manual_seed(0)
    other = prior_of(kind, OLD)
    for names in (NEW, OLD[::-1], ["gnu"], OLD[:1]):
        model = fresh(kind, names)
        notes = transfer(model, names, other, OLD)
        pairs = [(name, name if name in OLD else None) for name in (*names, None)]
        compare(model, names, other, OLD, pairs)
        text = "\n".join(notes)
        for name in {*names, *OLD}:
            assert (name in text) == ((name in names) != (name in OLD))
    before = scores(other, OLD, [*OLD, None])
    assert len({float(total) for total in before.sum(1)}) == 4  # classes matter


@pytest.mark.parametrize("kind", KINDS)
def test_classes_may_be_added_to_a_prior_without_any_and_removed(kind):
    other = prior_of(kind, [])
    model = fresh(kind, NEW)
    transfer(model, NEW, other, [])
    compare(model, NEW, other, [], [(name, None) for name in (*NEW, None)])
    other = prior_of(kind, OLD)
    bare = fresh(kind, [])
    assert transfer(bare, [], other, OLD) == ("init: classes left out: cat, dog, eel",)
    compare(bare, [], other, OLD, [(None, None)])


@with_columns
def test_new_columns_start_without_effect_and_can_learn(kind):
    torch.manual_seed(0)
    pairs = [("cat", "cat"), (None, None)]
    for old in ({}, {name: column for name, column in COLUMNS.items() if name != "outline"}):
        other, model = prior_of(kind, OLD, old), fresh(kind, OLD, COLUMNS)
        notes = transfer(model, OLD, other, OLD)
        missing = [name for name in COLUMNS if name not in old]
        assert notes == (f"init: new columns, which start without effect: {', '.join(missing)}",)
        values = {name: VALUES[name] for name in old}
        ids = torch.randint(6, (4, 3, 4))
        compare(model, OLD, other, OLD, pairs, {**VALUES, "outline": ids}, values)
        model.zero_grad()
        tokens = draw_tokens(model, 4)
        inputs = model.training_inputs(tokens, 0.0)
        model.loss(tokens, condition={**VALUES, "outline": ids}, **inputs).backward()
        learning = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
        if old:
            assert all(any(f"column_{name}." in weight for weight in learning) for name in missing)
        else:
            assert any("columns" in weight for weight in learning)


@with_columns
def test_columns_that_changed_start_anew_and_others_are_left_out(kind):
    torch.manual_seed(0)
    old = {
        "age": AGE.model_copy(update={"mean": [4.0]}),
        "tags": FlagsColumn(names=["old", "dry"]),
        "view": ClassColumn(names=["side", "top", "front"]),
        "outline": COLUMNS["outline"],
        "extra": AGE,
    }
    other, model = prior_of(kind, OLD, old), fresh(kind, OLD, COLUMNS)
    assert transfer(model, OLD, other, OLD) == (
        "init: new columns, which start without effect: text",
        "init: changed columns, which start anew, so that log p changes: tags",
        "init: columns left out, so that log p changes: extra",
        "init: columns of another mean and scale, so that their values mean others: age",
    )
    mine, theirs = (dict(part.condition_encoder.vectors.items()) for part in (model, other))
    rows = theirs["column_view"].weight[[2, 0, 3]]
    assert torch.equal(mine["column_view"].weight, rows)
    assert torch.equal(mine["column_age"].first.weight, theirs["column_age"].first.weight)
    assert not mine["column_tags"].second.weight.any() and not mine["column_text"].second.weight.any()
