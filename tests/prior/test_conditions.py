"""Promises of every prior that is conditioned on columns, with every kind of column and every output head.

Covers: prior/conditions.py, prior/base.py, prior/sampling.py, prior/parallel.py.
"""

from dataclasses import replace

import pytest
import torch
from costs import all_steps
from frequencies import as_frequent
from givens.columns import KINDS, draw_condition, make_conditioned, repeat_row, without
from givens.headed import MODELS, MODELS_IN_ORDERS, all_grids, numbers_of
from prior.conditions import Encoded, select_rows
from small import ANY_ORDER, PRIORS, draw_known, draw_tokens, generators

from prior import Prior
from prior.orders import Partition
from prior.pixelcnn_pp import halve
from prior.sampling import choose_by_known, make_batch

CONDITIONED = [name for name in MODELS if name != "marginal"]
every_case = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in CONDITIONED for kind in KINDS])
every_model = pytest.mark.parametrize("name", CONDITIONED)
every_order = pytest.mark.parametrize(
    ("name", "order"), [(name, order) for name, order in MODELS_IN_ORDERS if name in CONDITIONED]
)
LABELS = torch.tensor([0, 3, 1, 2, 3, 1])


def test_every_prior_takes_columns_except_the_marginal():
    kinds = {name: Prior.find(name).Config.takes_conditions for name in PRIORS}
    assert [name for name, takes in kinds.items() if not takes] == ["marginal"]
    with pytest.raises(ValueError, match="marginal is conditioned on classes only") as caught:
        make_conditioned("marginal", "all")
    assert "age" in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.sparse
@every_case
def test_probabilities_sum_to_one_given_any_condition(name, kind):
    model = make_conditioned(name, kind, tiny=True)
    grids, condition = all_grids(model.grid), draw_condition(model, 2, kind)
    densities = []
    for row in range(2):
        rows = repeat_row(condition, row, len(grids))
        with torch.no_grad():
            logits = model(grids, LABELS[row].expand(len(grids)), condition=rows)
            nats = model.log_prob(grids, LABELS[row].expand(len(grids)), condition=rows)
        assert logits.isfinite().all()
        chosen = logits.log_softmax(-1).gather(-1, grids.flatten(1)[..., None]).sum((1, 2))
        assert (nats - chosen).abs().max() < 1e-9
        assert abs(float(nats.exp().sum()) - 1) < 1e-9
        densities.append(nats)
    assert (densities[0] - densities[1]).abs().max() > 1e-4


@pytest.mark.sparse
@every_case
def test_paths_and_batches_draw_the_same_tokens(name, kind):
    """Cached, uncached and parallel, alone and together, with and without guidance and known tokens."""
    model = make_conditioned(name, kind)
    condition, tokens, known = draw_condition(model, 6, kind), draw_tokens(model, 6), draw_known(model, 6, 0.4)
    some = list(condition)[::2]
    for settings in (
        {},
        {"guidance_scale": 2.0, "guidance_on": some},
        {"guidance_scale": 1.5, "guidance_end": 3.0, "temperature": 0.8, "tokens": tokens, "known": known},
    ):
        cached, uncached, parallel = (
            model.sample(6, LABELS, condition=condition, generator=generators(6), **settings, **path)
            for path in ({}, {"cache": False}, {"parallel": True})
        )
        assert torch.equal(cached, uncached), settings
        assert torch.equal(cached, parallel), settings
        assert "known" not in settings or torch.equal(cached[known], tokens[known])
        own = {key: value[4:5] if key in ("tokens", "known") else value for key, value in settings.items()}
        alone = {column: values[4:5] for column, values in condition.items()}
        single = model.sample(1, LABELS[4:5], condition=alone, generator=generators(6)[4:5], **own)
        assert torch.equal(cached[4:5], single), settings


@pytest.mark.sparse
@every_case
def test_step_logits_equal_forward_logits(name, kind):
    model = make_conditioned(name, kind)
    tokens, condition = draw_tokens(model, 4), draw_condition(model, 4, kind)
    with torch.no_grad():
        whole = model(tokens, LABELS[:4], condition=condition)
        steps = all_steps(model, tokens, model.encode_condition(LABELS[:4], 4, condition))
    assert whole.isfinite().all()
    assert (steps - whole[:, model.order]).abs().max() < 1e-9


@pytest.mark.sparse
@every_order
def test_step_logits_equal_forward_logits_in_every_order(name, order):
    model = make_conditioned(name, "all", order)
    tokens, condition = draw_tokens(model, 4), draw_condition(model, 4, "some null")
    with torch.no_grad():
        given = model.encode_condition(LABELS[:4], 4, condition)
        whole, steps = model(tokens, given), all_steps(model, tokens, given)
    assert (steps - whole[:, model.order]).abs().max() < 1e-9


@pytest.mark.sparse
@every_case
def test_guidance_is_the_formula_on_two_passes_and_removes_what_it_names(name, kind):
    model = make_conditioned(name, kind)
    condition = draw_condition(model, 6, kind)
    names, null = list(condition), torch.full_like(LABELS, 3)
    cases = [(None, null, names), (names[:1], LABELS, names[:1]), (["label", *names[1:]], null, names[1:])]
    for removed, labels, nulls in cases:
        guide = {"guidance_scale": 3.0, "guidance_on": removed, "temperature": 0.0}
        drawn = model.sample(6, LABELS, condition=condition, generator=generators(6), **guide)
        with torch.no_grad():
            given = model(drawn, LABELS, condition=condition)
            less = model(drawn, labels, condition=without(model, condition, *nulls))
        guided = less + 3.0 * (given - less)
        assert guided.isfinite().all() and (guided - given).abs().max() > 1e-4
        assert torch.equal(guided.argmax(-1).view_as(drawn), drawn), removed


@pytest.mark.sparse
@every_case
def test_missing_columns_are_null_and_each_column_matters(name, kind):
    model = make_conditioned(name, kind)
    tokens, condition = draw_tokens(model, 6), draw_condition(model, 6, "all")
    with torch.no_grad():
        missing = model.log_prob(tokens, LABELS)
        nulls = without(model, condition, *condition)
        assert torch.equal(model(tokens, LABELS), model(tokens, LABELS, condition=nulls))
        for absent in ({}, nulls, dict.fromkeys(condition)):
            assert torch.equal(model.log_prob(tokens, LABELS, condition=absent), missing)
        every, others = model.log_prob(tokens, LABELS, condition=condition), draw_condition(model, 6, "all")
        for column in condition:
            for changed in (without(model, condition, column), {**condition, column: others[column]}):
                moved = (model.log_prob(tokens, LABELS, condition=changed) - every).abs()
                assert moved.max() > 1e-5, column
            rest = {other: values for other, values in condition.items() if other != column}
            less = model.log_prob(tokens, LABELS, condition=without(model, condition, column))
            assert torch.equal(model.log_prob(tokens, LABELS, condition=rest), less)


@pytest.mark.sparse
@every_case
def test_logits_see_earlier_blocks_and_the_whole_condition(name, kind):
    """Changing a token moves the logits that `receptive_field` says; changing one cell of a grid may move any."""
    model = make_conditioned(name, kind)
    tokens, condition, size = draw_tokens(model, 12), draw_condition(model, 12, kind), len(model.grid)
    given = model.encode_condition(LABELS.repeat(2), 12, condition)
    with torch.no_grad():
        before, moved = model(tokens, given), torch.zeros(size, size, dtype=torch.bool)
        for at in range(size):
            changed = tokens.flatten(1).clone()
            changed[:, at] = (changed[:, at] + 1) % model.grid.vocab_size
            moved[:, at] = (model(changed.view_as(tokens), given) - before).abs().amax((0, 2)) > 1e-13
        assert not (moved & ~model.receptive_field).any()
        assert moved.any() or size == 1
        for column in condition:
            less = model(tokens, LABELS.repeat(2), condition=without(model, condition, column))
            heard = (less - before).abs().amax((0, 2)) > 1e-9
            assert heard.all(), f"{column} does not reach {torch.nonzero(~heard).flatten().tolist()}"


@every_model
def test_the_map_is_added_at_the_position_that_is_predicted(name):
    """A position's vector moves its own logits, and none of earlier blocks unless streams see to the right."""
    model = make_conditioned(name, "grid same")
    tokens, blocks, several = draw_tokens(model, 3), model.position_block_of, model.output_head.ids_per_position > 1
    with torch.no_grad():
        given = model.encode_condition(LABELS[:3], 3, draw_condition(model, 3, "all"))
        before = model(tokens, given)
        for at in range(len(blocks)):
            changed = given.map.clone()
            changed[:, at] += torch.randn(3, given.map.shape[-1])
            moved = (model(tokens, replace(given, map=changed)) - before).abs().amax((0, 2)) > 1e-12
            moved = moved[model.position_cells].any(1) if several else moved
            assert moved[at]
            if name.partition(",")[0] not in ("masked", "gated_pixelcnn", "pixelcnn_pp"):
                assert not moved[blocks < blocks[at]].any()
            if "made" in name:
                assert int(moved.sum()) == 1


def test_coarser_stages_of_pixelcnn_pp_see_every_other_row_and_column():
    at = torch.arange(15.0)[None, :, None]
    assert halve(Encoded(LABELS[:1], at[:, 0], at), 5).map.flatten().tolist() == [0, 2, 4, 10, 12, 14]


@pytest.mark.sparse
@every_case
def test_frequencies_match_the_conditional_density(name, kind):
    if name.endswith("logistic"):
        pytest.skip("three channels of 16 values have too many grids to count")
    model = make_conditioned(name, kind, tiny=True)
    grids, condition = all_grids(model.grid), draw_condition(model, 1, kind)
    label = torch.ones(2500).long()
    with torch.no_grad():
        expected = model.log_prob(grids, label[: len(grids)], condition=repeat_row(condition, 0, len(grids))).exp()
    one = {column: values[0] for column, values in condition.items()}  # one value for all images
    drawn = model.float().sample(2500, label, condition=one, generator=torch.Generator().manual_seed(5))
    assert as_frequent(numbers_of(drawn, model.grid), expected)


# Orders and masks


@pytest.mark.sparse
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ANY_ORDER))
def test_any_order_and_mixtures_are_densities_and_paths_agree(name, kind):
    model = make_conditioned(name, kind, tiny=True, **ANY_ORDER[name])
    grids, condition = all_grids(model.grid), draw_condition(model, 3, kind)
    rows, size = repeat_row(condition, 1, len(grids)), len(model.grid)
    with torch.no_grad():
        for order in ({"order": "snake"}, {"num_orders": 3}, {"order": torch.randperm(size)}):
            assert abs(float(model.log_prob(grids, condition=rows, **order).exp().sum()) - 1) < 1e-9
    orders = torch.stack([torch.randperm(size) for _ in range(3)])
    tokens, known = draw_tokens(model, 3), draw_known(model, 3, 0.3)
    with torch.no_grad():
        given = model.encode_condition(LABELS[:3], 3, condition)
        each = [model.token_log_probs(tokens[k : k + 1], given[k : k + 1], order=orders[k : k + 1]) for k in range(3)]
        assert (torch.cat(each) - model.token_log_probs(tokens, given, order=orders)).abs().max() < 1e-9
    for settings in ({"order": orders}, {"order": "column"}, {"num_orders": 3, "tokens": tokens, "known": known}):
        drawn = [
            model.sample(3, LABELS[:3], condition=condition, generator=generators(3), guidance_scale=2, **settings, **p)
            for p in ({}, {"cache": False}, {"parallel": True})
        ]
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2]), settings


@pytest.mark.parametrize("kind", ["grid multiple", "all"])
@pytest.mark.parametrize("name", ["blocks", "masked"])
def test_blocks_of_a_request_are_densities(name, kind):
    model = make_conditioned(name, kind, "rows", tiny=True, **ANY_ORDER[name])
    grids, condition = all_grids(model.grid), draw_condition(model, 3, kind)
    tokens, given = draw_tokens(model, 3), model.encode_condition(None, 3, condition)
    orders = torch.stack([torch.randperm(6) for _ in range(3)])
    for order in (None, "diagonal", Partition(orders[0], (1, 3, 2)), Partition(orders, (1, 3, 2))):
        path = model.to_partition(order)
        with torch.no_grad():
            whole = model(tokens, given, **model.order_inputs(path))
            whole = whole.take_along_dim(path.order.expand(3, -1)[..., None], 1)
            assert (all_steps(model, tokens, given, order) - whole).abs().max() < 1e-9
            if path.order.ndim == 1:
                rows = repeat_row(condition, 0, len(grids))
                assert abs(float(model.log_prob(grids, order=order, condition=rows).exp().sum()) - 1) < 1e-9


def test_orders_are_chosen_in_proportion_to_known_tokens_given_the_condition():
    model = make_conditioned("gpt", "grid same", **ANY_ORDER["gpt"])
    known, tokens = draw_known(model, 1, 0.5).expand(100, -1, -1), draw_tokens(model, 1).expand(100, -1, -1)
    candidates = torch.stack([torch.randperm(len(model.grid)) for _ in range(2)])[:, None].expand(-1, 100, -1)
    chosen = []
    for _ in range(2):
        one = repeat_row(draw_condition(model, 1, "all"), 0, 100)
        batch = make_batch(model, 100, None, one, model.Sampling(), generators(100), tokens, known)
        with torch.no_grad():
            chosen.append(choose_by_known(model, batch, candidates, model.blocks))
    assert not torch.equal(*chosen)


@pytest.mark.parametrize("kind", ["numbers", "grid multiple", "some null"])
def test_masks_of_made(kind):
    model = make_conditioned("made", kind, tiny=True, connectivity_agnostic=True, hidden=(24, 20))
    grids, condition = all_grids(model.grid), draw_condition(model, 4, kind)
    with torch.no_grad():
        rows = repeat_row(condition, 0, len(grids))
        assert abs(float(model.log_prob(grids, num_masks=3, condition=rows).exp().sum()) - 1) < 1e-9
    drawn = [
        model.sample(4, condition=condition, generator=generators(4), num_masks=3, guidance_scale=2.0, **path)
        for path in ({}, {"cache": False}, {"parallel": True})
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    alone = model.sample(
        1, condition=select_rows(condition, [2]), generator=generators(4)[2], num_masks=3, guidance_scale=2.0
    )
    assert torch.equal(drawn[0][2:3], alone)


@pytest.mark.parametrize("settings", [{"steps": 3}, {"steps": 4, "confidence_temperature": 0.0}, {"exact": False}])
def test_schedules_and_bounds_of_masked(settings):
    model = make_conditioned("masked", "all")
    model.exact = settings.get("exact", True)
    condition, tokens = draw_condition(model, 4, "all"), draw_tokens(model, 4)
    settings = {key: value for key, value in settings.items() if key != "exact"}
    plain, guided = (
        model.sample(4, condition=condition, generator=generators(4), guidance_scale=scale, **settings)
        for scale in (1.0, 5.0)
    )
    assert not torch.equal(plain, guided)
    with torch.no_grad():
        assert (model.log_prob(tokens, condition=condition) - model.log_prob(tokens)).abs().min() > 1e-6


# Training and precision


@every_model
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_every_weight_of_the_encoder_learns(name, bf16):
    """Also under autocast."""
    model = make_conditioned(name, "all").float().train()
    tokens, condition = draw_tokens(model, 6), draw_condition(model, 6, "all")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(tokens, LABELS, condition=condition)
    assert loss.isfinite()
    loss.backward()
    still = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not [key for key in still if "condition_encoder" in key or "columns" in key]


@every_model
def test_weights_may_be_bfloat16(name):
    model = make_conditioned(name, "all").bfloat16()
    condition = draw_condition(model, 4, "some null")
    for path in ({}, {"cache": False}, {"parallel": True}):
        drawn = model.sample(4, condition=condition, guidance_scale=2.0, generator=generators(4), **path)
        assert drawn.min() >= 0 and drawn.max() < model.grid.vocab_size
    assert model.log_prob(drawn, condition=condition).isfinite().all()


@every_model
def test_save_load_and_features(name, tmp_path):
    model = make_conditioned(name, "all").float()
    tokens, condition = draw_tokens(model, 3), draw_condition(model, 3, "all")
    model.save_pretrained(tmp_path / "prior")
    loaded = Prior.from_pretrained(tmp_path / "prior")
    assert loaded.conditions == model.conditions and loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded(tokens, condition=condition), model(tokens, condition=condition))
    given, null = model.features(tokens, condition=condition), model.features(tokens)
    assert given.shape == null.shape and not torch.equal(given, null)
    empty = {column: values[:0] for column, values in condition.items()}
    assert model.log_prob(tokens[:0], condition=empty).shape == (0,)
