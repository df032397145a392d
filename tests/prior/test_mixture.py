"""The mixture over a class, by enumeration of all grids and by the direct sum."""

import math
import re

import pytest
import torch
from givens.headed import all_grids, make_model
from small import draw_tokens, make_prior

from prior.columns import ClassColumn, FlagsColumn, NumberColumn
from prior.given import Given

SETTINGS = {
    "gpt": {},
    "gpt, depth": {},
    "masked": {},
    "blocks": {"order": "diagonal"},
    "marginal": {},
}
COLUMNS = {
    "view": ClassColumn(names=["frontal", "lateral", "oblique", "rear"]),
    "tags": FlagsColumn(names=["red", "old"]),
    "age": NumberColumn(mean=[40.0], std=[15.0], low=[0.0], high=[99.0]),
}
every_kind = pytest.mark.parametrize("name", SETTINGS)


def make_tiny(name):
    """A small prior in float64, all grids of it, and other columns that are given for each."""
    sizes = {"positions": (1, 2)} if "depth" in name else {"shape": (2, 2)}
    others = {} if name == "marginal" else {"conditions": COLUMNS, "condition_width": 8}
    model = make_model(name, **{"order": "raster", **SETTINGS[name]}, **sizes, **others, vocab_size=2).double()
    grids = all_grids(model.grid)
    rows = {column: each.draw(1).expand(len(grids), *each.shape) for column, each in model.config.conditions.items()}
    return model, grids, Given(model.columns, rows, len(grids))


@every_kind
@torch.no_grad()
def test_the_mixture_is_the_direct_sum_sums_to_one_and_is_the_sum_of_its_tokens(name):
    model, grids, others = make_tiny(name)
    for column in ("label", *(["view"] if others.names else [])):
        given = others.without([column])
        count = len(model.columns[column].names)
        weights = torch.rand(len(grids), count).double().softmax(1)

        for log_weights, expected in (
            (None, torch.full((count,), 1 / count, dtype=torch.float64)),
            (weights[0].log(), weights[0]),
            (torch.eye(count).double()[1].log(), torch.eye(count).double()[1]),
            (weights.log(), weights),
        ):
            each = [model.log_prob(grids, condition=given.with_rows(**{column: one})) for one in ids(count, grids)]
            direct = (torch.stack(each, 1).exp() * expected).sum(1).log()
            open_class = given.over(column, log_weights)
            whole = model.log_prob(grids, condition=open_class)
            parts = model.token_log_probs(grids, condition=open_class)
            assert parts.shape == grids.shape and parts.isfinite().all()
            assert (whole - direct).abs().max() < 1e-9
            assert (parts.flatten(1).sum(1) - whole).abs().max() < 1e-9
            if expected.ndim == 1:
                assert abs(float(whole.exp().sum()) - 1) < 1e-9


def ids(count, grids):
    """Each class, for all grids."""
    return [torch.full((len(grids),), number) for number in range(count)]


@every_kind
@torch.no_grad()
def test_a_token_of_the_mixture_depends_on_earlier_tokens_only_and_its_predictive_sums_to_one(name):
    model, grids, given = make_tiny(name)
    parts = model.token_log_probs(grids, condition=given.over("label")).flatten(1)
    flat = grids.flatten(1)
    for rank, cell in enumerate(model.order.tolist()):
        groups = (flat[:, model.order[:rank]] << torch.arange(rank)).sum(1)
        for group in range(int(groups.max()) + 1):
            nats, values = parts[groups == group, cell], flat[groups == group, cell]
            predictive = [nats[values == value] for value in range(2)]
            assert all((one - one[0]).abs().max() < 1e-9 for one in predictive)
            assert abs(float(sum(one[0].exp() for one in predictive)) - 1) < 1e-9


@torch.no_grad()
def test_orders_and_masks_are_members_of_each_class_and_tokens_follow_the_order():
    gpt = make_prior("gpt", shape=(2, 2), vocab_size=3, any_order=True).double()
    grids = all_grids(gpt.grid)
    given = Given(gpt.columns, {}, len(grids)).over("label")
    whole = gpt.log_prob(grids, condition=given, order="snake", num_orders=3)
    assert abs(float(whole.exp().sum()) - 1) < 1e-9
    orders = torch.stack([torch.randperm(4) for _ in grids])
    parts = gpt.token_log_probs(grids, condition=given, order=orders)
    assert (parts.flatten(1).sum(1) - gpt.log_prob(grids, condition=given, order=orders)).abs().max() < 1e-9
    made = make_prior("made", shape=(2, 2), vocab_size=3, connectivity_agnostic=True).double()
    assert abs(float(made.log_prob(grids, condition=given, num_masks=2).exp().sum()) - 1) < 1e-9


@torch.no_grad()
def test_an_estimate_of_a_bound_has_a_mixture_but_no_parts_of_tokens():
    model = make_prior("masked", exact=False)
    tokens, given = torch.zeros(2, 3, 4, dtype=torch.long), Given(model.columns, {}, 2)
    each = torch.stack([model.log_prob(tokens, [number] * 2) for number in range(3)])
    given = given.over("label")
    assert torch.allclose(model.log_prob(tokens, condition=given), each.logsumexp(0) - math.log(3))
    with pytest.raises(ValueError, match="that of 'masked' is an estimate"):
        model.token_log_probs(tokens, condition=given)


@torch.no_grad()
def test_weights_go_where_rows_go():
    model = make_prior("gpt", conditions=COLUMNS, condition_width=8)
    tokens, weights = draw_tokens(model, 4), torch.rand(4, 3).softmax(1).log()
    given = Given(model.columns, {"view": torch.tensor([0, 1, 2, -1])}, 4).over("label", weights)
    nats = model.log_prob(tokens, condition=given)
    assert given.names == ("view",) and given.terms == ("view", "marginal=label")
    assert torch.allclose(model.log_prob(tokens[[2, 0]], condition=given[[2, 0]]), nats[[2, 0]])
    assert torch.allclose(
        model.log_prob(tokens[1:2].expand(3, -1, -1), condition=given[1:2].expand(3)), nats[1].expand(3)
    )
    twice = model.log_prob(tokens.repeat_interleave(2, 0), condition=given.repeat(2))
    assert torch.allclose(twice, nats.repeat_interleave(2))
    for labels, rows in ((None, given.without(["label"])), (torch.tensor([0, 1, 2, 0]), given)):
        closed = model.log_prob(tokens, labels, condition={"view": given.rows["view"]})
        assert torch.equal(model.log_prob(tokens, labels, condition=rows), closed)


def test_columns_that_cannot_be_left_open_are_refused_in_one_line():
    given = Given({"label": ClassColumn.numbered(3), **COLUMNS}, {"view": torch.zeros(2).long()}, 2)
    many = Given({"label": ClassColumn.numbered(10_000)}, {}, 2)
    cases = [
        (given.without(["view"]).over("view"), "label", None, "'view' is open, too"),
        (given, "age", None, "'age' is a number column"),
        (given, "view", None, "marginal: 'view' is given"),
        (many, "label", None, "10,000 passes"),
        (given, "label", torch.zeros(3), "must sum to one"),
        (given, "label", torch.zeros(4), "log_weights must have the shape (2, 3) or (3,)"),
    ]
    for rows, name, weights, problem in cases:
        with pytest.raises(ValueError, match=re.escape(problem)):
            rows.over(name, weights)
