"""Distances of rows to the mean of normal rows, and to the nearest of them."""

import numpy as np

from pipelines.anomaly.distances import RIDGE, Distance, round_digits, to_nearest


def test_a_distance_from_the_mean_is_mahalanobis():
    chance = np.random.default_rng(0)
    rows, others = (chance.normal(size=(count, 3)) @ chance.normal(size=(3, 3)) + 5 for count in (400, 50))
    covariance = np.cov(rows.T, ddof=0)
    covariance += RIDGE * np.trace(covariance) / 3 * np.eye(3)
    away = others - rows.mean(0)
    expected = np.sqrt(np.einsum("nd,de,ne->n", away, np.linalg.inv(covariance), away))
    found = Distance.fit(rows).of(others)
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-4)
    assert (Distance.fit(rows).of(rows) > 1).mean() == 0.01  # the unit


def test_a_distance_from_neighbours_is_that_from_the_fifth_nearest():
    chance = np.random.default_rng(0)
    rows, others = chance.normal(size=(2000, 4)) * [1, 2, 5, 3] + 7, chance.normal(size=(1100, 4)) * 4 + 7
    fitted = Distance.fit(rows, 300)
    white = (np.concatenate([rows[:300], others]) - fitted.mean) @ fitted.whitener.T
    np.testing.assert_allclose(white[:300], fitted.points, atol=1e-4)
    away = np.linalg.norm(white[300:, None] - fitted.points, axis=2)
    np.testing.assert_allclose(fitted.of(others), np.sort(away, 1)[:, 4], rtol=1e-4)
    assert 0.005 < (fitted.of(rows[300:]) > 1).mean() <= 0.01
    assert np.isfinite(to_nearest(white, white[:3])).all()  # fewer than five


def test_few_or_equal_rows_give_stable_distances():
    """Ten rows span fewer than sixteen dimensions."""
    chance = np.random.default_rng(0)
    rows, others = chance.normal(size=(20, 16)), chance.normal(size=(20, 16))
    fitted, again = (Distance.fit(each, 10) for each in (rows, rows + 1e-7 * chance.normal(size=rows.shape)))
    np.testing.assert_allclose(fitted.of(others), again.of(others), rtol=1e-4)
    for equal in (np.ones((10, 16)), np.ones((10, 1))):
        for neighbours in (0, 5):
            flat = Distance.fit(equal, neighbours)
            assert np.isfinite(flat.of(equal)).all() and (flat.of(equal + 1) > flat.of(equal)).all()


def test_rounding_is_idempotent():
    values = np.random.default_rng(0).normal(size=(30, 5)) * 10.0 ** np.arange(-2, 3)
    np.testing.assert_array_equal(round_digits(round_digits(values)), round_digits(values))
    np.testing.assert_allclose(round_digits(values), values, rtol=5e-6)
