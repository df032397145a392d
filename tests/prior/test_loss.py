"""The loss of a training loop: one call of the prior with tokens and labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import ANY_ORDER, PRIORS, draw_tokens, generators, make_prior

from prior.objectives import Likelihood

every_prior = pytest.mark.parametrize("name", PRIORS)
ANY = {"made": {"order_agnostic": True, "connectivity_agnostic": True}, **ANY_ORDER}


@every_prior
def test_it_is_minus_log_p_of_a_token(name):
    """Of a prior that draws nothing in training; the linear loss of `masked` is a bound, which its own tests have."""
    model = make_prior(name)
    tokens, labels = draw_tokens(model, 6), torch.arange(6) % 4
    if name != "masked":
        for given in (labels, None):
            loss, expected = model.loss(tokens, given), -model.log_prob(tokens, given).mean() / len(model.grid)
            assert loss.shape == () and loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected)
    torch.manual_seed(1)
    without = model.loss(tokens)
    torch.manual_seed(1)
    assert torch.equal(model.loss(tokens, torch.full((6,), model.num_classes)), without), "the null class for all"


@pytest.mark.parametrize(("name", "config"), [*((name, {}) for name in PRIORS), *ANY.items()], ids=str)
def test_orders_and_masks_are_drawn_unless_they_are_given(name, config):
    """With what `training_inputs` draws it is the loss of `train_prior`, and so are its gradients."""
    model = make_prior(name, **config).train()
    tokens, labels, found = draw_tokens(model, 6), torch.arange(6) % 4, []
    for way in ("drawn", "given", "objective"):
        torch.manual_seed(2)
        inputs = {} if way == "drawn" else model.training_inputs(tokens, 0.7)
        if way == "objective":
            loss = Likelihood(model)(tokens, labels, inputs)[0]
        else:
            loss = model.loss(tokens, labels, progress=0.7, **inputs)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append([loss.detach(), *(gradient for gradient in gradients if gradient is not None)])
    assert len(found[0]) > 1 and bool(found[0][0].isfinite())
    for other in found[1:]:
        assert len(other) == len(found[0]) and all(map(torch.equal, other, found[0]))
    if model.training_inputs(tokens, 0.0):
        losses = {float(model.loss(tokens, labels).detach()) for _ in range(5)}
        assert len(losses) == 5, "drawn anew at each call"


@every_prior
def test_ids_may_be_of_any_whole_type_and_in_an_array(name):
    model, tokens = make_prior(name), torch.randint(5, (4, len(make_prior(name).grid)))
    tokens, losses = tokens.view(4, *model.grid.shape), []
    for given in (
        tokens,
        tokens.int(),
        tokens.to(torch.uint8),
        tokens.to(torch.uint16),
        tokens.numpy(),
        tokens.tolist(),
    ):
        torch.manual_seed(3)
        losses.append(float(model.loss(given, np.array([0, 1, 2, 3])).detach()))
    assert len(set(losses)) == 1


@pytest.mark.parametrize(("name", "config"), [("gpt", {}), ("masked", {}), ("gpt", {"any_order": True})], ids=str)
def test_a_loop_of_ones_own_learns(name, config):
    """Images of one token each, by their class."""
    torch.manual_seed(0)
    model = make_prior(name, **config).train()
    optimizer, labels = torch.optim.Adam(model.parameters(), 3e-3), torch.arange(60) % 3
    tokens = labels[:, None, None].expand(60, 3, 4)
    for step in range(80):
        optimizer.zero_grad()
        model.loss(tokens, labels, progress=step / 80).backward()
        optimizer.step()
    drawn = model.eval().sample(9, torch.arange(9) % 3, generator=generators(9))
    assert (drawn == (torch.arange(9) % 3)[:, None, None]).double().mean() > 0.9


@every_prior
def test_scores_take_lists_and_arrays_and_a_label_of_none_is_the_null_class(name):
    model = make_prior(name)
    tokens = draw_tokens(model, 2)
    expected = model.log_prob(tokens, torch.tensor([1, model.num_classes]))
    for given in (tokens.numpy(), tokens.tolist()):
        assert torch.equal(model.log_prob(given, [1, None]), expected)
    drawn = model.sample(2, [1, None], generator=generators(2))
    assert torch.equal(drawn, model.sample(2, torch.tensor([1, model.num_classes]), generator=generators(2)))
