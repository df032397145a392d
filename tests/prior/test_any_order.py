"""Priors that take every order: likelihoods, samples and completions in each, and mixtures of them."""

import math

import pytest
import torch
from costs import all_steps
from frequencies import as_frequent
from givens.headed import all_grids, numbers_of
from small import ANY_ORDER, ORDERS, draw_tokens, generators, logits_of, make_prior

from prior.orders import Partition, blocks_after_known, known_first, make_order

MODELS = sorted(ANY_ORDER)
every_model = pytest.mark.parametrize("name", MODELS)


def make(name, **config):
    return make_prior(name, **{**ANY_ORDER[name], **config})


@pytest.fixture
def orders():
    """One per image, all different, over 12 positions."""
    return torch.rand(5, 12, generator=torch.Generator().manual_seed(1)).argsort(1)


@every_model
def test_an_order_per_image_is_causal_in_each_and_steps_follow_it(name, orders):
    model, tokens, labels = make(name).double(), torch.randint(5, (5, 3, 4)), torch.arange(5) % 4
    images = torch.arange(5)[:, None]
    before = logits_of(model, tokens, labels, order=orders)[images, orders]
    with torch.no_grad():
        assert (all_steps(model, tokens, labels, orders) - before).abs().max() < 1e-9
    for rank in range(12):
        changed, at = tokens.flatten(1).clone(), orders[:, rank : rank + 1]
        changed.scatter_(1, at, (changed.gather(1, at) + 1) % 5)
        after = logits_of(model, changed.view(5, 3, 4), labels, order=orders)[images, orders]
        moved = (after - before).abs().amax(-1) > 1e-9
        assert not moved[:, : rank + 1].any() and moved[:, rank + 1 :].all()
    together = model.token_log_probs(tokens, labels, orders)
    alone = [model.token_log_probs(tokens[k, None], labels[k, None], orders[k]) for k in range(5)]
    torch.testing.assert_close(together, torch.cat(alone))


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


DENSITIES = [(name, order) for name in MODELS for order in ("column", "random:1")]
DENSITIES += [
    (name, order)
    for name in ("blocks", "masked")
    for order in ("rows", "spread:3", "raster/4", "random:2:2", Partition(torch.arange(6), (2, 3, 1)))
]


@pytest.mark.parametrize(("name", "order"), DENSITIES, ids=str)
def test_every_order_is_a_density_and_a_mixture_is_the_mean_of_its_orders_in_the_same_blocks(name, order):
    model = make(name, shape=(2, 3), vocab_size=2, order="raster" if name in ("gpt", "made") else "halton:2").double()
    grids, blocks = all_grids(model.grid), model.to_partition(order).blocks
    with torch.no_grad():
        first, *others = model.orders(3, order)
        each = [model.log_prob(grids, order=one) for one in (first, *others)]
        mixed = model.log_prob(grids, order=order, num_orders=3)
    assert first is order and [one.blocks for one in others] == [blocks] * 2
    assert [one.order.tolist() for one in others] == [make_order(f"random:{k}", (2, 3)).tolist() for k in (1, 2)]
    assert all(abs(float(log_probs.exp().sum()) - 1) < 1e-9 for log_probs in (mixed, *each))
    torch.testing.assert_close(mixed, torch.stack(each).logsumexp(0) - math.log(3))
    assert max(blocks) > 1 or not torch.allclose(each[0], each[2], atol=1e-3), "too little to test anything"


@pytest.mark.sparse
@every_model
@pytest.mark.parametrize("cache", [True, False])
def test_frequencies_of_a_mixture_match_its_log_prob(name, cache):
    model, count = make(name, shape=(1, 3), vocab_size=2), 6000 if cache else 2000
    drawn = model.sample(count, generator=torch.Generator().manual_seed(5), num_orders=3, cache=cache)
    expected = model.log_prob(all_grids(model.grid), num_orders=3).exp()
    assert as_frequent(numbers_of(drawn, model.grid), expected)


COMPLETED = [("gpt", None, {}), ("made", None, {}), ("masked", (1, 1, 2, 2), {})]
COMPLETED += [("blocks", (1, 1, 2, 2), {}), ("blocks", (1, 1, 2, 2), {"parallel": True})]


@pytest.mark.parametrize(("name", "blocks", "path"), COMPLETED, ids=str)
def test_completions_follow_the_mixture_given_what_is_known(name, blocks, path):
    """Known tokens come first in each order, as one block if blocks hold several, and weigh the order."""
    torch.manual_seed(1)  # of models whose orders differ much
    settings = {"blocks": blocks, "order": "random:7"} if blocks else {}
    model, count, orders = make(name, shape=(2, 3), vocab_size=2, **settings), 2000, 3
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    known = torch.tensor([[True, True, False], [False, True, False]])
    grids = all_grids(model.grid)
    rows = grids[(grids[:, known] == 0).all(1)]
    joint = []
    for one in model.orders(orders):
        order = known_first(model.to_partition(one).order, known.flatten()[None])[0]
        partition = Partition(order, blocks_after_known(blocks, 3) if blocks else (1,) * 6)
        joint.append(model.log_prob(rows, order=partition).detach().double().exp())
    joint = torch.stack(joint)
    drawn = model.sample(
        count, generator=torch.Generator().manual_seed(1), tokens=rows[0], known=known, num_orders=orders, **path
    )
    matches = (drawn[:, None] == rows).flatten(2).all(2)
    found = matches.int().argmax(1)
    assert matches.any(1).all() and as_frequent(found, joint.sum(0) / joint.sum())
    unweighed = (joint / joint.sum(1, keepdim=True)).mean(0)
    assert blocks is not None or not as_frequent(found, unweighed), "too little to test anything"


COMPLETIONS = [(name, "snake") for name in MODELS]
COMPLETIONS += [(name, order) for name in ("blocks", "masked") for order in ("halton:4", "rows", "dyadic")]


@pytest.mark.parametrize(("name", "order"), COMPLETIONS)
def test_known_tokens_come_first_and_leave_the_cuts(name, order):
    """Images that know more and less are drawn as if each were alone, in the blocks that are left."""
    model = make(name, order=order)
    tokens, known = draw_tokens(model, 7), torch.rand(7, 3, 4) < torch.linspace(0, 1, 7)[:, None, None]
    together = model.sample(7, generator=generators(7), tokens=tokens, known=known)
    assert torch.equal(together[known], tokens[known])
    for path in ({"cache": False}, {"parallel": True}):
        assert torch.equal(together, model.sample(7, generator=generators(7), tokens=tokens, known=known, **path))
    for k in range(7):
        first, count = known_first(model.order, known[k].flatten()[None])[0], int(known[k].sum())
        left = blocks_after_known(model.blocks, count) if max(model.blocks) > 1 else model.blocks
        given = {"tokens": tokens[k], "known": known[k], "order": Partition(first, left)}
        assert torch.equal(model.sample(1, generator=[generators(7)[k]], **given)[0], together[k])


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


def test_the_order_drawn_for_an_image_does_not_depend_on_what_is_known_of_others():
    model = make("gpt")
    tokens, known = draw_tokens(model, 8), torch.zeros(8, *model.grid.shape, dtype=torch.bool)
    known[7].view(-1)[0] = True
    together = model.sample(8, tokens=tokens, known=known, num_orders=4, generator=generators(8))
    alone = [model.sample(1, num_orders=4, generator=generators(8)[k : k + 1]) for k in range(7)]
    assert torch.equal(together[:7], torch.cat(alone))
