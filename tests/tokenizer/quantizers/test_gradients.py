"""Gradient estimators of the nearest code, codebooks of directions, and revival of codes that learn by gradients."""

from typing import get_args

import pytest
import torch
from small import QUANTIZERS, make_quantizer, train_on

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.codebook import Codebook
from tokenizer.quantizers.gradients import Gradient, pass_gradient, rotate_through

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


@every_gradient
def test_the_value_is_the_code_to_the_bit(gradient):
    z, codes = torch.randn(500, 8) * 3, torch.randn(500, 8) / 3
    passed = pass_gradient(gradient, z.requires_grad_(), codes)
    assert torch.equal(passed, codes) and passed.requires_grad


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


def test_rotation_maps_the_vector_to_its_code():
    z, code = torch.randn(2, 1, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: rotate_through(x, code), z)[0, :, 0]
    torch.testing.assert_close(jacobian @ z[0], code[0])
    rotation = jacobian * z.norm() / code.norm()
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(6, dtype=torch.float64))
    assert float(torch.linalg.det(rotation)) == pytest.approx(1)  # and not a reflection
    across = torch.linalg.qr(torch.cat([z, code, torch.randn(4, 6, dtype=torch.float64)]).t())[0][:, 2:]
    torch.testing.assert_close(rotation @ across, across)  # directions orthogonal to z and its code stay


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


@pytest.mark.parametrize("name", CODEBOOKS)
def test_directions_have_length_one_and_no_scale(name):
    quantizer, z = started(name, normalize=True)
    quantizer.eval()
    z_q, tokens, _ = quantizer.quantize(z)
    torch.testing.assert_close(z_q.norm(dim=1), torch.ones(4, 5, 3))
    assert torch.equal(quantizer.quantize(z * 37.0).tokens, tokens)
    scales = torch.rand(4, 1, 5, 3) * 100 + 0.01  # each position by its own
    assert torch.equal(quantizer.quantize(z * scales).tokens, tokens)
    leaf = z.clone().requires_grad_()
    quantizer.quantize(leaf).z_q.backward(torch.randn(z.shape))
    assert (leaf.grad * z).sum(1).abs().max() < 1e-4  # the length of a vector does not matter


def test_revived_codes_learn():
    """They get gradients as the others do, and the error falls far below that of the codes in use alone."""
    centres, errors = torch.randn(32, 8) * 2, {}
    z = (centres[torch.randint(32, (512,))] + 0.02 * torch.randn(512, 8)).t()[None]
    for below in (0.0, 0.05):
        quantizer = make_quantizer("vq", decay=0.5, revive_every=5, revive_below=below).train()
        train_on(quantizer, z)
        quantizer.codebook.data[8:] = 1000.0  # far from every vector
        quantizer.counts[8:] = 0.0
        optimizer = torch.optim.SGD(quantizer.parameters(), 10.0)
        for _ in range(30):
            losses = quantizer.quantize(z).losses
            optimizer.zero_grad()
            losses["codebook"].backward()
            optimizer.step()
        errors[below] = losses["codebook"].item()
    assert errors[0.05] < 0.3 * errors[0.0]
