"""Gradient estimators of the nearest code, codebooks of directions, and revival of codes that learn by gradients."""

from typing import get_args

import pytest
import torch
from small import QUANTIZERS, make_quantizer, train_on

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.codebook import Codebook
from tokenizer.quantizers.gradients import Gradient, pass_gradient

GRADIENTS = get_args(Gradient)
CODEBOOKS = [name for name in QUANTIZERS if issubclass(Quantizer.find(name), Codebook)]
LEARNED = [name for name in CODEBOOKS if Quantizer.find(name).Config.model_fields["gradient"].annotation == Gradient]
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS)


def pulled(kind, z, codes, upstream):
    """The gradient that reaches `z` when `upstream` reaches the code."""
    z = z.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(pass_gradient(kind, z, codes), z, upstream)
    return pulled


def started(name, **config):
    """A codebook that has seen two batches, and vectors for a third."""
    quantizer = make_quantizer(name, **config).train()
    for _ in range(2):
        train_on(quantizer, torch.randn(8, quantizer.dim, 4, 4))
    return quantizer, torch.randn(4, quantizer.dim, 5, 3)


# The two estimators


def test_straight_through_copies_the_gradient():
    z, codes, upstream = torch.randn(3, 20, 8)
    assert torch.equal(pulled("straight_through", z, codes, upstream), upstream)


def test_rotation_is_the_formula_with_constants():
    """(|e| / |z|) (z - 2 (z.w) w + 2 (z.u) e^) with u = z^ and w = (u + e^)^ held constant (Fifty et al. 2024)."""
    z, codes, upstream = torch.randn(3, 50, 8, dtype=torch.float64)
    u, v = z / z.norm(dim=1, keepdim=True), codes / codes.norm(dim=1, keepdim=True)
    w = (u + v) / (u + v).norm(dim=1, keepdim=True)
    scale = codes.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True)
    x = z.clone().requires_grad_()
    formula = scale * (x - 2 * (x * w).sum(1, True) * w + 2 * (x * u).sum(1, True) * v)
    assert torch.allclose(formula, codes, atol=1e-12)
    (expected,) = torch.autograd.grad(formula, x, upstream)
    torch.testing.assert_close(pulled("rotation", z, codes, upstream), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, upstream, atol=0.1)


@every_gradient
@pytest.mark.parametrize(
    ("factor", "scale"), [(1.0, 1.0), (-1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1e-20), (-1.0, 1e15)]
)
def test_awkward_vectors_have_finite_gradients(gradient, factor, scale):
    """z is its code, its opposite or zero, or the code is zero; all of them tiny or huge."""
    z = torch.randn(40, 8)
    codes, z = z * scale, factor * z * (scale or 1.0)
    upstream = torch.randn(40, 8)
    found = pulled(gradient, z, codes, upstream)
    assert torch.isfinite(found).all()
    if factor == scale == 1.0:
        torch.testing.assert_close(found, upstream)


# Codebooks


@pytest.mark.parametrize("name", LEARNED)
def test_the_setting_chooses_the_estimator(name):
    gradients = {}
    for kind in GRADIENTS:
        torch.manual_seed(0)
        quantizer, z = started(name, gradient=kind)
        quantizer.eval()
        z.requires_grad_()
        z_q, tokens, _ = quantizer.quantize(z)
        upstream = torch.randn(z.shape)
        z_q.backward(upstream)
        rows, codes, given = (x.detach().movedim(1, -1).reshape(-1, 8) for x in (z, z_q, upstream))
        gradients[kind] = z.grad.movedim(1, -1).reshape(-1, 8)
        torch.testing.assert_close(gradients[kind], pulled(kind, rows, codes, given))
    assert not torch.allclose(*gradients.values(), atol=0.1)
