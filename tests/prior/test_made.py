"""The masked autoencoder: its logits and densities are those of its paper, and those of two ids need one number."""

import itertools

import pytest
import torch
from givens.made_variants import (
    ROWS,
    by_the_paper,
    earlier,
    every_variant,
    keep_awake,
    make_made,
    make_same,
    some_orders,
)
from small import draw_tokens, make_prior, moved_by

from prior import Prior
from prior.masks import random_degrees, summed
from tokenizer import TokenGrid

# Masks


@every_variant
def test_logits_are_those_of_the_paper(variant):
    model = make_made(variant, shape=(2, 3), order="random:2", num_classes=2, order_agnostic=True).double()
    tokens, labels = draw_tokens(model, 4), torch.tensor([0, 1, 2, 2])
    order, degrees = torch.tensor([3, 0, 5, 1, 4, 2]), random_degrees(model.config.hidden, 6)
    with torch.no_grad():
        for k, given in enumerate(({}, {"order": order}, {"degrees": degrees}, {"order": order, "degrees": degrees})):
            settings = (given.get("order", model.order), given.get("degrees", model.degrees()))
            expected = by_the_paper(model, tokens[k], int(labels[k]), *settings)
            assert (model(tokens, labels, **given)[k] - expected).abs().max() < 1e-10


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


def test_summing_rows_equals_multiplying_one_hot_features():
    ids, weight = torch.randint(6, (5, 4)), torch.randn(4, 6, 9)
    features = torch.nn.functional.one_hot(ids, 6).float()
    assert torch.allclose(summed(ids, weight), summed(features, weight), atol=1e-5)


@every_variant
def test_masks_multiply_and_are_neither_weights_nor_saved(variant):
    model = make_made(variant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(value.is_floating_point() and (value != 0).all() for value in before.values())
    model(draw_tokens(model, 2)).sum().backward()
    model.sample(2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(before) == {name for name, _ in model.named_parameters()}


def test_gradients_reach_exactly_what_is_not_masked():
    model = make_made("three layers", num_classes=0).double()
    keep_awake(model)
    tokens = draw_tokens(model, 500)
    model.loss_from_outputs(model(tokens), tokens).backward()
    (first, second, last), ranks = model.degrees(), model.ranks[:, None]
    assert (model.input.grad != 0).any(1).equal(ranks < first)
    assert (model.hidden[0].grad != 0).equal(first <= second[:, None])
    assert (model.output.grad != 0).any(1).equal(last <= ranks)


def test_dropout_is_only_trained_with():
    model = make_made("three layers", dropout=0.5)
    tokens = draw_tokens(model, 3)
    assert torch.equal(model(tokens), model(tokens)) and torch.equal(model(tokens), make_same(model)(tokens))
    assert not torch.equal(model.train()(tokens), model(tokens))


# Densities


@pytest.mark.sparse
@every_variant
@some_orders
def test_probabilities_sum_to_one(variant, order):
    shape, vocab = ((1, 2), ROWS) if "rows" in variant else ((2, 3), 2 if "two" in variant else 3)
    model = make_made(variant, shape=shape, vocab_size=vocab, order=order).double()
    size = shape[0] * shape[1]
    grids = torch.tensor(list(itertools.product(range(vocab), repeat=size))).reshape(-1, *shape)
    with torch.no_grad():
        total = model.log_prob(grids, torch.full((len(grids),), 1)).double().exp().sum()
    assert abs(float(total) - 1) < 1e-5


def test_each_draw_of_orders_and_degrees_is_another_density():
    """The same weights, each draw normalised and causal in its order; sampling follows the order, too."""
    model = make_prior(
        "made", shape=(2, 3), vocab_size=3, hidden=(40, 30), order_agnostic=True, connectivity_agnostic=True
    ).double()
    grids = torch.tensor(list(itertools.product(range(3), repeat=6))).reshape(-1, 2, 3)
    ids, totals = grids.reshape(-1, 6, 1), []
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            drawn = model.training_inputs(grids, 0.5)
            log_probs = model(grids, **drawn).log_softmax(-1).gather(-1, ids).sum((1, 2))
            assert abs(float(log_probs.exp().sum()) - 1) < 1e-10
            totals.append(log_probs)
            moved = moved_by(model, grids[::7], None, **drawn)
            assert not moved[~earlier(drawn["order"])].any() and moved.any()
            fewer = {"degrees": drawn["degrees"]}
            assert not torch.allclose(model(grids, **fewer), model(grids), atol=1e-2)
            again = {"degrees": [each.flip(0) for each in drawn["degrees"]]}
            assert not torch.allclose(model(grids, **fewer), model(grids, **again), atol=1e-2)
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in itertools.combinations(totals, 2))


def test_training_draws_come_from_the_seed():
    model = make_prior("made", hidden=(20, 30), order_agnostic=True, connectivity_agnostic=True)
    tokens = draw_tokens(model, 2)

    def draw(seed, model=model):
        torch.manual_seed(seed)
        return model.training_inputs(tokens, 0.3)

    one, other = draw(0), draw(1)
    assert set(one) == {"order", "degrees"} and [len(each) for each in one["degrees"]] == [20, 30]
    assert one["order"].sort().values.equal(torch.arange(12))
    assert one["order"].equal(draw(0)["order"]) and not one["order"].equal(other["order"])
    for a, b, c in zip(one["degrees"], draw(0)["degrees"], other["degrees"], strict=True):
        assert a.equal(b) and not a.equal(c)
    assert set(draw(0, make_same(model, connectivity_agnostic=False))) == {"order"}
    assert set(draw(0, make_same(model, order_agnostic=False))) == {"degrees"}
    assert draw(0, make_same(model, order_agnostic=False, connectivity_agnostic=False)) == {}
    assert not make_same(model, order_agnostic=False).any_order and model.any_order
    model.loss_from_outputs(model(tokens, **one), tokens, **one).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# The published sizes


def test_published_sizes():
    """784-8000-784 (Germain et al. 2015), and that of the black and white garments: one weight for each pixel and
    unit, one logit for each pixel."""
    for units, count in ((8000, 12_552_784), (1000, 1_569_784)):
        with torch.device("meta"):
            model = Prior.create("made", grid=TokenGrid((28, 28), 2), hidden=(units,))
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert count == 784 * units + units + units * 784 + 784


def test_direct_connections_have_to_be_few():
    with pytest.raises(ValueError, match="direct: .*embedding"):
        Prior.create("made", grid=TokenGrid((16, 16), 512), direct=True)
    with torch.device("meta"):
        Prior.create("made", grid=TokenGrid((16, 16), 512), direct=True, embedding=16)


# Two ids


def test_of_two_ids_one_number_goes_in_and_one_logit_comes_out():
    model = make_made("two ids, direct", shape=(2, 3), num_classes=0).double()
    tokens = draw_tokens(model, 4)
    logits, signs = model(tokens), 2 * tokens.flatten(1).double() - 1
    ranks, (degrees,) = model.ranks, model.degrees()
    below = (signs @ (model.input[:, 0] * (ranks[:, None] < degrees)) + model.biases[0].shared).clamp(min=0)
    z = below @ (model.output[:, 0] * (degrees <= ranks[:, None])).t() + model.biases[1].shared
    z = z + signs @ (model.direct[:, 0] * (ranks[:, None] < ranks))
    assert torch.allclose(logits.softmax(-1)[..., 1], z.sigmoid(), atol=1e-12)
    assert model.input.shape == (6, 1, 99) and model.output.shape == (6, 1, 99) and model.direct.shape == (6, 1, 6)


@pytest.mark.parametrize("variant", ["two ids", "two ids, one-hot", "three layers"])
def test_the_loss_is_the_cross_entropy(variant):
    model = make_made(variant).double()
    tokens = draw_tokens(model, 4)
    logits = model(tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert model.loss_from_outputs(logits, tokens).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    "config", [{}, {"embedding": 24}, {"direct": True}, {"embedding": 24, "direct": True}, {"vocab_size": 2}], ids=str
)
def test_numbers_are_neither_larger_nor_much_smaller_behind_every_layer(config):
    """He's variances, of the half of the inputs that a unit sees on average; a one-hot row counts once."""
    grid = TokenGrid((8, 8), config.get("vocab_size", 8))
    settings = {key: value for key, value in config.items() if key != "vocab_size"}
    model = Prior.create("made", grid=grid, hidden=(768, 512, 640), **settings).eval()
    seen = 64 * config.get("embedding", 1) / 2
    halves = {"input": seen, "hidden.0": 768 / 2, "hidden.1": 512 / 2}
    for name, half in halves.items():
        assert float(model.get_parameter(name).detach().square().mean()) == pytest.approx(2 / half, rel=0.05), name
    assert float(model.output.detach().square().mean()) == pytest.approx(1 / 640, rel=0.05)
    if config.get("direct"):
        assert float(model.direct.detach().square().mean()) == pytest.approx(0.5 / seen, rel=0.05)
    if config.get("embedding"):
        assert float(model.embedding.detach().square().mean()) == pytest.approx(1, rel=0.3)
        assert float(model.head.detach().square().mean()) == pytest.approx(1 / 24, rel=0.3)
    activated, tokens = [], draw_tokens(model, 64)
    model.dropout.register_forward_hook(lambda module, inputs, output: activated.append(inputs[0]))
    with torch.no_grad():
        logits = model(tokens)
    assert float(activated[0].square().mean()) == pytest.approx(1.0, abs=0.15)
    assert all(0.2 < float(each.square().mean()) < 1.2 for each in activated) and 0.1 < float(logits.std()) < 1.2
