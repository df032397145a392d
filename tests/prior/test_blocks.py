"""Blocks of several tokens: nothing of a block is seen in it, passes are counted, known tokens come first, and every
partition is a density."""

import itertools

import pytest
import torch
from costs import all_steps, flops
from frequencies import as_frequent
from small import PARTITIONS, draw_tokens, generators, make_prior

from pipelines.completion import region_log_prob
from prior.orders import Partition, block_numbers, blocks_after_known, make_partition

every_partition = pytest.mark.parametrize("order", PARTITIONS)
takers = pytest.mark.parametrize("name", ["blocks", "masked"])


def make(name="blocks", **config):
    return make_prior(name, **({"any_order": True} if name == "blocks" else {}), **config)


def all_grids(shape, vocab):
    size = shape[0] * shape[1]
    return torch.tensor(list(itertools.product(range(vocab), repeat=size))).reshape(-1, *shape)


@takers
@every_partition
def test_a_block_does_not_see_itself_bit_for_bit(name, order):
    """In float32, as it is used: whatever the tokens of a block and of later ones are, its logits are the same bits."""
    model = make_prior(name, order=order)
    tokens, labels = draw_tokens(model, 4), torch.arange(4)
    before = model(tokens, labels)
    for block in range(len(model.blocks)):
        changed = torch.where((model.block_of >= block).view(3, 4), (tokens + 1) % 5, tokens)
        after = model(changed, labels)
        upto = model.block_of <= block
        assert torch.equal(after[:, upto], before[:, upto])
        assert (after[:, ~upto] != before[:, ~upto]).any(-1).all()


@takers
def test_an_order_a_name_and_numbers_say_the_same(name):
    model, walk = make(name, order="halton:4"), make_partition("random:5:4", (3, 4))
    assert walk.blocks == model.blocks
    tokens, labels = draw_tokens(model, 4), torch.arange(4)
    by_numbers = model(tokens, labels, block_of=block_numbers(*walk))
    assert torch.equal(model(tokens, labels, order=walk.order), by_numbers)
    assert not torch.equal(model(tokens, labels), by_numbers)
    expected = model.log_prob(tokens, labels, order="random:5:4")
    for order in (walk, walk.order, Partition(walk.order.expand(4, -1), walk.blocks)):
        assert torch.equal(model.log_prob(tokens, labels, order=order), expected)
    steps = all_steps(model, tokens, labels, walk)
    assert torch.allclose(steps, by_numbers[:, walk.order], atol=1e-4)


@takers
@pytest.mark.parametrize("order", ["rows", "spread:3", "raster/4", "random:2:2", Partition(torch.arange(6), (2, 3, 1))])
def test_a_prior_of_any_order_is_a_density_in_every_partition(name, order):
    model = make(name, shape=(2, 3), vocab_size=3, order="halton:2").double()
    grids = all_grids((2, 3), 3)
    with torch.no_grad():
        one, mixed = (model.log_prob(grids, order=order, num_orders=count).exp().sum() for count in (1, 3))
    assert abs(float(one) - 1) < 1e-12 and abs(float(mixed) - 1) < 1e-12


@takers
@pytest.mark.parametrize("order", ["halton:4", "rows", "dyadic"])
def test_known_tokens_come_first_and_leave_the_cuts(name, order):
    """Images with different numbers of known tokens are drawn as if each were alone, in the cuts that are left."""
    model = make(name, order=order)
    tokens, known = draw_tokens(model, 7), torch.rand(7, 3, 4) < torch.linspace(0, 1, 7)[:, None, None]
    together = model.sample(7, generator=generators(7), tokens=tokens, known=known)
    assert torch.equal(together[known], tokens[known])
    for path in ({"cache": False}, {"parallel": True}):
        assert torch.equal(together, model.sample(7, generator=generators(7), tokens=tokens, known=known, **path))
    for k in range(7):
        flat, count = known[k].flatten()[model.order], int(known[k].sum())
        walk = Partition(torch.cat([model.order[flat], model.order[~flat]]), blocks_after_known(model.blocks, count))
        alone = model.sample(1, generator=[generators(7)[k]], tokens=tokens[k], known=known[k], order=walk)
        assert torch.equal(alone[0], together[k])


@takers
def test_completions_have_the_density_that_is_said(name):
    """Frequencies of what is drawn, given two known tokens of six, against `region_log_prob`, which sums to one."""
    model, count = make(name, shape=(2, 3), vocab_size=2, order="rows"), 6000
    known = torch.tensor([[False, True, False], [False, False, True]])
    grids = all_grids((2, 3), 2)
    grids = grids[(grids[:, known] == torch.tensor([1, 0])).all(1)]
    expected = region_log_prob(model, grids, known, torch.ones(16).long()).detach().exp()
    assert abs(float(expected.sum()) - 1) < 1e-5
    drawn = model.sample(
        count, torch.ones(count).long(), generator=torch.Generator().manual_seed(3), tokens=grids[0], known=known
    )
    matches = (drawn[:, None] == grids).flatten(2).all(2)
    assert matches.any(1).all() and as_frequent(matches.int().argmax(1), expected)


@pytest.mark.parametrize("order", ["raster", "diagonal", "halton:8", "rows"])
def test_all_passes_cost_one_forward_pass(order):
    model = make_prior("blocks", shape=(6, 6), vocab_size=16, order=order)
    tokens = torch.randint(16, (4, 6, 6))
    whole = flops(lambda: model(tokens))
    assert 0.5 * whole < flops(lambda: all_steps(model, tokens)) <= 1.05 * whole


def test_training_draws_its_own_partition_and_any_other():
    """Each image's numbers are blocks that grow, over all positions; in the end a share of them is the model's own."""
    model = make(order="halton:4", random_share=0.75)
    numbers = model.training_inputs(draw_tokens(model, 400), 1.0)["block_of"]
    own = (numbers == model.block_of).all(1)
    assert 0.1 < own.double().mean() < 0.4
    counts = [torch.bincount(row).tolist() for row in numbers[~own]]
    assert all(min(sizes) >= 1 and sizes == sorted(sizes) for sizes in counts)
    assert {1, 12} <= {len(sizes) for sizes in counts} and len({tuple(row.tolist()) for row in numbers[~own]}) > 200
    assert make_prior("blocks").training_inputs(draw_tokens(model, 4), 0.0) == {}
