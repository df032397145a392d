"""Ensembles of orders and connectivities: a mixture is a density, and its samples have its frequencies."""

import itertools

import pytest
import torch
from costs import all_steps
from frequencies import as_frequent
from givens.made_variants import by_the_paper, every_variant, make_made
from small import draw_tokens, generators, make_prior

from pipelines import ImagePipeline
from prior.masks import even_degrees
from prior.orders import make_order
from tokenizer import Tokenizer

ENSEMBLES = {
    "masks": {"hidden": (7, 6), "connectivity_agnostic": True},
    "masks, two ids": {"hidden": (7, 6), "vocab_size": 2, "connectivity_agnostic": True, "direct": True},
    "orders and masks": {"hidden": (7,), "vocab_size": 2, "connectivity_agnostic": True, "order_agnostic": True},
}


def make_ensemble(name, **config):
    torch.manual_seed(5)
    config = {"shape": (2, 2), "vocab_size": 3, "num_classes": 2, **ENSEMBLES[name], **config}
    model, orders = make_prior("made", **config), 3 if config.get("order_agnostic") else 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that its members are far apart
    grids = torch.tensor(list(itertools.product(range(config["vocab_size"]), repeat=4))).reshape(-1, 2, 2)
    return model, grids, {"num_orders": orders, "num_masks": 4}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_mixture_of_orders_and_masks_is_a_density(name):
    model, grids, mixture = make_ensemble(name)
    model, labels = model.double(), torch.ones(len(grids), dtype=torch.long)
    with torch.no_grad():
        mixed = model.log_prob(grids, labels, **mixture).exp()
        assert abs(float(mixed.sum()) - 1) < 1e-5
        members = []
        for number in range(4):  # each as the paper has it
            degrees = model.numbered_degrees(number)
            for order in model.orders(mixture["num_orders"]):
                walk = model.order if order is None else make_order(order, (2, 2))
                logits = torch.stack([by_the_paper(model, grid, 1, walk, degrees) for grid in grids])
                each = logits.log_softmax(-1).gather(-1, grids.reshape(-1, 4, 1)).sum((1, 2))
                members.append(each.exp())
        assert torch.allclose(mixed.double(), torch.stack(members).mean(0), atol=1e-6)
        assert torch.stack(members).std(0).max() > 0.02, "the members are to differ"
        assert torch.equal(model.log_prob(grids, labels), model.log_prob(grids, labels, num_masks=1))


@pytest.mark.parametrize("name", ENSEMBLES)
def test_samples_of_a_mixture_have_its_frequencies(name):
    model, grids, mixture = make_ensemble(name)
    count, labels = 6000, torch.ones(6000, dtype=torch.long)
    drawn = model.sample(count, labels, generator=torch.Generator().manual_seed(1), **mixture)
    base = model.grid.vocab_size ** torch.arange(3, -1, -1)
    with torch.no_grad():
        expected = model.log_prob(grids, labels[: len(grids)], **mixture).exp()
        own = model.log_prob(grids, labels[: len(grids)]).exp()
    found = (drawn.flatten(1) * base).sum(1)
    assert as_frequent(found, expected) and not as_frequent(found, own)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_image_of_a_mixture_depends_on_its_generator_alone(name):
    model, _, mixture = make_ensemble(name)
    labels, many = torch.arange(12) % 3, {"num_masks": 3, "num_orders": mixture["num_orders"]}
    drawn = model.sample(12, labels, generator=generators(12), **many)
    for more in ({"cache": False}, {"parallel": True}):
        assert torch.equal(model.sample(12, labels, generator=generators(12), **many, **more), drawn)
    for k in (0, 5, 11):
        assert torch.equal(model.sample(1, labels[[k]], generator=[generators(12)[k]], **many)[0], drawn[k])
    known = torch.tensor([[True, False], [False, True]])
    kept = model.sample(12, labels, generator=generators(12), tokens=drawn[0], known=known, **many)
    assert (kept[:, known] == drawn[0][known]).all() and model.degrees()[0].equal(even_degrees(7, 4))


@pytest.mark.sparse
@pytest.mark.parametrize("walk", ["its own", "each its own"])
@pytest.mark.parametrize("number", [0, 1, 2])
@every_variant
def test_steps_of_a_drawn_connectivity_equal_a_whole_pass(variant, walk, number):
    model = make_made(variant, order="snake", order_agnostic=True, connectivity_agnostic=True).double()
    tokens, labels = draw_tokens(model, 5), torch.arange(5) % 4
    order = torch.rand(5, 12).argsort(1) if walk == "each its own" else None
    path = (model.order if order is None else order).expand(5, 12)
    with torch.no_grad(), model.connected(number):
        whole = model(tokens, labels, order=order)
        steps = all_steps(model, tokens, labels, order)
        assert (steps - whole[torch.arange(5)[:, None], path]).abs().max() < 1e-9
    assert number == 0 or not torch.allclose(model(tokens, labels, order=order), whole)


def test_a_finite_set_of_masks_is_that_of_the_mixture():
    model = make_prior("made", hidden=(20, 30), order_agnostic=True, connectivity_agnostic=True, masks=3)
    tokens, drawn = draw_tokens(model, 2), []
    for seed in range(60):
        torch.manual_seed(seed)
        drawn.append(model.training_inputs(tokens, 0.3))
    orders = {tuple(each["order"].tolist()) for each in drawn}
    degrees = {tuple(torch.cat(each["degrees"]).tolist()) for each in drawn}
    names = [model.order, *(make_order(name, (3, 4)) for name in model.orders(3)[1:])]
    assert orders == {tuple(order.tolist()) for order in names}
    assert degrees == {tuple(torch.cat(model.numbered_degrees(number)).tolist()) for number in range(3)}
    assert len({(tuple(each["order"].tolist()), int(each["degrees"][0].sum())) for each in drawn}) == 9


def test_a_pipeline_scores_and_draws_a_mixture_of_masks():
    pixels = Tokenizer.create("pixels", image_size=(4, 4), channels=1, levels=2).eval()
    prior = make_prior(
        "made", shape=(4, 4), vocab_size=2, num_classes=0, connectivity_agnostic=True, tokenizer=pixels.fingerprint()
    )
    pipe, images = ImagePipeline(pixels, prior), torch.rand(3, 1, 4, 4) * 2 - 1
    scores = pipe.log_prob(images, num_masks=3, batch_size=2)
    assert scores.tolist() == pytest.approx(prior.log_prob(pipe.encode(images), num_masks=3).tolist(), abs=1e-4)
    assert not torch.allclose(scores, pipe.log_prob(images), atol=1e-3)
    drawn = pipe(9, seed=0, num_masks=3, batch_size=4, progress=False).tokens
    assert torch.equal(drawn, prior.sample(9, generator=generators(9, 0), num_masks=3))
    assert not torch.equal(drawn, pipe(9, seed=0, progress=False).tokens)
