"""The Frechet distance: closed forms, and moments of parts, of others, and of all rows, which agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from optional import needs_torch_fidelity, needs_torchmetrics

from pipelines.metrics import frechet
from pipelines.metrics.frechet import distance, frechet_distance, joined, moments, moments_in_parts, moments_of


def gaussian(count, dim, seed=0, scale=1.0):
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_with(mean, covariance, count=50, seed=0):
    """Rows whose sample mean and covariance are exactly these."""
    rows = gaussian(count, len(mean), seed)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.t() @ rows / (count - 1))).t()
    return white @ torch.linalg.cholesky(covariance).t() + mean


def random_covariance(dim, seed):
    factor = gaussian(2 * dim, dim, seed)
    return factor.t() @ factor / dim


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.t()


@pytest.mark.parametrize("dim", [1, 4, 30])
def test_frechet_distance_of_known_gaussians(dim):
    means, covariances = gaussian(2, dim, 1), [random_covariance(dim, seed) for seed in (2, 3)]
    a, b = (rows_with(mean, cov, seed=seed) for seed, (mean, cov) in enumerate(zip(means, covariances, strict=True)))
    root = square_root(covariances[0])
    cross = square_root(root @ covariances[1] @ root).trace()
    expected = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * dim, rel=1e-9)
    assert frechet_distance(a, 2 * (a - means[0]) + means[0]) == pytest.approx(float(covariances[0].trace()), rel=1e-9)


@pytest.mark.parametrize("count", [2, 10, 64, 300])
def test_frechet_distance_to_itself_is_zero(count):
    """With fewer rows than features the covariance is singular, and nothing may be lost for that."""
    rows = gaussian(count, 64, scale=10)
    assert abs(frechet_distance(rows, rows)) < 1e-8 and abs(frechet_distance(rows, rows.flip(0))) < 1e-8
    assert abs(frechet_distance(rows.float(), rows.float())) < 1e-6


@needs_torchmetrics
def test_frechet_distance_is_torchmetrics_with_our_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    net = torch.nn.Flatten()
    net.num_features = 16  # type: ignore[assignment]
    metric = FrechetInceptionDistance(net, normalize=True)
    a, b = gaussian(100, 16, 0).reshape(-1, 1, 4, 4), gaussian(80, 16, 1, 1.3).reshape(-1, 1, 4, 4)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a.flatten(1), b.flatten(1)) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_frechet_bias_falls_with_the_number_of_rows():
    """Of the same distribution, and yet not 0: hence equally many on both sides, and the row of training images."""
    found = [frechet_distance(gaussian(n, 32, 2 * n), gaussian(n, 32, 2 * n + 1)) for n in (100, 200, 400, 800, 3200)]
    assert all(more > 1.6 * fewer > 0 for more, fewer in zip(found, found[1:], strict=False))


# Moments


def covariance(found):
    return found.factor.t() @ found.factor


@pytest.mark.parametrize("sizes", [(7, 5), (1, 1, 60), (30, 1), (200, 100, 50)])
def test_moments_of_parts_are_those_of_all_rows(sizes, monkeypatch):
    """Fewer rows than features or more, in parts of any size, down to one row."""
    parts = [gaussian(count, 20, seed, 1 + seed) + 3 * seed for seed, count in enumerate(sizes)]
    rows = torch.cat(parts)
    whole, other = moments(rows), moments(gaussian(80, 20, 9))
    for held in (1, 40, 1 << 13):
        monkeypatch.setattr(frechet, "ROWS", held)
        found = moments_in_parts(iter(parts))
        assert found.count == len(rows)
        torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(covariance(found), rows.t().cov(), rtol=1e-12, atol=1e-12)
        assert distance(found, other) == pytest.approx(distance(whole, other), rel=1e-11)
    first, second = (moments(torch.cat(half)) for half in (parts[:1], parts[1:]))
    assert distance(joined(first, second), other) == pytest.approx(distance(joined(second, first), other), rel=1e-11)
    assert moments_in_parts([]) is None


@pytest.mark.parametrize("count", [12, 300])
def test_moments_of_others_give_the_distance_of_rows(count):
    """By a mean and a covariance, of full rank or not: to the square root of what float64 rounds."""
    rows, other = gaussian(count, 32, 0, 2.0), gaussian(500, 32, 1)
    given = moments_of(count, rows.mean(0), rows.t().cov())
    assert distance(given, moments(other)) == pytest.approx(frechet_distance(rows, other), rel=1e-7)
    torch.testing.assert_close(covariance(given), rows.t().cov(), rtol=1e-10, atol=1e-10)


@needs_torch_fidelity
def test_the_distance_is_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = gaussian(400, 48, 0, 1.3), gaussian(300, 48, 1) + 0.2
    theirs = [fid_features_to_statistics(rows) for rows in (a, b)]
    expected = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    published = moments_of(400, *(torch.from_numpy(np.asarray(theirs[0][name])) for name in ("mu", "sigma")))
    assert distance(published, moments(b)) == pytest.approx(expected, rel=1e-9)
