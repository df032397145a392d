"""The masked autoencoder: logits as in its paper, masks, densities, running sums, mixtures."""

from __future__ import annotations

import itertools

import pytest
import torch
from costs import all_steps
from frequencies import as_frequent
from givens.headed import all_grids, numbers_of
from givens.made_variants import (
    by_the_paper,
    earlier,
    every_variant,
    keep_awake,
    make_made,
    make_same,
    some_orders,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small import draw_tokens, generators, logits_of, make_prior, moved_by

from pipelines import ImagePipeline
from prior.made import even_degrees, random_degrees
from tokenizer import Tokenizer

examples = settings(deadline=None, max_examples=60, derandomize=True)


@every_variant
def test_logits_are_those_of_the_paper(variant):
    model = make_made(variant, shape=(2, 3), order="random:2", num_classes=2, order_agnostic=True).double()
    tokens, labels = draw_tokens(model, 4), torch.tensor([0, 1, 2, 2])
    order, degrees = torch.tensor([3, 0, 5, 1, 4, 2]), random_degrees(model.config.hidden, 6)
    with torch.no_grad():
        for k, inputs in enumerate(({}, {"order": order, "degrees": degrees})):
            connections = (inputs.get("order", model.order), inputs.get("degrees", model.degrees()))
            expected = by_the_paper(model, tokens[k], int(labels[k]), *connections)
            assert (logits_of(model, tokens, labels, **inputs)[k] - expected).abs().max() < 1e-10


@pytest.mark.sparse
@every_variant
@some_orders
def test_later_logits_see_all_that_the_receptive_field_says(variant, order):
    model = make_made(variant, order=order).double()
    if "narrow" in variant:  # so few units must not rest
        keep_awake(model)
    moved = moved_by(model, draw_tokens(model, 64), torch.arange(64) % 4)
    if variant == "narrow":
        assert model.receptive_field.dtype == torch.bool
        assert not model.receptive_field.equal(earlier(model.order))
        assert moved.equal(model.receptive_field)
    else:
        assert moved.equal(earlier(model.order)) and moved.equal(model.receptive_field)


def test_training_draws_orders_and_degrees_from_the_seed_and_each_is_another_density():
    model = make_prior(
        "made", shape=(2, 3), vocab_size=3, hidden=(40, 30), order_agnostic=True, connectivity_agnostic=True
    ).double()
    grids, found = all_grids(model.grid), []
    for seed in (0, 1, 2, 0):
        torch.manual_seed(seed)
        drawn = model.training_inputs(grids, 0.5)
        log_probs = model(grids, **drawn).detach().log_softmax(-1).gather(-1, grids.reshape(-1, 6, 1)).sum((1, 2))
        assert not moved_by(model, grids[::7], None, **drawn)[~earlier(drawn["order"])].any()
        for fewer in ({"order": drawn["order"]}, {"degrees": drawn["degrees"]}):
            assert not torch.allclose(model(grids, **fewer), model(grids), atol=1e-2)
        found.append(log_probs)
    assert torch.equal(found[0], found[3])
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in itertools.combinations(found[:3], 2))


def test_stored_masks_are_those_of_the_order_the_degrees_and_the_type():
    model, tokens = make_made("three layers", order_agnostic=True, connectivity_agnostic=True), torch.zeros(2, 3, 4)
    tokens, drawn = tokens.long(), model.training_inputs(tokens, 0.5)
    with torch.inference_mode():
        model(tokens)
    for inputs in ({}, {"order": drawn["order"]}, {"degrees": drawn["degrees"]}, {}):
        found = model.train()(tokens, **inputs)
        found.sum().backward()  # through masks that were made in inference mode, too
        assert torch.equal(found, make_same(model).train()(tokens, **inputs))
    assert model.double()(tokens).dtype == torch.float64


@examples
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 30))
def test_even_degrees_occur_equally_often_and_random_ones_leave_no_unit_blind(hidden, size):
    even = even_degrees(hidden[0], size)
    assert even.shape == (hidden[0],) and even.equal(even.sort().values)
    assert even.min() >= 1 and even.max() == max(1, size - 1)
    counts = even.bincount(minlength=size)[1:]
    assert size == 1 or counts.max() - counts.min() <= 1
    degrees = random_degrees(hidden, size)
    assert [len(each) for each in degrees] == hidden
    assert all(each.min() >= 1 and each.max() <= max(1, size - 1) for each in degrees)
    assert all(own.min() >= below.min() for below, own in itertools.pairwise(degrees))


@pytest.mark.sparse
@every_variant
@pytest.mark.parametrize(
    ("walk", "number"), [("its own", 0), ("another", 0), ("each its own", 0), ("its own", 1), ("each its own", 2)]
)
def test_steps_equal_a_whole_pass(variant, walk, number):
    """In the model's own connectivity, and in others that are drawn."""
    model = make_made(variant, order="snake", order_agnostic=True, connectivity_agnostic=True).double()
    tokens, labels = draw_tokens(model, 5), torch.arange(5) % 4
    orders = torch.rand(5, 12).argsort(1)
    given = {"its own": None, "another": orders[0], "each its own": orders}[walk]
    path = (model.order if given is None else given).expand(5, 12)
    for rows in (5, 1):
        order = given if given is None or given.ndim == 1 else given[:rows]
        with torch.no_grad(), model.connected(number):
            whole = logits_of(model, tokens[:rows], labels[:rows], order=order)
            steps, images = all_steps(model, tokens[:rows], labels[:rows], order), torch.arange(rows)[:, None]
            assert (steps - whole[images, path[:rows]]).abs().max() < 1e-9
        assert number == 0 or not torch.allclose(logits_of(model, tokens[:rows], labels[:rows], order=order), whole)


ENSEMBLES = {
    "masks, two ids": {"hidden": (7, 6), "vocab_size": 2, "connectivity_agnostic": True, "direct": True},
    "orders and masks": {"hidden": (7,), "vocab_size": 2, "connectivity_agnostic": True, "order_agnostic": True},
}


def make_ensemble(name):
    torch.manual_seed(5)
    model = make_prior("made", **{"shape": (2, 2), "vocab_size": 3, "num_classes": 2, **ENSEMBLES[name]})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the members differ much
    return model, all_grids(model.grid), {"num_orders": 3 if model.any_order else 1, "num_masks": 4}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_mixture_of_orders_and_masks_is_the_mean_of_its_members_and_its_samples_follow_it(name):
    model, grids, mixture = make_ensemble(name)
    labels, members = torch.ones(len(grids), dtype=torch.long), []
    with torch.no_grad():
        mixed, own = model.log_prob(grids, labels, **mixture).exp(), model.log_prob(grids, labels).exp()
        for number, order in itertools.product(range(4), model.orders(mixture["num_orders"])):
            given_ = {"order": model.to_partition(order).order, "degrees": model.numbered_degrees(number)}
            log_probs = logits_of(model, grids, labels, **given_).log_softmax(-1).gather(-1, grids.reshape(-1, 4, 1))
            members.append(log_probs.sum((1, 2)).exp())
    assert abs(float(mixed.sum()) - 1) < 1e-5
    torch.testing.assert_close(mixed, torch.stack(members).mean(0), rtol=1e-4, atol=1e-6)
    assert torch.stack(members).std(0).max() > 0.02, "too little to test anything"
    drawn = model.sample(6000, torch.ones(6000).long(), generator=torch.Generator().manual_seed(1), **mixture)
    found = numbers_of(drawn, model.grid)
    assert as_frequent(found, mixed) and not as_frequent(found, own)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_image_of_a_mixture_depends_on_its_generator_alone(name):
    model, _, mixture = make_ensemble(name)
    labels, known = torch.arange(12) % 3, torch.tensor([[True, False], [False, True]])
    drawn = model.sample(12, labels, generator=generators(12), **mixture)
    for more in ({"cache": False}, {"parallel": True}):
        assert torch.equal(model.sample(12, labels, generator=generators(12), **mixture, **more), drawn)
    assert torch.equal(model.sample(1, labels[[5]], generator=[generators(12)[5]], **mixture)[0], drawn[5])
    found = model.sample(12, labels, generator=generators(12), tokens=drawn[0], known=known, **mixture)
    assert (found[:, known] == drawn[0][known]).all() and model.degrees()[0].equal(even_degrees(7, 4))


def test_a_pipeline_scores_and_draws_a_mixture_of_masks():
    pixels = Tokenizer.create("pixels", image_size=(4, 4), channels=1, levels=2).eval()
    prior = make_prior("made", grid=pixels.grid, num_classes=0, connectivity_agnostic=True)
    pipe, images = ImagePipeline(pixels, prior), torch.rand(3, 1, 4, 4) * 2 - 1
    scores = pipe.log_prob(images, num_masks=3, batch_size=2)
    assert scores.tolist() == pytest.approx(prior.log_prob(pipe.encode(images), num_masks=3).tolist(), abs=1e-4)
    drawn = pipe(9, seed=0, num_masks=3, batch_size=4, progress=False).tokens
    assert torch.equal(drawn, prior.sample(9, generator=generators(9, 0), num_masks=3))
