"""Distances from normal rows, of a Gaussian and of nearest neighbours."""

import numpy as np

from pipelines.anomaly.distances import Gaussian, Neighbours


def test_a_gaussian_measures_distances_in_its_own_deviations():
    chance = np.random.default_rng(0)
    mixing = chance.normal(size=(3, 3)) * [1, 10, 0.01]
    rows = chance.normal(size=(4000, 3)) @ mixing + 5
    fitted = Gaussian.fit(rows)
    white = (rows - fitted.mean) @ fitted.whitener.T
    assert np.abs(np.cov(white.T) - np.eye(3)).max() < 0.05
    exact = np.einsum("nd,de,ne->n", rows - 5, np.linalg.inv(mixing.T @ mixing), rows - 5)
    assert np.abs(fitted.distance(rows) - exact).mean() < 0.1
    flat = Gaussian.fit(np.column_stack([rows[:, 0], np.full(4000, 3.0)]))
    near, far = flat.distance(np.array([[5.0, 3.0], [5.0, 3.1]]))
    assert near < 1 and 1e6 < far < np.inf


def test_neighbours_measure_to_the_fifth_nearest_of_white_points():
    chance = np.random.default_rng(0)
    rows = chance.normal(size=(300, 4)) @ np.diag([1, 2, 5, 3]) + 7
    fitted = Neighbours.fit(rows)
    white = (rows - fitted.mean) @ fitted.axes.T
    np.testing.assert_allclose(white, fitted.points, atol=1e-4)
    assert np.abs(np.cov(white.T) - np.diag(np.diag(np.cov(white.T)))).max() < 1e-3
    assert np.diag(np.cov(white.T)).min() > 0.7 and np.diag(np.cov(white.T)).max() < 1.01
    others = chance.normal(size=(50, 4)) * 4 + 7
    away = np.linalg.norm(((others - fitted.mean) @ fitted.axes.T)[:, None] - fitted.points, axis=2)
    np.testing.assert_allclose(fitted.distance(others), np.sort(away, 1)[:, 4], rtol=1e-6)
    few = Neighbours.fit(rows[:3])
    assert np.isfinite(few.distance(rows)).all() and few.distance(rows[:3]).max() > 0


def test_few_axes_of_many_features_are_kept():
    fitted = Neighbours.fit(np.random.default_rng(0).normal(size=(200, 100)))
    assert fitted.axes.shape == (64, 100) and fitted.points.shape == (200, 64)


def test_rounding_chooses_no_axes_of_fewer_points_than_features():
    """They lie in fewer dimensions, and new ones were measured along any one of the others."""
    chance = np.random.default_rng(0)
    rows, others = chance.normal(size=(10, 16)), chance.normal(size=(20, 16))
    fitted, again = (Neighbours.fit(each) for each in (rows, rows + 1e-7 * chance.normal(size=rows.shape)))
    np.testing.assert_allclose(fitted.distance(others), again.distance(others), rtol=1e-4)
    flat = Neighbours.fit(np.concatenate([rows[:, :3], np.ones((10, 2))], 1))  # all five: far from ones is far
    assert len(flat.axes) == 5 and flat.distance(np.array([[0.0, 0, 0, 1, 9]])) > 10
    assert len(Neighbours.fit(np.ones((10, 16))).axes) == 1
