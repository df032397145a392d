"""The loss of a training loop: one call of the prior with tokens and labels."""

from __future__ import annotations

import pytest
import torch
from givens.headed import MODELS, make_model
from small import ANY_ORDER, PRIORS, draw_tokens, make_prior

from prior.objectives import Likelihood

ANY = {"made": {"order_agnostic": True, "connectivity_agnostic": True}, **ANY_ORDER}


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("masked")])
def test_the_loss_is_minus_log_p_of_a_token(name):
    """Of a prior that draws nothing in training; the loss of `masked` is a bound, which has its own tests."""
    model = make_model(name)
    tokens, labels = draw_tokens(model, 4), torch.tensor([1, 0, 2, model.num_classes])
    loss = model.loss(tokens, labels)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, -model.log_prob(tokens, labels).mean() / len(model.grid))


@pytest.mark.parametrize("name", ["gpt", "masked"])
def test_ids_may_have_any_form(name):
    model = make_prior(name)
    tokens, losses = draw_tokens(model, 4), []
    for given in (tokens, tokens.to(torch.uint8), tokens.to(torch.uint16), tokens.numpy(), tokens.tolist()):
        torch.manual_seed(3)
        losses.append(float(model.loss(given, [1, 0, 2, None]).detach()))
        assert torch.equal(model.log_prob(given), model.log_prob(tokens))
    assert len(set(losses)) == 1


@pytest.mark.parametrize(("name", "config"), [*((name, {}) for name in PRIORS), *ANY.items()], ids=str)
def test_orders_and_masks_are_drawn_unless_they_are_given(name, config):
    """With what `training_inputs` draws it is the loss of `train_prior`, and so are its gradients."""
    model = make_prior(name, **config).train()
    tokens, labels, found = draw_tokens(model, 6), torch.arange(6) % 4, []
    for way in ("drawn", "given", "objective"):
        torch.manual_seed(2)
        inputs = {} if way == "drawn" else model.training_inputs(tokens, 0.7)
        if way == "objective":
            loss = Likelihood(model)(tokens, model.read_given(labels, None, 6), inputs)[0]
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
