"""The members of a mixture of orders, which walk as many tokens at a time as the order that was asked for."""

from __future__ import annotations

import pytest
import torch
from prior.requests import partition_of
from small import draw_tokens, make_prior

from prior.orders import make_order


def test_other_orders_have_the_blocks_of_the_given_one():
    model = make_prior("blocks", (3, 4), any_order=True)
    for order, sizes in (("column/4", (4, 4, 4)), ("column", (1,) * 12)):
        given, *others = model.orders(3, order)
        assert given == order and len(others) == 2
        for number, one in enumerate(others, 1):
            walk = partition_of(model, one)
            assert walk.blocks == sizes and walk.order.equal(make_order(f"random:{number}", (3, 4)))


def test_a_mixture_in_blocks_is_the_mean_of_its_densities():
    model = make_prior("blocks", (3, 4), any_order=True).double()
    tokens = draw_tokens(model, 5)
    each = [model.log_prob(tokens, order=order) for order in model.orders(3, "column/4")]
    expected = torch.stack(each).logsumexp(0) - torch.tensor(3.0, dtype=torch.float64).log()
    assert torch.allclose(model.log_prob(tokens, order="column/4", num_orders=3), expected)


@pytest.mark.parametrize("name", ["gpt", "pixelcnn"])
def test_one_order_has_no_others(name):
    model = make_prior(name)
    assert model.orders(1) == [None] and list(model.connectivities(1)) == [0]
    with pytest.raises(ValueError, match="^num_orders: .* as it was made has one order$"):
        model.orders(2)
    with pytest.raises(ValueError, match="^num_masks: .* as it was made has one connectivity$"):
        model.connectivities(2)
