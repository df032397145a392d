"""P-values and thresholds keep their guarantee for any scores."""

import math

import numpy as np
import pytest

from pipelines.anomaly.conformal import (
    benjamini_hochberg,
    least_scores,
    p_values_of,
    round_scores,
    threshold,
)


@pytest.mark.parametrize("scale", [(0, 1), (1_234_567.8, 3), (0, 1e-9), (-5e8, 2e4)], ids=str)
@pytest.mark.parametrize("same", [0, 0.08, 0.7])
def test_the_false_alarm_rate_is_as_requested_for_scores_of_any_scale(scale, same):
    """5 %, or less with ties, also under the rounding noise of another machine."""
    chance, (mean, deviation) = np.random.default_rng(0), scale
    below, above = [], []
    for _ in range(300):
        scores = mean + deviation * chance.normal(size=300)
        scores[chance.random(300) < same] = mean + 3.3333333 * deviation
        noise = deviation * 1e-5 * chance.normal(size=200)
        normal, tie = round_scores(scores[:100])
        below.append((p_values_of(scores[100:] + noise, normal, tie) <= 0.05).mean())
        above.append((scores[100:] + noise > threshold(normal, tie, 0.05)).mean())
        assert (
            p_values_of(scores[:100], normal, tie) >= (1 + np.sum(scores[:100] >= scores[:100, None], 1)) / 101
        ).all()
    assert below == above
    if same:
        assert np.mean(below) < 0.02
    else:
        assert np.mean(below) == pytest.approx(5 / 101, abs=0.004)  # a calibration has a deviation of .02


def test_p_values_are_counts_and_agree_with_the_threshold():
    """With integers, many of which are equal or exactly a tie apart."""
    chance = np.random.default_rng(0)
    for count in (19, 40, 199):
        normal, scores = (chance.integers(0, 30, size).astype(float) for size in (count, 100))
        p = p_values_of(scores, normal, 1.0)
        np.testing.assert_array_equal(p, (1 + (normal + 1 >= scores[:, None]).sum(1)) / (count + 1))
        for share in (0.05, 0.1, 1 / 3):
            np.testing.assert_array_equal(scores > threshold(normal, 1.0, share), p <= share)


@pytest.mark.parametrize("digits", [None, 1], ids=["continuous", "tied"])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_a_confidence_is_the_share_of_calibrations_below_the_rate(confidence, digits):
    """The true rate above a threshold is known here. Without a confidence, about half of the calibrations keep it."""
    chance, held, usual = np.random.default_rng(0), [], []
    for _ in range(1000):
        scores = chance.random(200)
        scores = scores if digits is None else np.round(scores, digits)
        normal, tie = round_scores(scores)
        for found, sure in ((held, confidence), (usual, None)):
            limit = threshold(normal, tie, 0.1, sure)
            above = 1 - limit if digits is None else 1.05 - np.clip(np.ceil(10 * limit) / 10, 0.1, 1.05)
            found.append(above <= 0.1)
    margin = 3 * math.sqrt(confidence * (1 - confidence) / 1000)
    assert np.mean(held) >= confidence - margin
    if digits is None:
        assert np.mean(held) < confidence + 0.06 + margin  # at most one score of 200 more conservative
        assert 0.45 < np.mean(usual) < 0.7 and (confidence == 0.5 or np.mean(usual) < confidence - 0.15)


@pytest.mark.parametrize("confidence", [None, 0.01, 0.3, 0.5, 0.9, 0.95, 0.999])
def test_least_scores_is_the_smallest_number_with_a_threshold(confidence):
    """The first n for which 1 / (n + 1) <= share or, with a confidence, (1 - share)^n <= 1 - confidence."""
    for share in (0.001, 0.01, 1 / 30, 0.05, 0.07, 0.1, 1 / 7, 0.25, 1 / 3, 0.5, 0.75, 0.99):
        least = least_scores(share, confidence)

        def enough(count, share=share):
            by_chance = 1 / (count + 1) <= share * (1 + 1e-9)
            return by_chance if confidence is None else (1 - share) ** count <= (1 - confidence) * (1 + 1e-9)

        assert enough(least) and (least == 1 or not enough(least - 1))
        threshold(np.arange(least, dtype=float), 0, share, confidence)
        if least > 1:
            with pytest.raises(ValueError):
                threshold(np.arange(least - 1, dtype=float), 0, share, confidence)


def test_the_false_discovery_rate_holds_with_many_ties():
    chance, shares = np.random.default_rng(0), []
    for _ in range(200):
        scores = chance.normal(size=400)
        scores[chance.random(400) < 0.08] = 10 / 3
        flagged = benjamini_hochberg(
            p_values_of(np.append(scores[200:], 9 + chance.random(20)), *round_scores(scores[:200])), 0.2
        )
        shares.append(flagged[:200].sum() / max(1, flagged.sum()))
    assert np.mean(shares) < 0.2
