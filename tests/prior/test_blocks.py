"""Blocks of several tokens: no token of a block is seen in it, to the bit; completions; the partitions of training."""

import pytest
import torch
from costs import all_steps
from small import draw_tokens, logits_of, make_prior

from prior.orders import Partition, block_numbers, make_partition

takers = pytest.mark.parametrize("name", ["blocks", "masked"])


def make(name="blocks", **config):
    return make_prior(name, **({"any_order": True} if name == "blocks" else {}), **config)


@takers
def test_an_order_a_name_and_numbers_say_the_same(name):
    model, walk = make(name, order="halton:4"), make_partition("random:5:4", (3, 4))
    assert walk.blocks == model.blocks
    tokens, labels = draw_tokens(model, 4), torch.arange(4)
    by_numbers = logits_of(model, tokens, labels, block_of=block_numbers(*walk))
    assert torch.equal(logits_of(model, tokens, labels, order=walk.order), by_numbers)
    assert not torch.equal(logits_of(model, tokens, labels), by_numbers)
    expected = model.log_prob(tokens, labels, order="random:5:4")
    for order in (walk, walk.order, Partition(walk.order.expand(4, -1), walk.blocks)):
        assert torch.equal(model.log_prob(tokens, labels, order=order), expected)
    steps = all_steps(model, tokens, labels, walk)
    assert torch.allclose(steps, by_numbers[:, walk.order], atol=1e-4)


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
