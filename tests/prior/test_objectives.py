"""Objectives: cross-entropy some rows at a time, and alignment (CCA), which trains guidance into a prior."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from costs import saved_elements
from small import PRIORS, draw_tokens, make_prior
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipelines.shuffling import other_labels
from prior import Prior, objectives
from prior.objectives import Alignment, Likelihood, alignment_loss, alignment_problem, mean_nats, token_nats


@pytest.fixture
def in_parts(monkeypatch):
    """As if the logits were many: seven rows at a time, of 40 ids."""
    monkeypatch.setattr(objectives, "LARGE", 1)
    monkeypatch.setattr(objectives, "AT_ONCE", 7 * 40 + 3)


def logits_and_ids(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Of 3 images, some of them very sure."""
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 8.0, 60.0])[:, None, None]
    return (torch.randn(3, 20, 40) * scale).to(dtype).requires_grad_(), torch.randint(40, (3, 4, 5))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_torch(in_parts, dtype, smoothing):
    """In float32, to a few units in the last place; a gradient of bf16 logits is rounded to bf16 once, in both."""
    logits, ids = logits_and_ids(dtype)
    plain = F.cross_entropy(logits.float().transpose(1, 2), ids.flatten(1), reduction="none", label_smoothing=smoothing)
    found = token_nats(logits, ids, smoothing)
    assert found.dtype == torch.float32 and torch.allclose(found, plain, rtol=1e-6, atol=1e-6)
    up = torch.randn(3, 20)
    up[1, 3:9] = 0  # as of tokens that a loss leaves out
    (ours,), (theirs,) = (torch.autograd.grad(nats, logits, up) for nats in (found, plain))
    assert ours.dtype == dtype and (ours[1, 3:9] == 0).all()
    assert torch.allclose(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
    if not smoothing and dtype == torch.float32:
        assert torch.allclose(mean_nats(logits, ids), F.cross_entropy(logits.flatten(0, 1), ids.flatten()), rtol=1e-6)


def test_the_backward_pass_needs_only_the_logits(in_parts):
    """In their own type, where plain cross-entropy also keeps a float32 copy."""
    logits, ids = logits_and_ids(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = mean_nats(logits, ids)
    assert sorted((t.numel(), t.dtype) for t in kept if t.numel() > 1) == [(60, torch.int64), (2400, torch.bfloat16)]
    assert {t.data_ptr() for t in kept if t.numel() == 2400} == {logits.data_ptr()}
    loss.backward()
    assert saved_elements(lambda: mean_nats(logits, ids)) < 2400 + 100


@pytest.mark.parametrize(
    ("config", "is_bound"), [({}, True), ({"schedule": "cosine"}, False), ({"label_smoothing": 0.1}, False)]
)
def test_only_a_loss_that_bounds_the_likelihood_is_logged_as_bits(config, is_bound):
    model = make_prior("masked", **config).train()
    tokens, labels = draw_tokens(model, 6), torch.zeros(6, dtype=torch.long)
    loss, logged = Likelihood(model)(tokens, model.read_given(labels, None, 6), model.training_inputs(tokens, 0.0))
    assert loss.requires_grad and torch.isfinite(loss) and ("bits_per_token" in logged) == is_bound
    assert not is_bound or float(logged["bits_per_token"]) == pytest.approx(float(loss.detach()) / math.log(2))


def test_the_loss_is_the_papers():
    own, other = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    labelled = torch.tensor([1.0, 0.0])
    found = alignment_loss(own, other, labelled, beta=0.5, negatives=7.0)
    first = -logsigmoid(torch.tensor(1.5)) - 7 * logsigmoid(torch.tensor(-0.25))
    second = -logsigmoid(torch.tensor(-0.5))  # without its label it has no negative
    assert torch.allclose(found, (first + second) / 2)


ALIGNABLE = [name for name in PRIORS if alignment_problem(make_prior(name, num_classes=3)) is None]


def make_pair(name: str, **config: Any) -> tuple[Prior, Prior]:
    """A prior of three classes and its copy."""
    prior, copy = (make_prior(name, num_classes=3, **config) for _ in range(2))
    copy.load_state_dict(prior.state_dict())
    return prior, copy


def test_only_priors_with_exact_one_pass_likelihoods_and_labels_can_be_aligned():
    assert set(PRIORS) - set(ALIGNABLE) == {"masked"}
    found = {count: alignment_problem(make_prior("gpt", num_classes=count)) is None for count in (0, 1, 2)}
    assert found == {0: False, 1: False, 2: True}


@pytest.mark.parametrize("name", ALIGNABLE)
def test_alignment_raises_the_own_label_above_others_against_a_frozen_copy(name):
    """Both are the same model at first, without dropout. The copy has no gradients and is no part of the module."""
    torch.manual_seed(0)
    fields = type(make_prior(name).config).model_fields
    prior, frozen = make_pair(name, **{key: 0.3 for key in ("dropout", "attention_dropout") if key in fields})
    module = Alignment(prior.train(), frozen.train(), beta=0.5, negatives=2.0).train()
    assert not frozen.training and {*module.parameters()} == {*prior.parameters()}
    assert list(module.state_dict()) == [f"prior.{key}" for key in prior.state_dict()]
    tokens = draw_tokens(prior, 6)
    labels, others = torch.tensor([0, 1, 2, 0, 1, 3]), torch.tensor([1, 2, 0, 2, 0, 0])
    inputs, given = prior.training_inputs(tokens, 0.0), prior.read_given(labels, None, 6)
    optimizer = torch.optim.SGD(prior.parameters(), lr=0.02)
    loss, terms = module(tokens, given, others, inputs)
    assert float(terms["cca"]) == pytest.approx((1 + 2 * 5 / 6) * math.log(2), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(float(terms["cca"]) / 2)
    assert float(terms["margin"]) == pytest.approx(0, abs=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        module(tokens, given, others, inputs)[0].backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    _, after = module(tokens, given, others, inputs)
    assert float(after["cca"]) < float(terms["cca"]) and float(after["margin"]) > 0 and float(after["above"]) > 0.5


def test_logged_terms_are_of_images_with_their_label():
    """The loss is divided by lambda, so that a large one is no large learning rate, but by no less than one."""
    prior, frozen = (make_prior("gpt", num_classes=3) for _ in range(2))
    tokens, labels, others = draw_tokens(prior, 6), torch.tensor([0, 1, 2, 3, 1, 3]), torch.tensor([1, 2, 0, 0, 0, 1])
    given = prior.read_given(labels, None, 6)
    with torch.no_grad():
        own = prior.log_prob(tokens, labels) - frozen.log_prob(tokens, labels)
        other = prior.log_prob(tokens, others) - frozen.log_prob(tokens, others)
        gap, labelled = (own - other)[labels < 3], (labels < 3).float()
        for negatives in (0.5, 4.0):
            loss, terms = Alignment(prior, frozen, 0.7, negatives)(tokens, given, others, {})
            expected = alignment_loss(own, other, labelled, 0.7, negatives)
            bits = -prior.log_prob(tokens, labels).mean() / (12 * math.log(2))
            found = {"cca": expected, "margin": gap.mean(), "above": (gap > 0).float().mean(), "bits_per_token": bits}
            assert {name: float(value) for name, value in terms.items()} == pytest.approx(
                {name: float(value) for name, value in found.items()}, rel=1e-4, abs=1e-5
            )
            assert float(loss) == pytest.approx(float(expected) / max(1.0, negatives), rel=1e-4)
        _, terms = Alignment(prior, frozen, 0.7, 1.0)(tokens, given.without(), others, {})
        assert float(terms["margin"]) == float(terms["above"]) == 0.0  # no image has its label


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
