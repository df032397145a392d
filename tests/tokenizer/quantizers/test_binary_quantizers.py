"""Signs as ids, `lfq` and `bsq`: entropies against brute force, levels, and codes in use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.entropy import bit_diversity, mean_probabilities

BINARY = ["bsq", "lfq"]
TEMPERATURE = {"bsq": 0.2, "lfq": 1.5}  # soft enough that all codes of 6 bits matter
both = pytest.mark.parametrize("name", BINARY)


def make(name: str, **config: Any) -> Any:
    return Quantizer.create(name, **config).train()


def weighted(quantizer: Any, losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([quantizer.loss_weights[name] * loss for name, loss in losses.items()]).sum()


def all_codes(quantizer: Any) -> torch.Tensor:
    """(vocab_size, bits)."""
    return quantizer.lookup(torch.arange(quantizer.vocab_size).reshape(1, -1))[0].t()


def brute_force(name: str, quantizer: Any, z: torch.Tensor) -> torch.Tensor:
    """p of each code for each vector, `(n, 2^bits)` float64, as the papers write it: a softmax over all codes."""
    rows, codes = z.movedim(1, -1).flatten(0, -2).double(), all_codes(quantizer).double()
    if name == "lfq":
        return (-(rows.unsqueeze(1) - codes).square().sum(-1) / TEMPERATURE[name]).softmax(1)
    return (rows / rows.norm(dim=1, keepdim=True) @ codes.t() / TEMPERATURE[name]).softmax(1)


def entropy_of(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).sum(-1)


# The entropies


@both
@pytest.mark.parametrize("bits", [2, 5])
def test_entropies_are_those_of_all_codes(name, bits):
    """Value and gradient, against the softmax over the whole codebook; a group that holds all bits is exact."""
    quantizer = make(name, bits=bits, group=bits, temperature=TEMPERATURE[name])
    z = (torch.randn(3, bits, 8, 5) * 0.7 + torch.linspace(-0.5, 0.5, bits)[:, None, None]).requires_grad_()
    losses = quantizer.quantize(z).losses
    p = brute_force(name, quantizer, z)
    expected = {"entropy": entropy_of(p).mean(), "diversity": bits * math.log(2) - entropy_of(p.mean(0))}
    for loss, value in expected.items():
        assert value > 0.01 and torch.allclose(losses[loss].double(), value, rtol=1e-4, atol=1e-6), loss
        found = torch.autograd.grad(losses[loss], z, retain_graph=True)[0]
        wanted = torch.autograd.grad(value, z, retain_graph=True)[0]
        assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max() and wanted.abs().max() > 1e-4, loss


@pytest.mark.parametrize("group", [1, 2, 5])
def test_groups_bound_the_diversity_from_below(group):
    """H(E[p]) <= the sum of the groups' entropies; the gap is their mutual information."""
    logits = torch.randn(200, 6) * 3
    logits[:, 3:] = logits[:, :3] + 0.1 * torch.randn(200, 3)  # equal halves
    exact, found = bit_diversity(logits, 6), bit_diversity(logits, group)
    assert 0 <= found < exact - 0.1
    groups = logits.tensor_split(math.ceil(6 / group), dim=1)
    parts = [part.shape[1] * math.log(2) - entropy_of(mean_probabilities(part)) for part in groups]
    assert max(part.shape[1] for part in groups) <= group
    assert torch.allclose(found, torch.stack(parts).sum(), atol=1e-5)


@both
def test_saturated_bits_have_finite_gradients(name):
    quantizer = make(name, bits=6, temperature=1e-3)
    z = (torch.randn(2, 6, 4, 4).sign() * 300).requires_grad_()
    losses = quantizer.quantize(z).losses
    weighted(quantizer, losses).backward()
    assert all(torch.isfinite(loss) for loss in losses.values()) and torch.isfinite(z.grad).all()
    make(name, bits=256, levels=16).quantize(torch.randn(1, 256, 3, 2))


# Ids and levels


@both
def test_ids_are_the_bits_of_the_signs(name):
    quantizer = make(name, bits=6, levels=2).eval()
    z = torch.randn(2, 6, 3, 4)
    z_q, tokens, _ = quantizer.quantize(z)
    assert quantizer.vocab_size == 8 and tokens.shape == (2, 6, 4)
    for level in range(2):
        bits = z[:, 3 * level : 3 * level + 3] > 0
        expected = bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2]
        assert torch.equal(tokens[:, 3 * level : 3 * level + 3], expected)
    size = 1.0 if name == "lfq" else 6**-0.5
    assert torch.allclose(z_q, z.sign() * size) and torch.equal(quantizer.lookup(tokens), z_q)


# Gradients


def test_bsq_depends_on_directions_only():
    """Codes and losses do not depend on the length of a vector, and gradients are orthogonal to it."""
    quantizer, z = make("bsq", bits=9), torch.randn(2, 9, 4, 4, requires_grad=True)
    output, longer = quantizer.quantize(z), quantizer.quantize(100 * z)
    assert torch.equal(output.tokens, longer.tokens)
    for loss in output.losses:
        assert torch.allclose(output.losses[loss], longer.losses[loss], rtol=1e-4)
    assert torch.allclose(output.z_q.norm(dim=1), torch.ones(2, 4, 4))
    (output.z_q * torch.randn_like(z)).sum().backward()
    assert (z.grad * z).sum(1).abs().max() < 1e-4 and z.grad.abs().max() > 0.1


def test_commitment_is_in_units_of_the_code():
    z = torch.tensor([0.6, 0.8, 0.0, 0.0]).reshape(1, 4, 1)
    codes = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert torch.allclose(make("lfq", bits=4).quantize(z).losses["commitment"], (z.flatten() - codes).square().mean())
    on_the_sphere = (z.flatten() - codes / 2).square().sum()  # the paper's |u - code|^2
    assert torch.allclose(make("bsq", bits=4).quantize(z).losses["commitment"], on_the_sphere)


# Codes in use


def usage(name: str, weight: float, offset: float) -> tuple[int, int]:
    """The number of codes that 64 clusters use before and after a linear encoder learns from the losses alone."""
    torch.manual_seed(0)
    points = torch.randn(64, 16).repeat(2, 1) + 0.05 * torch.randn(128, 16)
    quantizer, encoder = make(name, diversity=weight), nn.Linear(16, 9)
    nn.init.constant_(encoder.bias, offset)
    optimizer, used = torch.optim.Adam(encoder.parameters(), 0.03), []
    for _ in range(80):
        output = quantizer.quantize(encoder(points).t()[None])
        used.append(len(output.tokens.unique()))
        optimizer.zero_grad()
        weighted(quantizer, output.losses).backward()
        optimizer.step()
    return used[0], used[-1]


@both
def test_diversity_keeps_codes_in_use(name):
    """It revives an encoder that has collapsed to a single code."""
    first, last = usage(name, 0.1, 3.0)
    assert first == 1 and last >= 32
    assert usage(name, 0.0, 3.0)[1] <= 2
