"""Conformal p-values and thresholds with a guaranteed false alarm rate.

The guarantee assumes nothing about the scores, only that new normal images are exchangeable with those that gave the
normal scores (split conformal prediction, Vovk et al. 2005). It has two forms. *On average over calibrations*, at most
a share a of new normal images has p <= a; a single calibration may be off by about sqrt(a (1 - a) / n). *With a
confidence*, the guarantee holds for the calibration at hand with that probability (training-conditional, Vovk 2012),
which requires a higher threshold.

Cross-conformal p-values (Vovk 2015) fit the score once without each of K folds, and pool the ranks, so that all of few
images both fit and count. Less is guaranteed for them; see `cross_bound`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FINENESS = 1e-3
"""Scores are rounded to this fraction of their spread: finer digits are numerical noise, coarser ones cost power."""


def round_scores(scores: Floats) -> tuple[Floats, float]:
    """Sort and round normal scores `(n,)`. Also return the tie: how far a new score may exceed one of them and still
    tie.

    Scores of identical images may differ by numerical noise between batches and machines; half of the tie allows for
    that, the other half for the rounding here. Without it, noise would decide whether an image ranks above its own
    copies among the normal images.
    """
    low, high = np.quantile(scores, [0.25, 0.75])
    spread = high - low or np.ptp(scores) or FINENESS * np.abs(scores).max() or 1.0
    decimals = -math.floor(math.log10(FINENESS * spread))
    return round_to(scores, 10.0**-decimals), 10.0**-decimals


def round_to(scores: Floats, tie: float) -> Floats:
    """Sort scores `(n,)` and round them to the digits of a tie."""
    return np.asarray(np.round(np.sort(scores), -round(math.log10(tie))), np.float64)


def p_values_of(scores: Floats, normal: Floats, tie: float) -> Floats:
    """Return the p-values of `scores` `(B,)`: (1 + #{normal scores that are higher or tie}) / (n + 1)."""
    return cross_p_values(scores[None], [normal], tie)


def cross_p_values(scores: Floats, normal: Sequence[Floats], tie: float) -> Floats:
    """Return p-values `(B,)` of images by their scores under each of K references, `(K, B)`: each is compared with the
    `normal` scores of the fold that its reference was not fitted to, and the ranks are pooled. Of one reference, these
    are `p_values_of`."""
    higher, count = np.zeros(scores.shape[1], np.int64), sum(len(part) for part in normal)
    for own, part in zip(scores, normal, strict=True):
        higher += len(part) - np.searchsorted(np.sort(part) + tie, own, side="left")
    return (1 + higher) / (count + 1)


def cross_bound(share: float, count: int, folds: int) -> float:
    """Return the largest share of new normal images, on average over calibrations, for which cross-conformal p-values
    may be at most `share` (Barber et al. 2021, for scores of `count` images). In practice it is `share`.

    The first term bounds a weighted mean of the p-values of the folds, whatever their sizes. The second needs equal
    folds."""
    excess = 2 * (1 - 1 / folds) / (count / folds + 1)
    if count % folds == 0:
        excess = min(excess, (1 - folds / count) / (folds + 1))
    return min(1.0, 2 * share + excess)


def benjamini_hochberg(p: Floats, rate: float) -> NDArray[np.bool_]:
    """Flag p-values `(n,)` at a false discovery rate of at most `rate` (Benjamini and Hochberg 1995): the k smallest,
    for the largest k with p_(k) <= rate k / n. Valid for conformal p-values (Bates et al. 2023)."""
    ordered = np.sort(p)
    below = np.flatnonzero(ordered <= rate * np.arange(1, len(p) + 1) / len(p))
    return p <= ordered[below[-1]] if len(below) else np.zeros(len(p), bool)


def threshold(normal: Floats, tie: float, share: float, confidence: float | None = None) -> float:
    """Return the threshold that at most `share` of new normal images exceed: those with p <= `share`, or fewer with a
    `confidence`. Raises `ValueError` for fewer normal scores than `least_scores`.

    The share of all normal images above the (k + 1)-th highest of n scores is Beta(k + 1, n - k) distributed if scores
    are distinct, and smaller otherwise. k is the largest number for which its mean (k + 1) / (n + 1) is at most `share`
    or, with a confidence, for which P(Binomial(n, share) > k), the probability of at most `share`, is at least
    `confidence`.
    """
    count = len(normal)
    if count < least_scores(share, confidence):
        raise ValueError(f"{count} normal scores are too few for a false alarm rate of {share:g}")
    if confidence is None:
        above = math.floor(share * (count + 1) + 1e-9) - 1
    else:
        above = int(np.searchsorted(np.cumsum(binomial(count, share)), 1 - confidence, side="right")) - 1
    return float(np.sort(normal)[-1 - max(0, above)] + tie)


def least_scores(share: float, confidence: float | None = None) -> int:
    """Return the smallest number of normal scores for which a `threshold` exists.

    On average a new score exceeds all n with probability 1 / (n + 1); more than `share` of new scores exceed all n in
    (1 - share)^n of calibrations.
    """
    least = 1 / share - 1 if confidence is None else math.log1p(-confidence) / math.log1p(-share)
    return max(1, math.ceil(least - 1e-9))


def binomial(count: int, share: float) -> Floats:
    """Return the binomial probabilities of 0 to `count` successes."""
    k = np.arange(count + 1)
    factorials = np.array([math.lgamma(number + 1) for number in k])  # log factorials
    ways = factorials[-1] - factorials - factorials[::-1]
    return np.exp(ways + k * math.log(share) + (count - k) * math.log1p(-share))
