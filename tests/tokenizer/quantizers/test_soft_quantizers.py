"""Quantizers in which all codes get a gradient, `ibq` and `gumbel`, against the plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small import make_quantizer, train_on

from tokenizer.quantizers import choice
from tokenizer.quantizers.choice import ChoiceOptions, choose
from tokenizer.quantizers.codebook import nearest_codes
from tokenizer.quantizers.entropy import diversity


def plain(rows, weight, bias, values, how):
    """`choose` as the papers write it: whole matrices, one-hot vectors, autograd."""
    logits = rows @ weight.t() + bias
    sharp = (logits / how.entropy_temperature).log_softmax(1)
    entropy = -(sharp.exp() * sharp).sum(1).mean()
    if how.seed is not None:
        generator = torch.Generator().manual_seed(how.seed)
        uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype)
        logits = logits - (-uniform.clamp(min=1e-300).log()).log()
    p, tokens = (logits / how.temperature).softmax(1), logits.argmax(1)
    if how.hard:
        p = F.one_hot(tokens, len(weight)).to(p) + (p - p.detach())
    return p @ values, tokens, entropy, sharp.exp().mean(0)


def inputs(rows=10, codes=7):
    sizes = [(rows, 3), (codes, 3), (codes,), (codes, 4)]
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def scalar(values, entropy, mean):
    """A scalar of all outputs of a choice, with a different weight for each element."""
    weights = torch.arange(values.numel(), dtype=values.dtype).cos().reshape(values.shape)
    return (values * weights).sum() + 1.3 * entropy + 2 * diversity(mean, share=False)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("held", [21, 1 << 17])  # three rows at a time, and all
def test_blocks_compute_the_plain_formula(monkeypatch, held, hard, seed):
    monkeypatch.setattr(choice, "BLOCK_ELEMENTS", held)
    given, how = inputs(), ChoiceOptions(temperature=0.7, entropy_temperature=0.3, hard=hard, seed=seed)
    one, other = choose(*given, how), plain(*given, how)
    assert torch.equal(one.tokens, other[1]) and len(one.tokens.unique()) > 2
    for found, expected in zip((one.values, one.entropy, one.mean), (other[0], *other[2:]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(scalar(one.values, one.entropy, one.mean), given)
    expected = torch.autograd.grad(scalar(other[0], *other[2:]), given)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        assert theirs.abs().max() > 1e-3


def test_the_backward_pass_is_as_exact_under_autocast():
    given = [tensor.detach().float().requires_grad_() for tensor in inputs(64, 33)]
    made = choose(*given, ChoiceOptions())
    loss = scalar(made.values, made.entropy, made.mean)
    expected = torch.autograd.grad(loss, given, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, given)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_entropies_of_far_apart_logits_are_finite():
    """Codes far from every vector have probability 0 in float32, and log 0 is not finite."""
    rows = torch.tensor([[1e4, 0.0], [2e4, 0.0]], requires_grad=True)
    made = choose(
        rows, torch.eye(2).repeat(2, 1), torch.zeros(4), torch.ones(4, 1), ChoiceOptions(entropy_temperature=0.01)
    )
    spread = diversity(made.mean, share=False)
    (made.entropy + spread).backward()
    assert made.entropy.item() == pytest.approx(math.log(2)) == spread.item() and torch.isfinite(rows.grad).all()


# Index backpropagation


def test_ibq_is_the_paper():
    """Tokens, values, losses and gradients, written with one-hot vectors."""
    quantizer = make_quantizer("ibq", temperature=0.5, entropy=0.05, diversity=0.07).train()
    train_on(quantizer, torch.randn(2, 8, 4, 4))
    z = torch.randn(3, 8, 2, 2, requires_grad=True)
    z_q, tokens, losses = quantizer.quantize(z)
    weights = torch.randn_like(z)
    total = (z_q * weights).sum() + sum(quantizer.loss_weights[name] * loss for name, loss in losses.items())
    found = torch.autograd.grad(total, [z, quantizer.codebook])

    rows, codes = z.movedim(1, -1).reshape(-1, 8), quantizer.codebook
    logits = rows @ codes.t()
    soft = (logits / 0.5).softmax(1)
    hard = F.one_hot(logits.argmax(1), 32).float()
    passed, chosen = (hard + soft - soft.detach()) @ codes, hard @ codes
    pulls = F.mse_loss(passed, rows) + F.mse_loss(rows, chosen.detach()) + 0.25 * F.mse_loss(chosen, rows.detach())
    p = (logits / 0.01).softmax(1)
    mean = p.mean(0) + 1e-30
    sure, spread = -(p * (p + 1e-30).log()).sum(1).mean(), math.log(32) + (mean * mean.log()).sum()
    expected = (passed * weights.movedim(1, -1).reshape(-1, 8)).sum() + pulls + 0.05 * sure + 0.07 * spread
    assert torch.equal(tokens.flatten(), logits.argmax(1)) and torch.equal(z_q, quantizer.lookup(tokens))
    torch.testing.assert_close(total, expected)
    for mine, theirs in zip(found, torch.autograd.grad(expected, [z, codes]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_ibq_starts_with_all_codes_within_reach(normalize):
    """Codes have one length, so that the largest inner product is that of the nearest code."""
    quantizer = make_quantizer("ibq", normalize=normalize).train()
    z = torch.randn(64, 8, 4, 4) * torch.linspace(0.1, 3, 64).reshape(-1, 1, 1, 1)
    tokens = quantizer.quantize(z).tokens
    lengths = quantizer.table().detach().norm(dim=1)
    assert lengths.std() < 1e-4 and float(lengths[0]) == pytest.approx(1.0 if normalize else 4.2, abs=0.4)
    assert torch.equal(tokens.flatten(), nearest_codes(z.movedim(1, -1).reshape(-1, 8), quantizer.table()))
    assert len(tokens.unique()) == 32


# Gumbel-softmax


def set_logits(quantizer, logits):
    """The same logits for every vector."""
    with torch.no_grad():
        quantizer.proj.weight.zero_()
        quantizer.proj.bias.copy_(logits)
    quantizer.started.fill_(1)
    return quantizer


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_codes_are_drawn_from_the_softmax_at_any_temperature(temperature):
    logits = torch.randn(12) * 1.5
    quantizer = set_logits(make_quantizer("gumbel", codes=12, temperature=temperature).train(), logits)
    tokens = quantizer.quantize(torch.randn(200, 8, 10, 10)).tokens.flatten()
    p = logits.softmax(0)
    frequencies = torch.bincount(tokens, minlength=12) / len(tokens)
    assert ((frequencies - p).abs() < 4.5 * (p * (1 - p) / len(tokens)).sqrt()).all()
    pairs = (tokens[1:] == tokens[:-1]).float().mean()  # vectors next to each other are drawn independently
    assert float(pairs) == pytest.approx(float(p.square().sum()), abs=0.02)


def test_noise_comes_from_the_global_generator():
    quantizer = set_logits(make_quantizer("gumbel").train(), torch.zeros(32))
    z, draws = torch.randn(4, 8, 8, 8), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append((quantizer.quantize(z).tokens, quantizer.quantize(z).tokens))
    assert all(torch.equal(one, two) for one, two in zip(*draws[:2], strict=True))
    assert not torch.equal(draws[0][0], draws[0][1]) and not torch.equal(draws[0][0], draws[2][0])


def test_the_temperature_falls_along_a_cosine():
    quantizer = make_quantizer("gumbel", temperature=2.0, final_temperature=0.5, anneal_steps=100)
    assert [quantizer.temperature_at(step) for step in (0, 50, 100, 1000)] == pytest.approx([2.0, 1.25, 0.5, 0.5])
    assert make_quantizer("gumbel", anneal_steps=0, final_temperature=0.3).temperature_at(0) == pytest.approx(0.3)


def test_kl_is_in_nats_per_vector():
    quantizer = set_logits(make_quantizer("gumbel").train(), torch.zeros(32))
    assert quantizer.quantize(torch.randn(2, 8, 4, 4)).losses["kl"].item() == pytest.approx(0, abs=1e-5)
    logits = torch.randn(32)
    set_logits(quantizer, logits)
    expected = (logits.softmax(0) * (logits.softmax(0) * 32).log()).sum()
    assert quantizer.quantize(torch.randn(2, 8, 4, 4)).losses["kl"].item() == pytest.approx(float(expected), rel=1e-5)


def test_gumbel_starts_as_a_mixture_around_the_centres():
    quantizer = make_quantizer("gumbel").train()
    z = torch.randn(8, 8, 8, 8) + 3
    quantizer.quantize(z)
    rows, centres = z.movedim(1, -1).reshape(-1, 8), quantizer.embed.weight
    near = nearest_codes(rows, centres)
    error = (rows - centres[near]).square().mean()
    assert error < 0.6 * rows.var(0).mean()
    assert torch.equal(quantizer.eval().quantize(z).tokens.flatten(), near) and len(near.unique()) == 32
    posterior = (-torch.cdist(rows, centres).square() / (2 * error)).softmax(1)
    assert torch.allclose(quantizer.proj(rows).softmax(1), posterior, atol=1e-3)
