"""Which scores are too high for a normal image: p-values and thresholds that promise a share of false alarms.

The promise assumes nothing about the scores, only that new normal images are like those that gave the normal scores
(split conformal prediction, Vovk et al. 2005). It comes in two strengths. *On average over calibrations*, at most the
share a of new normal images has p <= a; a single calibration may be off by about sqrt(a (1 - a) / n). *With a
confidence*, the calibration at hand fulfils the promise with that probability (training-conditional, Vovk 2012): a
higher threshold.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FINENESS = 1e-3
"""Scores are rounded to this part of their spread: finer is rounding error of the models, coarser would cost power."""


def round_scores(scores: Floats) -> tuple[Floats, float]:
    """Normal scores `(n,)` ascending and rounded, and how far above one of them a new score still ties with it.

    Two equal images may differ in score by what one batch or machine rounds otherwise; half of the tie is room for
    that, the other half for the rounding here. Without it, whether an image is stranger than its own copies among the
    normal ones would be left to chance.
    """
    low, high = np.quantile(scores, [0.25, 0.75])
    spread = high - low or np.ptp(scores) or FINENESS * np.abs(scores).max() or 1.0
    decimals = -math.floor(math.log10(FINENESS * spread))
    return np.asarray(np.round(np.sort(scores), decimals), np.float64), 10.0**-decimals


def p_values_of(scores: Floats, normal: Floats, tie: float) -> Floats:
    """Of `scores` `(B,)`: (1 + #{normal scores that are higher or tie}) / (n + 1)."""
    below = np.searchsorted(np.sort(normal) + tie, scores, side="left")
    return (1 + len(normal) - below) / (len(normal) + 1)


def benjamini_hochberg(p: Floats, rate: float) -> NDArray[np.bool_]:
    """What to flag, `(n,)`, so that the expected share of normal images among it is at most `rate` (1995): the k
    smallest p-values, for the largest k with p_(k) <= rate k / n. Conformal p-values allow it (Bates et al. 2023)."""
    ordered = np.sort(p)
    below = np.flatnonzero(ordered <= rate * np.arange(1, len(p) + 1) / len(p))
    return p <= ordered[below[-1]] if len(below) else np.zeros(len(p), bool)


def threshold(normal: Floats, tie: float, share: float, confidence: float | None = None) -> float:
    """The score above which an image is flagged, so that at most `share` of new normal images are: those with
    p <= `share`; with a `confidence`, fewer. Raises `ValueError` for fewer normal scores than `least_scores`.

    The share of all normal images above the (k + 1)-th highest of n scores is Beta(k + 1, n - k) distributed if no two
    scores are equal, and smaller if some are. Its mean (k + 1) / (n + 1) is at most `share`, or its probability to be
    at most `share`, which is P(Binomial(n, share) > k), is at least `confidence`.
    """
    count = len(normal)
    if count < least_scores(share, confidence):
        raise ValueError(f"{count} normal scores are too few for a share of {share:g} false alarms")
    if confidence is None:
        above = math.floor(share * (count + 1) + 1e-9) - 1
    else:
        above = int(np.searchsorted(np.cumsum(binomial(count, share)), 1 - confidence, side="right")) - 1
    return float(np.sort(normal)[-1 - max(0, above)] + tie)


def least_scores(share: float, confidence: float | None = None) -> int:
    """The fewest normal scores for which there is a `threshold`.

    On average a new score is above all n with probability 1 / (n + 1); with a confidence, more than `share` of new ones
    are above all n in (1 - share)^n of calibrations.
    """
    least = 1 / share - 1 if confidence is None else math.log1p(-confidence) / math.log1p(-share)
    return max(1, math.ceil(least - 1e-9))


def binomial(count: int, share: float) -> Floats:
    """The probability of 0 to `count` successes, each of probability `share`."""
    k = np.arange(count + 1)
    factorials = np.array([math.lgamma(number + 1) for number in k])  # their logarithms
    ways = factorials[-1] - factorials - factorials[::-1]
    return np.exp(ways + k * math.log(share) + (count - k) * math.log1p(-share))
