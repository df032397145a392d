"""How gradients pass a code, codebooks of directions, and the revival of codes that learn by gradients."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from small import QUANTIZERS, make_quantizer, train_on

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.codebook import Codebook, nearest
from tokenizer.quantizers.gradients import Gradient, pass_gradient, rotate_through

GRADIENTS = get_args(Gradient)
CODEBOOKS = [name for name in QUANTIZERS if issubclass(Quantizer.find(name), Codebook)]
CHOICES = {
    name: get_args(Quantizer.find(name).Config.model_fields["gradient"].annotation) for name in CODEBOOKS
}  # an idea may bring its own way of passing gradients, and no other
every_codebook = pytest.mark.parametrize(("name", "gradient"), [(n, g) for n in CODEBOOKS for g in CHOICES[n]])
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


def test_straight_through_hands_the_gradient_on():
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


def test_rotation_turns_the_vector_onto_its_code():
    z, code = torch.randn(2, 1, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: rotate_through(x, code), z)[0, :, 0]
    torch.testing.assert_close(jacobian @ z[0], code[0])
    rotation = jacobian * z.norm() / code.norm()
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(6, dtype=torch.float64))
    assert float(torch.linalg.det(rotation)) == pytest.approx(1)  # and not a reflection
    across = torch.linalg.qr(torch.cat([z, code, torch.randn(4, 6, dtype=torch.float64)]).t())[0][:, 2:]
    torch.testing.assert_close(rotation @ across, across)  # what lies across z and its code stays


def test_rotation_keeps_the_angle_between_gradient_and_code():
    z, codes, upstream = torch.randn(3, 100, 8, dtype=torch.float64)
    gradient = pulled("rotation", z, codes, upstream)
    before, after = F.cosine_similarity(upstream, codes), F.cosine_similarity(gradient, z)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(gradient.norm(dim=1) / upstream.norm(dim=1), codes.norm(dim=1) / z.norm(dim=1))
    straight = F.cosine_similarity(pulled("straight_through", z, codes, upstream), z)
    assert (straight - before).abs().max() > 0.5


@every_gradient
@pytest.mark.parametrize(
    ("factor", "scale"), [(1.0, 1.0), (-1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1e-20), (-1.0, 1e15)]
)
def test_awkward_vectors_have_finite_gradients(gradient, factor, scale):
    """z is its code, its opposite, zero, or the code is zero; and all of them tiny or huge."""
    z = torch.randn(40, 8)
    codes, z = z * scale, factor * z * (scale or 1.0)
    upstream = torch.randn(40, 8)
    found = pulled(gradient, z, codes, upstream)
    assert torch.isfinite(found).all()
    if factor == scale == 1.0:
        torch.testing.assert_close(found, upstream)


# Every codebook takes both estimators, and directions


def test_there_are_codebooks_with_both_estimators():
    assert sum(choices == GRADIENTS for choices in CHOICES.values()) >= 3


@every_codebook
@pytest.mark.parametrize("normalize", [False, True])
def test_codebooks_keep_their_promises(name, gradient, normalize):
    quantizer, z = started(name, gradient=gradient, normalize=normalize)
    leaf = z.clone().requires_grad_()
    z_q, _, losses = quantizer.quantize(leaf)
    assert set(losses) == set(quantizer.loss_weights)
    assert all(loss.ndim == 0 and loss >= 0 for loss in losses.values())
    (z_q * torch.randn_like(z_q)).sum().backward()
    assert torch.isfinite(leaf.grad).all() and (leaf.grad.abs().sum((0, 2, 3)) > 0).all()

    quantizer.eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    z_q, tokens, _ = quantizer.quantize(z)
    assert torch.equal(z_q, quantizer.lookup(tokens)) and z_q.shape == z.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.quantize(z).tokens, tokens) and torch.equal(quantizer.lookup(tokens), z_q)
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
    codes = quantizer.lookup(torch.arange(quantizer.vocab_size)[None])[0].t()
    assert len(codes.unique(dim=0)) == quantizer.vocab_size


@pytest.mark.parametrize("name", [name for name in CODEBOOKS if CHOICES[name] == GRADIENTS])
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


@every_codebook
def test_directions_have_length_one_and_no_scale(name, gradient):
    quantizer, z = started(name, gradient=gradient, normalize=True)
    quantizer.eval()
    z_q, tokens, _ = quantizer.quantize(z)
    torch.testing.assert_close(z_q.norm(dim=1), torch.ones(4, 5, 3))
    assert torch.equal(quantizer.quantize(z * 37.0).tokens, tokens)
    scales = torch.rand(4, 1, 5, 3) * 100 + 0.01  # each position by its own
    assert torch.equal(quantizer.quantize(z * scales).tokens, tokens)
    leaf = z.clone().requires_grad_()
    quantizer.quantize(leaf).z_q.backward(torch.randn(z.shape))
    assert (leaf.grad * z).sum(1).abs().max() < 1e-4  # a longer vector is no other vector


def test_directions_are_compared_by_cosine():
    """A long code is not nearer than a short one of a better direction."""
    quantizer = make_quantizer("vq", codes=2, dim=2, normalize=True).eval()
    quantizer.codebook.data.copy_(torch.tensor([[10.0, 0.0], [0.1, 0.1]]))
    assert quantizer.quantize(torch.tensor([9.0, 6.0]).reshape(1, 2, 1)).tokens.item() == 1


def test_large_codebooks_of_directions_are_searched_right():
    """LlamaGen's 16384 x 8, in parts: as near as the nearest of all, by cosine in float64."""
    rows, codes = F.normalize(torch.randn(256, 8), dim=1), F.normalize(torch.randn(16384, 8), dim=1)
    cosines = rows.double() @ codes.double().t()
    found = cosines.gather(1, nearest(rows, codes)[:, None])[:, 0]
    assert (cosines.amax(1) - found).max() < 1e-6 and found.min() > 0.7


# Codes that learn by gradients and are nobody's nearest


def clusters(points=512):
    centres = torch.randn(32, 8) * 2
    return centres[torch.randint(32, (points,))] + 0.02 * torch.randn(points, 8)


def with_dead_codes(rows, **config):
    """A codebook of 32 whose codes from 8 on lie where no vector does, and have for long."""
    quantizer = make_quantizer("vq", decay=0.5, revive_every=5, **config).train()
    train_on(quantizer, rows.t()[None])
    quantizer.codebook.data[8:] = 1000.0
    quantizer.counts[8:] = 0.0
    return quantizer


def test_dead_codes_come_back_without_gradients():
    rows = clusters()
    quantizer = with_dead_codes(rows)
    alive = quantizer.codebook.detach()[:8].clone()
    for _ in range(4):
        train_on(quantizer, rows.t()[None])
    codebook = quantizer.codebook.detach()
    back = codebook[8:]
    assert torch.equal(codebook[:8], alive)
    assert (back[:, None] == rows).all(2).any(1).all()  # each on a vector of the batch
    assert len(back.unique(dim=0)) == 24
    assert quantizer.counts[8:].min() == quantizer.counts[8:].max() > 0  # a fresh start
    for _ in range(60):
        train_on(quantizer, rows.t()[None])
    assert len(quantizer.quantize(rows.t()[None]).tokens.unique()) >= 28


def test_dead_codes_stay_dead_if_so_asked():
    rows = clusters()
    quantizer = with_dead_codes(rows, revive_below=0)
    for _ in range(60):
        tokens = train_on(quantizer, rows.t()[None]).tokens
    assert (quantizer.codebook[8:] == 1000).all() and int(tokens.max()) < 8


def test_revived_codes_learn():
    """They get gradients as the others do, and the error falls to a fraction of what the living could reach."""
    rows, errors = clusters(), {}
    for below in (0.0, 0.05):
        quantizer = with_dead_codes(rows, revive_below=below)
        optimizer = torch.optim.SGD(quantizer.parameters(), 10.0)
        for _ in range(30):
            losses = quantizer.quantize(rows.t()[None]).losses
            optimizer.zero_grad()
            losses["codebook"].backward()
            optimizer.step()
        errors[below] = losses["codebook"].item()
    assert errors[0.05] < 0.3 * errors[0.0]
