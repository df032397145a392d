"""Codebooks: directions, k-means, initialization, revival, gradients, and rows of several ranks.

Ranks are threads here (`of_ranks`).
"""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import of_ranks
from small import QUANTIZERS, latents, make_quantizer, train_on
from torch import Tensor

from tokenizer.quantizers import Quantizer, codebook, gumbel
from tokenizer.quantizers.codebook import Codebook, CountedCodebook, kmeans, rows_of
from tokenizer.quantizers.gradients import Gradient, pass_gradient

CODEBOOKS = [name for name in QUANTIZERS if issubclass(Quantizer.find(name), Codebook)]
COUNTED = [name for name in CODEBOOKS if issubclass(Quantizer.find(name), CountedCodebook)]
every_codebook = pytest.mark.parametrize("name", CODEBOOKS)
every_counted = pytest.mark.parametrize("name", COUNTED)
GRADIENTS = get_args(Gradient)
LEARNED = [name for name in CODEBOOKS if Quantizer.find(name).Config.model_fields["gradient"].annotation == Gradient]


def apart(some: Tensor, others: Tensor) -> Tensor:
    """Distances (some, others), accurate also where they are small."""
    return torch.cdist(some, others, compute_mode="donot_use_mm_for_euclid_dist")


# Directions


@every_codebook
def test_directions_are_normalized_on_both_sides(name):
    for normalize in (False, True):
        quantizer = make_quantizer(name, normalize=normalize).eval()
        with torch.no_grad():
            quantizer.codebook.mul_(5)
        z, table = torch.randn(4, 8, 5, 3), quantizer.table().detach()
        assert torch.allclose(table.norm(dim=1), torch.ones(32)) == normalize
        found = quantizer.quantize(z)
        assert torch.equal(found.z_q.detach(), F.embedding(found.tokens, table).movedim(-1, 1))
        rows = F.normalize(rows_of(z), dim=1) if normalize else rows_of(z)
        scores = rows @ table.t() if name == "ibq" else -torch.cdist(rows, table)
        assert torch.equal(found.tokens.flatten(), scores.argmax(1))


# k-means


def test_each_step_of_kmeans_moves_each_centre_to_the_mean_of_its_rows():
    rows = torch.randn(60, 3)
    assert torch.equal(kmeans(rows, 7, 0), rows[:7])
    for steps in range(4):
        centres = kmeans(rows, 7, steps)
        near = torch.cdist(rows, centres).argmin(1)
        expected = torch.stack([rows[near == code].mean(0) for code in range(7)])
        torch.testing.assert_close(kmeans(rows, 7, steps + 1), expected)


@pytest.mark.parametrize("normalize", [False, True])
@every_counted
def test_the_error_never_rises_over_a_lloyd_step(name, normalize):
    """Codes move to the mean of their nearest vectors, whatever the batches, and codes without vectors stay."""
    quantizer = make_quantizer(name, normalize=normalize).eval()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.randn(32, 8))
        quantizer.codebook[5] = quantizer.codebook[20] = 1000.0  # far from all vectors
    z, errors = torch.randn(6, 8, 5, 4) - 1, []
    for _ in range(6):
        rows, table = quantizer.comparable(rows_of(z)), quantizer.table().detach()
        tokens, before = quantizer.encode(z).flatten(), quantizer.codebook.detach().clone()
        errors.append(float((rows - table[tokens]).double().square().mean()))
        quantizer.lloyd_step(z.split(4))
        for code in range(32):
            near = rows[tokens == code]
            expected = near.mean(0) if len(near) else before[code]
            torch.testing.assert_close(quantizer.codebook.detach()[code], expected)
            assert len(near) or torch.equal(quantizer.codebook.detach()[code], before[code])
        assert code not in (5, 20) or not len(near)
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors)) and errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_without_means_refuse_a_lloyd_step(name):
    """Codes that are compared otherwise, or come from a network, would get worse."""
    quantizer = make_quantizer(name)
    assert quantizer.has_means == (name in ("ema", "vq", "rvq"))
    if not quantizer.has_means:
        with pytest.raises(ValueError, match="not means"):
            quantizer.lloyd_step([torch.randn(2, quantizer.dim, 3, 3)])


def test_training_continues_from_the_codes_of_a_lloyd_step():
    """The running means hold them; codes that are not used do not jump back."""
    quantizer = make_quantizer("ema", revive_every=100).train()
    for _ in range(3):
        train_on(quantizer, torch.randn(8, 8, 4, 4))
    quantizer.eval().lloyd_step([torch.randn(64, 8, 4, 4)])
    refined, counts = quantizer.codebook.clone(), quantizer.counts.clone()
    train_on(quantizer.train(), refined[3].view(1, 8, 1, 1))
    torch.testing.assert_close(quantizer.codebook, refined, rtol=1e-4, atol=1e-6)
    assert not torch.equal(quantizer.counts, counts)


# The start


@every_codebook
def test_a_codebook_starts_from_rows_that_its_seed_chooses(monkeypatch, name):
    seen: list[Tensor] = []

    def watched(rows: Tensor, clusters: int, iterations: int) -> Tensor:
        assert (clusters, iterations) == (2, 3)
        seen.append(rows)
        return kmeans(rows, clusters, iterations)

    monkeypatch.setattr(codebook, "kmeans", watched)
    z = torch.randn(1, 8, 100)
    for seed in (0, 0, 1):
        made = make_quantizer(name, codes=2, kmeans_iterations=3, seed=seed).train()
        made.quantize(z)
        assert made.step == 1
    rows = F.normalize(rows_of(z), dim=1) if name == "ibq" else rows_of(z)
    for sample in seen:  # different ones of the rows
        assert len(sample) == 64 and (apart(sample, rows).amin(1) < 1e-6).all()
        assert len(sample.unique(dim=0)) == 64
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("count", [1, 16])
def test_a_codebook_of_few_rows_holds_those_rows_with_jitter(count):
    rows = torch.randn(count, 8) * 0.1 + 3
    quantizer = make_quantizer("vq", kmeans_iterations=0)
    quantizer.start(rows)
    away = apart(quantizer.codebook.detach(), rows)
    assert len(away.argmin(1).unique()) == count and len(quantizer.codebook.unique(dim=0)) == 32
    spread = 0.01 * rows.std() * 8**0.5  # the expected distance
    assert away.amin(1).mean() == pytest.approx(float(spread), rel=0.1)


# Use, and revival


@every_counted
def test_dead_codes_become_vectors_of_the_step_of_mean_use(name):
    quantizer = make_quantizer(name, decay=0.0, revive_every=1, revive_below=0.5).train()
    train_on(quantizer, torch.randn(16, 8, 4, 4))
    z = torch.randn(16, 8, 4, 4)
    tokens = quantizer.quantize(z).tokens
    use = torch.bincount(tokens.flatten(), minlength=32).float()
    dead = use < 0.5 * use.mean()
    assert 3 < dead.sum() < 29 and torch.equal(quantizer.counts[~dead], use[~dead])
    revived = quantizer.codebook.detach()[dead]
    assert (apart(revived, rows_of(z)).amin(1) < 1e-6).all() and len(revived.unique(dim=0)) == len(revived)
    counts = quantizer.counts[dead]
    assert counts.min() == counts.max() == use.mean()
    if name == "ema":
        torch.testing.assert_close(quantizer.sums[dead], revived * use.mean())


@every_counted
def test_at_most_as_many_codes_as_rows_are_revived(name):
    quantizer = make_quantizer(name, revive_every=1)
    quantizer.counts.copy_(torch.tensor([10.0] * 10 + [0.0] * 22))
    rows = torch.randn(9, 8)
    dead, vectors = quantizer.dead_codes(rows)
    assert dead.tolist() == list(range(10, 19))
    assert torch.equal(vectors.unique(dim=0), rows.unique(dim=0))
    quantizer.train().started.add_(1)
    assert not torch.equal(quantizer.dead_codes(rows)[1], vectors)  # others the next time
    quantizer.counts.fill_(1)
    dead, vectors = quantizer.dead_codes(rows)
    assert dead.shape == (0,) and vectors.shape == (0, 8)


def test_ema_smooths_small_counts_as_the_paper_does():
    """Laplace smoothing: 1e-5 more for each code, with the same sum."""
    quantizer = make_quantizer("ema", decay=0.5, revive_below=0.0, revive_every=100).train()
    train_on(quantizer, torch.randn(8, 8, 4, 4))
    quantizer.counts.copy_(torch.linspace(0, 1e-4, 32))
    quantizer.sums.normal_()
    train_on(quantizer, torch.full((1, 8, 1, 1), 1e-4))
    counts, sums = quantizer.counts.double(), quantizer.sums.double()
    smoothed = counts + 1e-5
    smoothed *= counts.sum() / smoothed.sum()
    torch.testing.assert_close(quantizer.codebook.double(), sums / smoothed[:, None], rtol=1e-5, atol=0)


# Gradients of the nearest code


def pulled(kind, z, codes, upstream):
    """The gradient that reaches `z` when `upstream` reaches the code."""
    z = z.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(pass_gradient(kind, z, codes), z, upstream)
    return pulled


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


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("factor", "scale"), [(1.0, 1.0), (-1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (-1.0, 1e-20)])
def test_awkward_vectors_have_finite_gradients(gradient, factor, scale):
    """z is its code, its opposite or zero, or the code is zero; all of them tiny or huge."""
    z = torch.randn(40, 8)
    codes, z = z * scale, factor * z * (scale or 1.0)
    upstream = torch.randn(40, 8)
    found = pulled(gradient, z, codes, upstream)
    assert torch.isfinite(found).all()
    if factor == scale == 1.0:
        torch.testing.assert_close(found, upstream)


@pytest.mark.parametrize("name", LEARNED)
def test_the_setting_chooses_the_estimator(name):
    gradients = {}
    for kind in GRADIENTS:
        torch.manual_seed(0)
        quantizer = make_quantizer(name, gradient=kind).train()
        train_on(quantizer, torch.randn(8, quantizer.dim, 4, 4))
        z = torch.randn(4, quantizer.dim, 5, 3, requires_grad=True)
        quantizer.eval()
        z_q, tokens, _ = quantizer.quantize(z)
        upstream = torch.randn(z.shape)
        z_q.backward(upstream)
        rows, codes, given = (x.detach().movedim(1, -1).reshape(-1, 8) for x in (z, z_q, upstream))
        gradients[kind] = z.grad.movedim(1, -1).reshape(-1, 8)
        torch.testing.assert_close(gradients[kind], pulled(kind, rows, codes, given))
    assert not torch.allclose(*gradients.values(), atol=0.1)


# Ranks


@pytest.mark.parametrize("name", [*CODEBOOKS, "gumbel", "rvq", "multiscale"])
def test_ranks_that_round_differently_start_from_the_codes_of_rank_0(monkeypatch, name):
    def rounded(rows: Tensor, clusters: int, iterations: int) -> Tensor:
        return kmeans(rows, clusters, iterations) + 1e-3 * dist.get_rank()

    monkeypatch.setattr(codebook, "kmeans", rounded)
    monkeypatch.setattr(gumbel, "kmeans", rounded)
    quantizers = [make_quantizer(name).train() for _ in range(2)]
    for quantizer in quantizers[1:]:
        quantizer.load_state_dict(quantizers[0].state_dict())
    z = latents(quantizers[0], 16, 4, 4)
    of_ranks(2, lambda rank: quantizers[rank].quantize(z[8 * rank :][:8]))
    one, two = (quantizer.state_dict() for quantizer in quantizers)
    for key in one:
        assert torch.equal(one[key], two[key]), key
