"""Numbers drawn by hashing: uniform, and independent of each other."""

import numpy as np

from pipelines.shuffling.hashing import uniforms


def test_draws_are_uniform_and_independent():
    draws = np.concatenate([uniforms(0, epoch, np.arange(2000)) for epoch in range(10)])
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in draws.T])
    assert np.abs(counts - 1000).max() < 6 * np.sqrt(950)  # six standard deviations
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.05
    assert np.abs(np.corrcoef(draws.reshape(10, 2000, 5)[:, :, 0]) - np.eye(10)).max() < 0.15
