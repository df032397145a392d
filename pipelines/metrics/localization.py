"""How well scores and maps tell anomalous (positive) from normal images and pixels: AUROC, precision, per-region
overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
NORMAL_975 = 1.959964
"""The 97.5 % quantile of a normal distribution."""


def auroc(scores: Floats, positive: Bools) -> float:
    """Return the probability that a positive scores above a negative; ties count one half. scores, positive: of any
    one shape. NaN without positives, or without negatives."""
    negatives, positives = np.sort(scores[~positive]), scores[positive]
    if not len(negatives) or not len(positives):
        return float("nan")
    below = np.searchsorted(negatives, positives, "left").sum() + np.searchsorted(negatives, positives, "right").sum()
    return float(below / 2 / len(negatives) / len(positives))


def separation(scores: Floats, anomalous: Bools) -> dict[str, Any]:
    """Compute `auroc` as `[value, low, high]` with the 95 % interval of `auroc_interval`; `auprc`, the average
    precision; `fpr95`, the false positive rate at 95 % recall; and `prevalence`, the share of anomalous images, which
    is the AUPRC of a random score."""
    levels, place = np.unique(-scores, return_inverse=True)  # highest score first; ties share a level
    normal, positive = (np.bincount(place[kind], minlength=len(levels)) for kind in (~anomalous, anomalous))
    false, true = np.cumsum(normal), np.cumsum(positive)
    recall, value = true / true[-1], auroc(scores, anomalous)
    return {
        "auroc": [value, *auroc_interval(value, int(false[-1]), int(true[-1]))],
        "auprc": min(float((positive / true[-1] * true / (true + false)).sum()), 1.0),
        "fpr95": float(false[np.argmax(recall >= 0.95)] / false[-1]),
        "prevalence": float(anomalous.mean()),
    }


def auroc_interval(value: float, normal: int, anomalous: int) -> tuple[float, float]:
    """Compute a 95 % interval of AUROC by Newcombe's method 5 (2006): all true values t for which `value` lies within
    1.96 standard errors *at t*, by Hanley and McNeil (1982) with both counts replaced by their mean. Like Wilson's
    interval, it stays in [0, 1] and has a positive width at 0 and 1."""
    half = (normal + anomalous) / 2 - 1
    t = np.union1d(np.linspace(0, 1, 100_001), value)
    variance = t * (1 - t) * (1 + half * ((1 - t) / (2 - t) + t / (1 + t))) / (normal * anomalous)
    possible = t[(value - t) ** 2 <= NORMAL_975**2 * variance]
    return float(possible[0]), float(possible[-1])


def auroc_by_object(
    scores: Floats, positive: Bools, objects: Sequence[str], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of `auroc` over `draws` of objects with replacement (percentile bootstrap). scores,
    positive, objects: `(n,)`. Draws without positives or without negatives are left out. A bootstrap sees no
    uncertainty where classes are separated perfectly: the width is then 0."""
    place = np.unique(scores, return_inverse=True)[1]
    numbers = np.unique(objects, return_inverse=True)[1]
    generator, count, size, found = np.random.default_rng(seed), int(numbers.max()) + 1, int(place.max()) + 1, []
    for _ in range(draws):
        weights = np.bincount(generator.integers(count, size=count), minlength=count)[numbers]
        normal, other = (np.bincount(place[kind], weights[kind], size) for kind in (~positive, positive))
        if normal.any() and other.any():
            found.append((other * (np.cumsum(normal) - normal / 2)).sum() / normal.sum() / other.sum())
    low, high = np.quantile(found, [0.025, 0.975]) if found else (np.nan, np.nan)
    return float(low), float(high)


def per_region_overlap(maps: Sequence[Floats], masks: Sequence[Bools], limit: float = 0.3) -> float:
    """Return the area under the curve of mean overlap against false positive rate, up to the rate `limit` and divided
    by it (PRO, Bergmann et al. 2020). maps, masks: `(H, W)` of each image, with normal images, whose masks are empty.

    The overlap of a region is the share of its pixels with at least a threshold's score, so that each region counts the
    same, whatever its size; the rate is the share of such pixels among those of no region. NaN without regions or
    without pixels outside.
    """
    regions, levels = join(label_regions(masks)), join(maps)
    sizes = np.bincount(regions)
    if len(sizes) == 1 or not sizes[0]:
        return float("nan")
    order = np.argsort(-levels, kind="stable")
    levels, of = levels[order], regions[order]
    last = np.append(np.flatnonzero(np.diff(levels)), len(levels) - 1)  # of each score: ties change sides together
    rate = np.cumsum(of == 0)[last] / sizes[0]
    overlap = np.cumsum(np.where(of == 0, 0, 1 / sizes[of]))[last] / (len(sizes) - 1)
    rate, overlap = np.append(0, rate), np.append(0, overlap)
    x = np.append(rate[rate < limit], limit)
    y = np.append(overlap[rate < limit], np.interp(limit, rate, overlap))
    if (at := np.flatnonzero(rate == limit)).size:
        y[-1] = overlap[at[0]]
    return float(((x[1:] - x[:-1]) * (y[1:] + y[:-1])).sum() / 2 / limit)


def join(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the values of arrays of any shapes in one row."""
    return np.concatenate([part.ravel() for part in parts])


def label_regions(masks: Sequence[Bools]) -> list[NDArray[np.int64]]:
    """Number the connected regions of masks `(H, W)` from 1, over all masks; 0 outside. Pixels that share a corner are
    connected."""
    labels, count = [], 0
    for mask in masks:
        own = label_mask(mask)
        labels.append(np.where(own, own + count, 0))
        count += int(own.max())
    return labels


def label_mask(mask: Bools) -> NDArray[np.int64]:
    """Number the connected regions of a mask `(H, W)` from 1."""
    height, width = mask.shape
    ids = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(ids, 1)
        near = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        spread = np.where(mask, np.maximum.reduce(near), 0)
        spread = np.append(0, spread)[spread]  # the pixel with that number may know a higher one
        if (spread == ids).all():
            return np.unique(np.append(0, ids), return_inverse=True)[1][1:].reshape(mask.shape)
        ids = spread
