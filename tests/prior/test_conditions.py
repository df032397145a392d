"""Promises of every prior that is conditioned on columns, with every kind of column and every output head."""

import pytest
import torch
from costs import all_steps
from frequencies import as_frequent
from givens.columns import KINDS, draw_given, make_conditioned
from givens.headed import MODELS, MODELS_IN_ORDERS, all_grids, numbers_of
from small import ANY_ORDER, PRIORS, draw_known, draw_tokens, generators

from prior import Prior
from prior.sampling import choose_by_known, make_batch

CONDITIONED = [name for name in MODELS if name != "marginal"]
every_case = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in CONDITIONED for kind in KINDS])
every_model = pytest.mark.parametrize("name", CONDITIONED)
IN_ORDERS = [(name, order, "some null") for name, order in MODELS_IN_ORDERS if name in CONDITIONED]
LABELS = torch.tensor([0, 3, 1, 2, 3, 1])
"""Of six images, two of them without a class."""


def others_of(given):
    """The names of the columns besides the class."""
    return [name for name in given.columns if name != "label"]


def test_every_prior_takes_columns_except_the_marginal():
    kinds = {name: Prior.find(name).Config.takes_conditions for name in PRIORS}
    assert [name for name, takes in kinds.items() if not takes] == ["marginal"]
    with pytest.raises(ValueError, match="marginal is conditioned on classes only"):
        make_conditioned("marginal", "all")


@pytest.mark.sparse
@every_case
def test_probabilities_sum_to_one_given_any_condition(name, kind):
    model = make_conditioned(name, kind, tiny=True)
    grids = all_grids(model.grid)
    rows = draw_given(model, 1, kind, LABELS[:1]).expand(len(grids))
    with torch.no_grad():
        logits, nats = model(grids, model.encode_given(rows)), model.log_prob(grids, condition=rows)
    chosen = logits.log_softmax(-1).gather(-1, grids.flatten(1)[..., None]).sum((1, 2))
    assert (nats - chosen).abs().max() < 1e-9 and abs(float(nats.exp().sum()) - 1) < 1e-9


@pytest.mark.sparse
@every_case
def test_paths_and_batches_draw_the_same_tokens(name, kind):
    """Cached, uncached and parallel, alone and together, with and without guidance and known tokens."""
    model = make_conditioned(name, kind)
    given, tokens, known = draw_given(model, 6, kind, LABELS), draw_tokens(model, 6), draw_known(model, 6, 0.4)
    some = others_of(given)[::2]
    for settings in (
        {},
        {"guidance_scale": 2.0, "guidance_on": some},
        {"guidance_scale": 1.5, "guidance_end": 3.0, "temperature": 0.8, "tokens": tokens, "known": known},
    ):
        cached, uncached, parallel = (
            model.sample(6, condition=given, generator=generators(6), **settings, **path)
            for path in ({}, {"cache": False}, {"parallel": True})
        )
        assert torch.equal(cached, uncached), settings
        assert torch.equal(cached, parallel), settings
        assert "known" not in settings or torch.equal(cached[known], tokens[known])
        own = {key: value[4:5] if key in ("tokens", "known") else value for key, value in settings.items()}
        single = model.sample(1, condition=given[4:5], generator=generators(6)[4:5], **own)
        assert torch.equal(cached[4:5], single), settings


@pytest.mark.sparse
@pytest.mark.parametrize(
    ("name", "order", "kind"), [*((name, "raster", kind) for name in CONDITIONED for kind in KINDS), *IN_ORDERS]
)
def test_step_logits_equal_forward_logits(name, order, kind):
    model = make_conditioned(name, kind, order)
    tokens, given = draw_tokens(model, 4), draw_given(model, 4, kind, LABELS[:4])
    with torch.no_grad():
        whole, steps = model(tokens, model.encode_given(given)), all_steps(model, tokens, condition=given)
    assert whole.isfinite().all()
    assert (steps - whole[:, model.order]).abs().max() < 1e-9


@pytest.mark.sparse
@every_case
def test_guidance_is_the_formula_on_two_passes_and_removes_what_it_names(name, kind):
    model = make_conditioned(name, kind)
    given = draw_given(model, 6, kind, LABELS)
    names = others_of(given)
    for removed in (None, names[:1], ["label", *names[1:]]):
        guide = {"guidance_scale": 3.0, "guidance_on": removed, "temperature": 0.0}
        drawn = model.sample(6, condition=given, generator=generators(6), **guide)
        with torch.no_grad():
            with_all = model(drawn, model.encode_given(given))
            less = model(drawn, model.encode_given(given.without(removed)))
        guided = less + 3.0 * (with_all - less)
        assert guided.isfinite().all() and (guided - with_all).abs().max() > 1e-4
        assert torch.equal(guided.argmax(-1).view_as(drawn), drawn), removed


@pytest.mark.sparse
@every_case
def test_missing_columns_are_null_and_each_column_matters(name, kind):
    model = make_conditioned(name, kind)
    tokens, given = draw_tokens(model, 6), draw_given(model, 6, "all", LABELS)
    names, other = others_of(given), draw_given(model, 6, "all")
    nulls = {name: model.columns[name].null(6) for name in names}
    with torch.no_grad():
        missing = model.log_prob(tokens, LABELS)
        for absent in ({}, nulls, dict.fromkeys(names), given.without(names).without(["label"])):
            assert torch.equal(model.log_prob(tokens, LABELS, condition=absent), missing)
        every = model.log_prob(tokens, condition=given)
        for column in names:
            less = model.log_prob(tokens, condition=given.without([column]))
            for found in (less, model.log_prob(tokens, condition=given.with_rows(**{column: other.rows[column]}))):
                assert (found - every).abs().max() > 1e-5, column
            null = given.with_rows(**{column: nulls[column]})
            assert torch.equal(model.log_prob(tokens, condition=null), less)


@pytest.mark.sparse
@every_case
def test_logits_see_earlier_blocks_and_the_whole_condition(name, kind):
    """Changing a token moves the logits that `receptive_field` says; changing one cell of a grid may move any."""
    model = make_conditioned(name, kind)
    tokens, given, size = draw_tokens(model, 12), draw_given(model, 12, kind, LABELS.repeat(2)), len(model.grid)
    with torch.no_grad():
        encoded = model.encode_given(given)
        before, moved = model(tokens, encoded), torch.zeros(size, size, dtype=torch.bool)
        for at in range(size):
            changed = tokens.flatten(1).clone()
            changed[:, at] = (changed[:, at] + 1) % model.grid.vocab_size
            moved[:, at] = (model(changed.view_as(tokens), encoded) - before).abs().amax((0, 2)) > 1e-13
        assert not (moved & ~model.receptive_field).any()
        assert moved.any() or size == 1
        for column in given.names:
            less = model(tokens, model.encode_given(given.without([column])))
            heard = (less - before).abs().amax((0, 2)) > 1e-9
            assert heard.all(), f"{column} does not reach {torch.nonzero(~heard).flatten().tolist()}"


@pytest.mark.sparse
@every_case
def test_frequencies_match_the_conditional_density(name, kind):
    if name.endswith("logistic"):
        pytest.skip("three channels of 16 values have too many grids to count")
    model = make_conditioned(name, kind, tiny=True)
    grids, given = all_grids(model.grid), draw_given(model, 1, kind, [1])
    with torch.no_grad():
        expected = model.log_prob(grids, condition=given.expand(len(grids))).exp()
    one = {column: rows[0] for column, rows in given.rows.items() if column != "label"}  # one value for all images
    generator = torch.Generator().manual_seed(5)
    drawn = model.float().sample(2500, torch.ones(2500).long(), condition=one, generator=generator)
    assert as_frequent(numbers_of(drawn, model.grid), expected)


@pytest.mark.sparse
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ANY_ORDER))
def test_any_order_and_mixtures_are_densities_and_paths_agree(name, kind):
    model = make_conditioned(name, kind, tiny=True, **ANY_ORDER[name])
    grids, given = all_grids(model.grid), draw_given(model, 3, kind, LABELS[:3])
    rows, size = given.without(["label"])[1:2].expand(len(grids)), len(model.grid)
    with torch.no_grad():
        for order in ({"order": "snake"}, {"num_orders": 3}, {"order": torch.randperm(size)}):
            assert abs(float(model.log_prob(grids, condition=rows, **order).exp().sum()) - 1) < 1e-9
    orders = torch.stack([torch.randperm(size) for _ in range(3)])
    tokens, known = draw_tokens(model, 3), draw_known(model, 3, 0.3)
    with torch.no_grad():
        together = model.token_log_probs(tokens, condition=given, order=orders)
        for row, at in enumerate(torch.arange(3)[:, None]):
            alone = model.token_log_probs(tokens[at], condition=given[at], order=orders[at])
            assert (alone[0] - together[row]).abs().max() < 1e-9
    for settings in ({"order": orders}, {"order": "column"}, {"num_orders": 3, "tokens": tokens, "known": known}):
        drawn = [
            model.sample(3, condition=given, generator=generators(3), guidance_scale=2, **settings, **path)
            for path in ({}, {"cache": False}, {"parallel": True})
        ]
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2]), settings


def test_orders_are_chosen_in_proportion_to_known_tokens_given_the_condition():
    model = make_conditioned("gpt", "grid same", **ANY_ORDER["gpt"])
    known, tokens = draw_known(model, 1, 0.5), draw_tokens(model, 1)
    candidates = torch.stack([torch.randperm(len(model.grid)) for _ in range(2)])[:, None].expand(-1, 100, -1)
    chosen = []
    for one in (draw_given(model, 1, "all") for _ in range(2)):
        batch = make_batch(model, one.expand(100), model.Sampling(), generators(100), tokens[0], known[0])
        with torch.no_grad():
            chosen.append(choose_by_known(model, batch, candidates, model.blocks))
    assert not torch.equal(*chosen)


@pytest.mark.sparse
@every_model
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_every_weight_of_the_encoder_learns(name, bf16):
    """Also under autocast."""
    model = make_conditioned(name, "all").float().train()
    tokens, given = draw_tokens(model, 6), draw_given(model, 6, "all", LABELS)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(tokens, condition=given)
    assert loss.isfinite()
    loss.backward()
    still = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not [key for key in still if "condition_encoder" in key or "columns" in key]
