"""AUROC, AUPRC and FPR95, and the interval of AUROC."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from pipelines.metrics.localization import auroc_interval, separation


def test_figures_agree_with_their_definitions():
    chance = np.random.default_rng(0)
    scores = chance.integers(0, 12, 60).astype(float)  # many ties
    anomalous = chance.random(60) < 0.3
    figures = separation(scores, anomalous)
    a, b = scores[anomalous], scores[~anomalous]
    assert figures["auroc"][0] == pytest.approx(((a[:, None] > b) + 0.5 * (a[:, None] == b)).mean())
    limits = sorted(set(scores), reverse=True)
    steps = [((a >= t).mean(), (a >= t).sum() / (scores >= t).sum(), (b >= t).mean()) for t in limits]
    recalls = [0.0, *(recall for recall, _, _ in steps)]
    assert figures["auprc"] == pytest.approx(
        sum((r - before) * p for (r, p, _), before in zip(steps, recalls, strict=False))
    )
    assert figures["fpr95"] == pytest.approx(next(false for recall, _, false in steps if recall >= 0.95))
    assert figures["prevalence"] == anomalous.mean()
    assert separation(-scores, anomalous)["auroc"][0] == pytest.approx(1 - figures["auroc"][0])
    apart = separation(anomalous * 1.0, anomalous)
    assert (apart["auroc"][0], apart["auprc"], apart["fpr95"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("truth", "normal", "anomalous"), [(0.998, 50, 50), (0.998, 200, 20), (0.983, 100, 100), (0.76, 200, 15)]
)
def test_intervals_of_auroc_cover_the_truth(truth, normal, anomalous):
    """Two unit normals. A bootstrap would cover only 68 to 76 % at .998."""
    chance, inside, rounds = np.random.default_rng(1), 0, 200
    apart = math.sqrt(2) * NormalDist().inv_cdf(truth)
    for _ in range(rounds):
        scores = np.concatenate([chance.normal(size=normal), chance.normal(apart, size=anomalous)])
        _, low, high = separation(scores, np.arange(len(scores)) >= normal)["auroc"]
        inside += low <= truth <= high
    assert inside >= 0.9 * rounds


def test_an_interval_of_auroc_has_a_width_at_0_and_1():
    narrower = 0.0
    for count in (5, 50, 500):
        low, high = auroc_interval(1.0, count, count)
        assert narrower < low < 1 and high == pytest.approx(1, abs=1e-9)
        assert auroc_interval(0.0, count, count) == pytest.approx((0, 1 - low), abs=1e-9)
        assert sum(auroc_interval(0.5, count, count)) == pytest.approx(1)
        narrower = low
    assert 0.93 < auroc_interval(1.0, 50, 50)[0] < 0.97  # 50 of 50: Wilson's interval of a share begins at .929
