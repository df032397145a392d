"""P-values and thresholds keep their guarantee for any scores."""

import math

import numpy as np
import pytest
import torch

from pipelines.anomaly.calibrating import divide_objects, fit_reference, worst_of_objects
from pipelines.anomaly.calibration import NormalStatistics
from pipelines.anomaly.conformal import (
    benjamini_hochberg,
    cross_bound,
    cross_p_values,
    least_scores,
    p_values_of,
    round_scores,
    threshold,
)
from pipelines.anomaly.scores import score_tiles


@pytest.mark.parametrize("scale", [(0, 1), (1_234_567.8, 3), (0, 1e-9), (-5e8, 2e4)], ids=str)
@pytest.mark.parametrize("same", [0, 0.08, 0.7])
def test_the_false_alarm_rate_is_as_requested_for_scores_of_any_scale(scale, same):
    """5 %, or less with ties, also under the rounding noise of another machine."""
    chance, (mean, deviation) = np.random.default_rng(0), scale
    below, above = [], []
    for _ in range(200):
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


@pytest.mark.parametrize("confidence", [None, 0.01, 0.5, 0.95, 0.999])
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


# Folds --------------------------------------------------------------------------------------------


def test_pooled_ranks_count_the_normal_scores_of_each_fold_under_its_own_reference():
    chance = np.random.default_rng(0)
    normal, scores = [np.round(chance.normal(size=count), 2) for count in (7, 8, 8)], chance.normal(size=(3, 50))
    scores[:, 0] = normal[0][0] + 0.01  # ties with it
    expected = [
        (1 + sum((part + 0.01 >= score).sum() for part, score in zip(normal, each, strict=True))) / 24
        for each in scores.T
    ]
    np.testing.assert_allclose(cross_p_values(scores, normal, 0.01), expected)
    np.testing.assert_array_equal(p_values_of(scores[0], normal[0], 0.01), cross_p_values(scores[:1], normal[:1], 0.01))


@pytest.mark.parametrize(
    ("share", "count", "folds", "expected"),
    [
        (0.05, 49, 5, 0.2481),
        (0.05, 20, 8, 0.6),
        (0.05, 24, 8, 0.1741),
        (0.05, 50, 50, 0.1),
        (0.1, 1000, 5, 0.2080),
        (0.5, 20, 5, 1.0),
    ],
)
def test_the_bound_of_folds(share, count, folds, expected):
    """With as many folds as images it is that of the jackknife+, 2 alpha. The second term needs equal folds."""
    assert cross_bound(share, count, folds) == pytest.approx(expected, abs=1e-4)


def photograph(chance, objects, views):
    """Statistics and features of objects, each photographed several times; and the object of each image."""
    own = chance.normal(size=(objects, 6)).repeat(views, 0) + 0.6 * chance.normal(size=(objects * views, 6))
    found = {name: torch.from_numpy(np.exp(6 + 0.1 * own[:, k])) for k, name in enumerate(("token_bits", "error"))}
    found |= {"top_bits": torch.from_numpy(np.exp(2 + 0.1 * own[:, 2])), "features": torch.from_numpy(own[:, 2:])}
    return found, np.arange(objects).repeat(views)


def flag_new_objects(folds, seed, alpha=0.05, objects=49, views=4):
    """Calibrate on objects, and return the share of 100 new ones that have a flagged image."""
    chance = np.random.default_rng(seed)
    (found, owners), (new, others) = (photograph(chance, count, views) for count in (objects, 100))
    references, normal = [], []
    for part in divide_objects(owners, objects, seed, folds):
        fitted = fit_reference({name: rows[part.fitting] for name, rows in found.items()}, 50)
        references.append(NormalStatistics(fitted=fitted, scores={}))
        held = {name: rows[part.scoring] for name, rows in found.items()}
        normal.append(worst_of_objects(score_tiles("joint", held, references[-1:])[0], part.owners))
    p = cross_p_values(score_tiles("joint", new, references), normal, 0.0)
    return (worst_of_objects(-p, others) >= -alpha).mean()


def test_promises_hold_over_many_calibrations():
    """Of objects of several images. Two halves keep alpha on average; folds keep their bound, and in practice alpha
    with less spread between calibrations."""
    rates = {folds: np.array([flag_new_objects(folds, seed) for seed in range(100)]) for folds in (1, 5)}
    for folds, found in rates.items():
        print(f"folds={folds}: mean {found.mean():.4f}, deviation {found.std():.4f}, 5 to 95 % of calibrations "
              f"{np.quantile(found, 0.05):.3f} to {np.quantile(found, 0.95):.3f}")  # fmt: skip
    error = {folds: found.std() / math.sqrt(100) for folds, found in rates.items()}
    exact = math.floor(0.05 * 26) / 26  # of 25 scored objects: p <= .05 for the highest alone
    assert abs(rates[1].mean() - exact) < 4 * error[1] and rates[1].mean() < 0.05 + 3 * error[1]
    assert rates[5].mean() + 3 * error[5] < cross_bound(0.05, 49, 5)
    assert rates[5].mean() < 0.05 + 3 * error[5] and rates[5].std() < 0.85 * rates[1].std()
