"""The Frechet distance compared with closed forms and other libraries, and moments computed in parts."""

from __future__ import annotations

import pytest
import torch
from optional import needs_torch_fidelity

from pipelines.metrics.frechet import Moments, distance, frechet_distance, moments, moments_of_parts


def gaussian(count, dim, seed=0, scale=1.0):
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.t()


@pytest.mark.parametrize("dim", [1, 4, 30])
def test_distance_of_known_gaussians(dim):
    means = gaussian(2, dim, 1)
    factors = [gaussian(2 * dim, dim, seed) for seed in (2, 3)]
    a, b = (Moments(mean, factor.t() @ factor / dim) for mean, factor in zip(means, factors, strict=True))
    root = square_root(a.covariance)
    cross = square_root(root @ b.covariance @ root).trace()
    expected = (means[0] - means[1]).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    assert distance(a, b) == pytest.approx(float(expected), rel=1e-9) == distance(b, a)
    rows = gaussian(50, dim, 4)
    assert frechet_distance(rows, rows + 3) == pytest.approx(9 * dim, rel=1e-9)
    spread = float(moments(rows).covariance.trace())
    assert frechet_distance(rows, 2 * rows - rows.mean(0)) == pytest.approx(spread, rel=1e-9)


@pytest.mark.parametrize("count", [2, 300])
def test_distance_to_itself_is_zero(count):
    """Also with fewer rows than features, when the covariance is singular."""
    rows = gaussian(count, 64, scale=10)
    for again in (rows, rows.flip(0), rows.float()):
        assert abs(frechet_distance(rows, again)) < 1e-4  # the trace is 6,400


@needs_torch_fidelity
def test_distance_is_that_of_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = gaussian(400, 48, 0, 1.3), gaussian(300, 48, 1) + 0.2
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sizes", [(12,), (1, 1, 60), (30, 1, 0), (200, 100, 50)])
def test_moments_of_parts_are_those_of_all_rows(sizes):
    parts = [gaussian(count, 20, seed, 1 + seed).float() + 3 * seed for seed, count in enumerate(sizes)]
    found, rows = moments_of_parts(parts.__getitem__, range(len(parts))), torch.cat(parts).double()
    for each in (found, moments(rows)):
        torch.testing.assert_close(each.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each.covariance, rows.t().cov(), rtol=1e-11, atol=1e-11)
