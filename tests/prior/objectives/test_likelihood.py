"""Cross-entropy some rows at a time is cross-entropy, and keeps nothing but the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from costs import saved_elements
from small import PRIORS, draw_tokens, make_prior
from torch import Tensor

from prior.objectives import likelihood, mean_nats, token_nats


@pytest.fixture
def in_parts(monkeypatch):
    """As if the logits were many: seven rows at a time, of 40 ids."""
    monkeypatch.setattr(likelihood, "LARGE", 1)
    monkeypatch.setattr(likelihood, "AT_ONCE", 7 * 40 + 3)


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
    assert ours.float().sum(-1).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)  # shares sum to one


def test_the_mean_is_that_of_torch(in_parts):
    logits, ids = logits_and_ids()
    plain = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert torch.allclose(mean_nats(logits, ids), plain, rtol=1e-6)
    (ours,), (theirs,) = (torch.autograd.grad(loss, logits) for loss in (mean_nats(logits, ids), plain))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8)


def test_few_logits_are_treated_as_ever():
    logits, ids = logits_and_ids()
    assert logits.numel() < likelihood.LARGE
    assert torch.equal(mean_nats(logits, ids), F.cross_entropy(logits.flatten(0, 1), ids.flatten()))


def test_only_the_logits_are_kept(in_parts):
    """In their own type: plain cross-entropy keeps as many float32 numbers beside them."""
    logits, ids = logits_and_ids(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = mean_nats(logits, ids)
    assert sorted((t.numel(), t.dtype) for t in kept if t.numel() > 1) == [(60, torch.int64), (2400, torch.bfloat16)]
    assert {t.data_ptr() for t in kept if t.numel() == 2400} == {logits.data_ptr()}
    loss.backward()
    assert saved_elements(lambda: mean_nats(logits, ids)) < 2400 + 100


def test_what_is_not_finite_stays_so(in_parts):
    logits, ids = logits_and_ids()
    with torch.no_grad():
        logits[1, 2, 3] = torch.nan
    nats = token_nats(logits, ids)
    (gradient,) = torch.autograd.grad(nats.sum(), logits)
    assert nats.isnan().sum() == 1 and gradient[1, 2].isnan().all() and gradient.isnan().sum() == 40


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_has_the_same_loss_in_parts(name, monkeypatch):
    """Also under autocast, where the logits are bf16."""
    torch.manual_seed(0)
    model = make_prior(name, (4, 4), 7).train()
    tokens, labels = draw_tokens(model, 8), torch.arange(8) % 4
    inputs = model.training_inputs(tokens, 0.3)
    for bf16 in (False, True):
        found = []
        for large in (likelihood.LARGE, 1):
            monkeypatch.setattr(likelihood, "LARGE", large)
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model.loss_from_outputs(model(tokens, labels, **inputs), tokens, **inputs)
            gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
            found.append([loss, *(gradient for gradient in gradients if gradient is not None)])
        scale = max(float(part.detach().abs().max()) for part in found[0])
        assert len(found[0]) > 1 and len(found[0]) == len(found[1])
        for plain, parts in zip(*found, strict=True):
            assert (plain - parts).abs().max() <= (0.01 if bf16 else 1e-5) * scale


@pytest.mark.parametrize("name", [*PRIORS, "binary made"])
def test_bf16_logits_are_computed_with_in_float32(name):
    """The loss is that of the same logits cast before, as accelerate did."""
    torch.manual_seed(0)
    vocab_size = 2 if name == "binary made" else 7
    model = make_prior(name.removeprefix("binary "), (4, 4), vocab_size).train()
    tokens, labels = draw_tokens(model, 8), torch.arange(8) % 4
    inputs = model.training_inputs(tokens, 0.3)
    logits = 3 * torch.randn_like(model(tokens, labels, **inputs)).bfloat16()
    assert torch.equal(
        model.loss_from_outputs(logits, tokens, **inputs), model.loss_from_outputs(logits.float(), tokens, **inputs)
    )


def test_it_compiles(in_parts):
    logits, ids = logits_and_ids()
    compiled = torch.compile(mean_nats, backend="aot_eager", fullgraph=True)
    (ours,), (plain,) = (torch.autograd.grad(loss(logits, ids), logits) for loss in (compiled, mean_nats))
    assert torch.allclose(ours, plain, atol=1e-7)


@pytest.mark.parametrize("large", [1, 2400, 2401])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_few_logits_or_many_are_smoothed_alike(large, smoothing, monkeypatch):
    monkeypatch.setattr(likelihood, "LARGE", large)
    logits, ids = logits_and_ids()
    plain = F.cross_entropy(logits.transpose(1, 2), ids.flatten(1), reduction="none", label_smoothing=smoothing)
    assert torch.allclose(token_nats(logits, ids, smoothing), plain, rtol=1e-6, atol=1e-6)
    assert torch.allclose(mean_nats(logits, ids), F.cross_entropy(logits.flatten(0, 1), ids.flatten()), rtol=1e-6)


def test_a_prior_and_its_loss_are_one_call():
    """In nats per token, and what is logged is in bits."""
    model = make_prior("gpt", any_order=True).train()
    tokens, labels = draw_tokens(model, 4), torch.arange(4)
    inputs = {"order": torch.rand(4, 12).argsort(1)}
    loss, logged = likelihood.Likelihood(model)(tokens, labels, inputs)
    expected = -model.token_log_probs(tokens, labels, inputs["order"]).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5) and loss.requires_grad
    assert set(logged) == {"bits_per_token"} and not logged["bits_per_token"].requires_grad
    assert float(logged["bits_per_token"]) == pytest.approx(float(loss.detach()) / 0.6931471805599453)


@pytest.mark.parametrize(
    ("config", "is_bound"),
    [
        ({}, True),
        ({"schedule": "cosine"}, False),
        ({"schedule": "arccos"}, False),
        ({"label_smoothing": 0.1}, False),
        ({"schedule": "square", "label_smoothing": 0.1}, False),
    ],
)
def test_a_loss_that_bounds_no_likelihood_is_not_logged_as_bits(config, is_bound):
    """The loss itself is what is minimised, whatever it is."""
    model = make_prior("masked", **config).train()
    tokens, labels = draw_tokens(model, 6), torch.zeros(6, dtype=torch.long)
    inputs = model.training_inputs(tokens, 0.0)
    loss, logged = likelihood.Likelihood(model)(tokens, labels, inputs)
    assert loss.requires_grad and torch.isfinite(loss)
    assert ("bits_per_token" in logged) == is_bound
    if is_bound:
        assert float(logged["bits_per_token"]) == pytest.approx(float(loss.detach()) / 0.6931471805599453)


def test_so_many_rows_are_in_float32_at_a_time(monkeypatch):
    monkeypatch.setattr(likelihood, "AT_ONCE", 100)
    assert [likelihood.rows_at_once(torch.empty(9, ids)) for ids in (1, 33, 50, 51, 100, 101)] == [100, 3, 2, 1, 1, 1]
