"""Guidance trained away (CCA): the loss, which prior it is compared with, and where its optimum lies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from prior.objectives.alignment import Alignment, alignment_loss, alignment_problem
from small import PRIORS, make_prior
from torch.nn.functional import logsigmoid

from pipelines.shuffling.draws import other_labels
from prior.objectives import Likelihood


def test_the_loss_is_the_papers():
    own, other = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    labelled = torch.tensor([1.0, 0.0])
    found = alignment_loss(own, other, labelled, beta=0.5, negatives=7.0)
    first = -logsigmoid(torch.tensor(1.5)) - 7 * logsigmoid(torch.tensor(-0.25))
    second = -logsigmoid(torch.tensor(-0.5))  # without its label it has no negative
    assert torch.allclose(found, (first + second) / 2)


ALIGNABLE = [name for name in PRIORS if alignment_problem(make_prior(name, num_classes=3)) is None]


def test_all_but_masked_priors_can_be_aligned():
    assert set(PRIORS) - set(ALIGNABLE) == {"masked"}
    assert "got 0" in alignment_problem(make_prior("gpt", num_classes=0))


@pytest.mark.parametrize("name", ALIGNABLE)
def test_every_exact_prior_is_compared_with_a_frozen_one(name):
    """At first both are one model. A step of gradients raises images under their labels, and lowers them under others;
    what is frozen has no gradients, and is no part of the module."""
    torch.manual_seed(0)
    prior, frozen = (make_prior(name, num_classes=3) for _ in range(2))
    frozen.load_state_dict(prior.state_dict())
    module = Alignment(prior.train(), frozen.train(), beta=0.5, negatives=2.0)
    assert not frozen.training and {*module.parameters()} == {*prior.parameters()}
    assert list(module.state_dict()) == [f"prior.{key}" for key in prior.state_dict()]
    tokens = torch.randint(prior.grid.vocab_size, (6, *prior.grid.shape))
    labels, others = torch.tensor([0, 1, 2, 0, 1, 3]), torch.tensor([1, 2, 0, 2, 0, 0])
    inputs = prior.training_inputs(tokens, 0.0)
    optimizer = torch.optim.SGD(prior.parameters(), lr=0.02)
    loss, terms = module(tokens, labels, others, inputs)
    assert float(terms["cca"]) == pytest.approx((1 + 2 * 5 / 6) * math.log(2), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(float(terms["cca"]) / 2)
    for _ in range(3):
        optimizer.zero_grad()
        module(tokens, labels, others, inputs)[0].backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    _, after = module(tokens, labels, others, inputs)
    assert float(after["cca"]) < float(terms["cca"]) and float(after["margin"]) > 0 and float(after["above"]) > 0.5


@pytest.mark.parametrize(("negatives", "which"), [(0.0, 0), (1000.0, 1)])
def test_own_labels_rise_and_others_fall(negatives, which):
    """In the model's own log p, whatever the module calls a gain: each where it alone has weight."""
    torch.manual_seed(0)
    prior, frozen = (make_prior("gpt", num_classes=3) for _ in range(2))
    frozen.load_state_dict(prior.state_dict())
    module, optimizer = Alignment(prior, frozen, 0.5, negatives), torch.optim.SGD(prior.parameters(), lr=0.02)
    tokens = torch.randint(prior.grid.vocab_size, (6, *prior.grid.shape))
    labels, others = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 2, 0, 2, 0, 1])
    for _ in range(3):
        optimizer.zero_grad()
        module(tokens, labels, others, {})[0].backward()
        optimizer.step()
    looked_at = (labels, others)[which]
    gained = (prior.log_prob(tokens, looked_at) - frozen.log_prob(tokens, looked_at)).mean()
    assert gained > 0 if which == 0 else gained < 0


def dropouts(name: str) -> dict[str, float]:
    """All that this prior can drop out."""
    return {key: 0.3 for key in type(make_prior(name).config).model_fields if key in ("dropout", "attention_dropout")}


@pytest.mark.parametrize("name", filter(dropouts, ALIGNABLE))
def test_nothing_is_gained_before_the_first_step(name):
    """A prior that drops out would seem to have lost what it drops, and most under the labels of others."""
    prior, frozen = (make_prior(name, num_classes=3, **dropouts(name)) for _ in range(2))
    frozen.load_state_dict(prior.state_dict())
    tokens, labels = torch.randint(prior.grid.vocab_size, (6, *prior.grid.shape)), torch.tensor([0, 1, 2, 0, 1, 2])
    inputs = prior.training_inputs(tokens, 0.0)
    dropped = Likelihood(prior.train())(tokens, labels, inputs)[0].detach()
    module = Alignment(prior, frozen, 0.5, 3.0).train()
    _, terms = module(tokens, labels, (labels + 1) % 3, inputs)
    assert float(terms["margin"]) == pytest.approx(0, abs=1e-4)
    assert float(terms["bits_per_token"]) != pytest.approx(float(dropped) / math.log(2), abs=1e-4)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.02])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_optimum_is_where_the_module_says(beta, classes):
    """The loss over all images and labels has no slope where p_ref is p(x | c) and what it gained is the logarithm of
    p(x | c) / p(x | not c), less that of lambda, over beta."""
    torch.manual_seed(0)
    share, weight = torch.randn(classes, 6).double().softmax(1), 3.0  # p(x | c)
    draws, counts = (np.arange(1200) + 0.5) / 1200, torch.ones(classes, dtype=torch.long)
    drawn = [other_labels(torch.full((1200,), own), counts, draws) for own in range(classes)]
    chances = torch.stack([torch.bincount(labels, minlength=classes) / 1200 for labels in drawn]).double()
    wrong = chances.T @ share  # of a label, the images that it is a wrong one of
    assert torch.allclose(wrong, (share.sum(0) - share) / (classes - 1))
    gained = ((share / wrong / weight).log() / beta).requires_grad_()
    each = [
        right * alignment_loss(gain[None], gain[None], torch.ones(1), beta, weight * float(other / right))
        for right, other, gain in zip(share.flatten(), wrong.flatten(), gained.flatten(), strict=True)
    ]
    (slope,) = torch.autograd.grad(sum(each), gained)
    assert slope.abs().max() < 1e-6 * beta
    (elsewhere,) = torch.autograd.grad(alignment_loss(gained + 1, gained + 1, torch.ones(1), beta, weight), gained)
    assert elsewhere.abs().max() > 1e-3 * beta


def test_why_a_prior_cannot_be_aligned_is_told_in_full():
    one_pass = "needs a prior whose log p is exact in one pass, and 'masked' has it"
    assert alignment_problem(make_prior("masked")) == f"{one_pass} in 12 passes"
    assert alignment_problem(make_prior("masked", order="halton:3")) == f"{one_pass} in 3 passes"
    assert alignment_problem(make_prior("masked", exact=False)) == f"{one_pass} as an estimate of a bound"
    for count in (0, 1):
        problem = alignment_problem(make_prior("gpt", num_classes=count))
        assert problem == f"needs labels of two classes or more (got {count})"
    assert alignment_problem(make_prior("gpt", num_classes=2)) is None


def test_what_is_logged_is_of_images_with_their_label():
    """And a large lambda is no large rate: the loss is divided by it, but never by less than one."""
    prior, frozen = (make_prior("gpt", num_classes=3) for _ in range(2))
    tokens = torch.randint(prior.grid.vocab_size, (6, *prior.grid.shape))
    labels, others = torch.tensor([0, 1, 2, 3, 1, 3]), torch.tensor([1, 2, 0, 0, 0, 1])
    with torch.no_grad():
        own = prior.log_prob(tokens, labels) - frozen.log_prob(tokens, labels)
        other = prior.log_prob(tokens, others) - frozen.log_prob(tokens, others)
        gap, labelled = (own - other)[labels < 3], (labels < 3).float()
        for negatives in (0.0, 0.5, 4.0):
            loss, terms = Alignment(prior, frozen, 0.7, negatives)(tokens, labels, others, {})
            expected = alignment_loss(own, other, labelled, 0.7, negatives)
            bits = -prior.log_prob(tokens, labels).mean() / (12 * math.log(2))
            found = {"cca": expected, "margin": gap.mean(), "above": (gap > 0).float().mean(), "bits_per_token": bits}
            assert set(terms) == set(found)
            for name, value in found.items():
                assert float(terms[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
            assert float(loss) == pytest.approx(float(expected) / max(1.0, negatives), rel=1e-4)
        _, terms = Alignment(prior, frozen, 0.7, 1.0)(tokens, torch.full((6,), 3), others, {})
        assert float(terms["margin"]) == float(terms["above"]) == 0.0  # of none
