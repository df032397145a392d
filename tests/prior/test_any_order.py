"""Priors that take every order: likelihoods, samples and completions in each, and mixtures of them.

Covers: prior/base.py, prior/gpt.py.
"""

import itertools
import math

import pytest
import torch
from costs import all_steps
from frequencies import as_frequent
from small import ANY_ORDER, ORDERS, PRIORS, draw_tokens, generators, make_prior

from prior.orders import Partition, blocks_after_known, known_first, make_order

every_model = pytest.mark.parametrize("name", sorted(set(ANY_ORDER) & set(PRIORS)))


def make(name, **config):
    return make_prior(name, **{**ANY_ORDER[name], **config})


@pytest.fixture
def orders():
    """One per image, all different, over 12 positions."""
    return torch.rand(5, 12, generator=torch.Generator().manual_seed(1)).argsort(1)


@every_model
def test_an_order_per_image_is_causal_in_each(name, orders):
    model, tokens, labels = make(name), torch.randint(5, (5, 3, 4)), torch.arange(5) % 4
    before = model(tokens, labels, order=orders)
    for rank in range(12):
        changed = tokens.flatten(1).clone()
        at = orders[:, rank : rank + 1]
        changed.scatter_(1, at, (changed.gather(1, at) + 1) % 5)
        moved = (model(changed.reshape(5, 3, 4), labels, order=orders) - before).abs().amax(-1) > 1e-6
        moved = moved.gather(1, orders)
        assert not moved[:, : rank + 1].any() and moved[:, rank + 1 :].all()


@every_model
def test_an_order_per_image_equals_one_image_at_a_time(name, orders):
    model, tokens, labels = make(name), torch.randint(5, (5, 3, 4)), torch.arange(5) % 4
    together = model.token_log_probs(tokens, labels, orders)
    for k in range(5):
        alone = model.token_log_probs(tokens[k : k + 1], labels[k : k + 1], orders[k])
        assert torch.allclose(together[k], alone[0], atol=1e-5)


@pytest.mark.sparse
@every_model
@pytest.mark.parametrize("order", ORDERS)
def test_a_named_order_equals_the_model_built_with_it(name, order):
    model, tokens = make(name), torch.randint(5, (4, 3, 4))
    built = make(name, order=order)
    built.load_state_dict(model.state_dict())
    assert torch.allclose(built.log_prob(tokens), model.log_prob(tokens, order=order), atol=1e-5)
    drawn = model.sample(6, order=order, generator=generators(6))
    assert torch.equal(drawn, built.sample(6, generator=generators(6)))
    assert torch.equal(drawn, model.sample(6, order=make_order(order, (3, 4)), generator=generators(6)))


@every_model
def test_step_logits_equal_forward_logits(name, orders):
    model = make(name).double()
    tokens, labels = torch.randint(5, (5, 3, 4)), torch.arange(5) % 4
    whole = model(tokens, labels, order=orders)
    with torch.no_grad():
        steps = all_steps(model, tokens, labels, orders)
        assert (steps - whole[torch.arange(5)[:, None], orders]).abs().max() < 1e-9


@every_model
def test_probabilities_sum_to_one_in_any_order_and_mixed(name):
    model = make(name, shape=(2, 2), vocab_size=3).double()
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).reshape(-1, 2, 2)
    alone = [model.log_prob(grids, order=order).double() for order in ("column", "random:1", "random:2")]
    for log_probs in alone:
        assert abs(float(log_probs.detach().exp().sum()) - 1) < 1e-5
    mixed = model.log_prob(grids, order="column", num_orders=3).double()
    assert torch.allclose(mixed, torch.stack(alone).logsumexp(0) - math.log(3), atol=1e-5)
    assert abs(float(mixed.detach().exp().sum()) - 1) < 1e-5
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)  # or the mixture would not be one


@pytest.mark.sparse
@every_model
@pytest.mark.parametrize("cache", [True, False])
def test_frequencies_of_a_mixture_match_its_log_prob(name, cache):
    model, count = make(name, shape=(1, 3), vocab_size=2), 6000 if cache else 2000
    drawn = model.sample(count, generator=torch.Generator().manual_seed(5), num_orders=3, cache=cache).flatten(1)
    grids = torch.tensor(list(itertools.product(range(2), repeat=3)))
    expected = model.log_prob(grids.reshape(-1, 1, 3), num_orders=3).exp()
    assert as_frequent((drawn * torch.tensor([4, 2, 1])).sum(1), expected)


@pytest.mark.sparse
@every_model
@pytest.mark.parametrize("path", [{}, {"cache": False}, {"parallel": True}])
def test_completion_is_conditioned_on_all_known_tokens(name, path):
    """Frequencies of the missing token against p(token | all others), which a raster order would not see."""
    model, count = make(name, shape=(1, 3), vocab_size=2), 4000
    for hole in range(3):
        known = torch.ones(1, 3, dtype=torch.bool)
        known[0, hole] = False
        tokens = torch.tensor([[1, 0, 1]])
        last = torch.tensor([k for k in range(3) if k != hole] + [hole])
        expected = model(tokens[None], order=last).detach()[0, hole].softmax(-1)[1]
        drawn = model.sample(count, generator=torch.Generator().manual_seed(2), tokens=tokens, known=known, **path)
        assert torch.equal(drawn[:, known], tokens[known].expand(count, -1))
        found = drawn[:, 0, hole].float().mean()
        assert abs(found - expected) < 5 * (expected * (1 - expected) / count).sqrt() + 1e-3


@pytest.mark.parametrize(
    ("name", "blocks", "path"),
    [
        ("blocks", (1, 1, 2, 2), {}),
        ("blocks", (1, 1, 2, 2), {"parallel": True}),
        ("masked", (1, 1, 2, 2), {}),
    ],
    ids=["blocks", "blocks, parallel", "masked"],
)
def test_completions_of_a_mixture_are_of_the_walks_that_are_drawn(name, blocks, path):
    """Frequencies against all completions, enumerated: each walk takes the known tokens first, as one block if blocks
    hold several tokens, and is as probable as it makes them."""
    torch.manual_seed(0)
    model, count, orders = make(name, shape=(2, 3), vocab_size=2, blocks=blocks, order="random:7"), 2000, 3
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    known = torch.tensor([[True, True, False], [False, True, False]])
    grids = torch.tensor(list(itertools.product(range(2), repeat=6))).reshape(-1, 2, 3)
    rows = grids[(grids[:, known] == 0).all(1)]
    joint = []
    for one in model.orders(orders):
        order = known_first(model.to_partition(one).order, known.flatten()[None])[0]
        walk = Partition(order, blocks_after_known(blocks, 3) if max(blocks) > 1 else blocks)
        joint.append(model.log_prob(rows, order=walk).detach().double().exp())
    expected = torch.stack(joint).sum(0) / torch.stack(joint).sum()
    drawn = model.sample(
        count, generator=torch.Generator().manual_seed(1), tokens=rows[0], known=known, num_orders=orders, **path
    )
    matches = (drawn[:, None] == rows).flatten(2).all(2)
    assert matches.any(1).all() and as_frequent(matches.int().argmax(1), expected)


@every_model
def test_completion_with_masks_of_different_sizes(name):
    """Known first in the model's order, each image by its own mask, whatever its batch."""
    model = make(name, order="snake")
    tokens, known = torch.randint(5, (9, 3, 4)), torch.rand(9, 3, 4) < torch.linspace(0, 1, 9)[:, None, None]
    together = model.sample(9, generator=generators(9), tokens=tokens, known=known)
    assert torch.equal(together[known], tokens[known])
    for k in range(9):
        alone = model.sample(
            1,
            generator=[generators(9)[k]],
            tokens=tokens[k],
            known=known[k],
            order=known_first(model.order, known[k].flatten()[None])[0],
        )
        assert torch.equal(alone[0], together[k])
    assert torch.equal(together, model.sample(9, generator=generators(9), tokens=tokens, known=known, parallel=True))


def test_gpt_anneals_from_random_orders_to_its_own():
    model = make_prior("gpt", order="spiral_in", any_order=True, anneal=(0.4, 0.8), random_share=0.25)
    tokens = torch.zeros(4000, 3, 4, dtype=torch.long)

    def share(progress):
        torch.manual_seed(0)
        order = model.training_inputs(tokens, progress)["order"]
        assert order.shape == (4000, 12) and torch.equal(order.sort(1).values, torch.arange(12).expand(4000, -1))
        random = order[(order != model.order).any(1)]
        assert len(random.unique(dim=0)) > 0.99 * len(random), "an order for each image"
        return len(random) / len(order)

    for progress, expected in ((0.0, 1.0), (0.4, 1.0), (0.6, 0.625), (0.8, 0.25), (1.0, 0.25)):
        assert abs(share(progress) - expected) < 0.03
    assert make_prior("gpt").training_inputs(tokens, 0.5) == {}


def test_queries_and_keys_rotate_by_the_cells_of_next_and_last_tokens():
    """The query of rank r rotates by the cell of the r-th token, the key by that of the one before, the start's at
    the start."""
    model, order = make_prior("gpt", any_order=True), torch.tensor([7, 2, 11, 0, 1, 3, 4, 5, 6, 8, 9, 10])
    table, rotations = model.rotations.table, model.make_rotations(order)
    assert torch.equal(rotations[:, 0], table[order])
    assert torch.equal(rotations[:, 1], table[[12, *order[:-1].tolist()]])
    assert torch.equal(table[:, 0, 0], torch.tensor([row for row in [0, 1, 2] for _ in range(4)] + [-1]).float().cos())


@every_model
def test_orders_guidance_known_tokens_and_mixtures_go_together(name, orders):
    model, labels = make(name), torch.arange(5) % 3
    tokens, known = torch.randint(5, (5, 3, 4)), torch.rand(5, 3, 4) < 0.4
    for settings in (
        {"order": orders, "guidance_scale": 2.0},
        {"order": orders, "tokens": tokens, "known": known, "top_p": 0.9},
        {"num_orders": 3, "tokens": tokens, "known": known},
        {"num_orders": 3, "guidance_scale": 0.5},
        {"order": orders, "guidance_end": 3.0},
    ):
        drawn = model.sample(5, labels, generator=generators(5), **settings)
        for path in ({"cache": False}, {"parallel": True}):
            assert torch.equal(model.sample(5, labels, generator=generators(5), **path, **settings), drawn), settings
        if "known" in settings:
            assert torch.equal(drawn[known], tokens[known])


# Mixtures


def test_other_orders_have_the_blocks_of_the_given_one():
    model = make_prior("blocks", (3, 4), any_order=True)
    for order, sizes in (("column/4", (4, 4, 4)), ("column", (1,) * 12)):
        given, *others = model.orders(3, order)
        assert given == order and len(others) == 2
        for number, one in enumerate(others, 1):
            walk = model.to_partition(one)
            assert walk.blocks == sizes and walk.order.equal(make_order(f"random:{number}", (3, 4)))


def test_a_mixture_in_blocks_is_the_mean_of_its_densities():
    model = make_prior("blocks", (3, 4), any_order=True).double()
    tokens = draw_tokens(model, 5)
    each = [model.log_prob(tokens, order=order) for order in model.orders(3, "column/4")]
    expected = torch.stack(each).logsumexp(0) - torch.tensor(3.0, dtype=torch.float64).log()
    assert torch.allclose(model.log_prob(tokens, order="column/4", num_orders=3), expected)


def test_the_order_drawn_for_an_image_does_not_depend_on_what_is_known_of_others():
    model = make("gpt")
    tokens, known = draw_tokens(model, 8), torch.zeros(8, *model.grid.shape, dtype=torch.bool)
    known[7].view(-1)[0] = True
    together = model.sample(8, tokens=tokens, known=known, num_orders=4, generator=generators(8))
    alone = [model.sample(1, num_orders=4, generator=generators(8)[k : k + 1]) for k in range(7)]
    assert torch.equal(together[:7], torch.cat(alone))
