"""How well a score tells anomalous images, which are the positive ones, from normal ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from .conformal import Floats

NORMAL_975 = 1.959964
"""The 97.5 % quantile of a normal distribution."""


def separation(scores: Floats, anomalous: np.ndarray, seed: int = 0, draws: int = 1000) -> dict[str, Any]:
    """AUROC, AUPRC (average precision) and FPR95 (normal images flagged where 95 % of the anomalous are), anomalous
    being positive; each `[value, low, high]` with a 95 % interval: AUROC's is `auroc_interval`. The others' are the
    percentiles of `draws` bootstrap samples of both kinds, which know nothing of images that might have come between:
    too narrow where few images decide, and of no width where the kinds do not overlap, which is no certainty."""
    values, place = np.unique(-scores, return_inverse=True)  # descending; ties share a place
    kinds = [np.bincount(place[mask], minlength=len(values)) for mask in (~anomalous, anomalous)]
    chance = np.random.default_rng(seed)
    samples = [[chance.multinomial(kind.sum(), kind / kind.sum()) for kind in kinds] for _ in range(draws)]
    low, high = np.quantile([areas(*sample)[1:] for sample in samples], [0.025, 0.975], axis=0).tolist()
    auroc, *others = areas(*kinds)
    figures = {"auroc": [auroc, *auroc_interval(auroc, *(int(kind.sum()) for kind in kinds))]}
    figures |= {name: list(three) for name, *three in zip(("auprc", "fpr95"), others, low, high, strict=True)}
    return {**figures, "prevalence": float(anomalous.mean())}


def auroc_interval(auroc: float, normal: int, anomalous: int) -> tuple[float, float]:
    """A 95 % interval by Newcombe's method 5 (2006): every true value t of which `auroc` is at most 1.96 of *its*
    standard errors away, those of Hanley and McNeil (1982) with both counts made their mean. As with Wilson's interval
    of a share, it has a width at 0 and 1, too, and does not leave them."""
    half = (normal + anomalous) / 2 - 1

    def possible(t: float) -> bool:
        variance = t * (1 - t) * (1 + half * ((1 - t) / (2 - t) + t / (1 + t))) / (normal * anomalous)
        return (auroc - t) ** 2 <= NORMAL_975**2 * variance

    ends = []
    for outside in (0.0, 1.0):
        inside = auroc
        for _ in range(60):
            middle = (outside + inside) / 2
            inside, outside = (middle, outside) if possible(middle) else (inside, middle)
        ends.append(inside)
    return ends[0], ends[1]


def areas(normal: np.ndarray, anomalous: np.ndarray) -> tuple[float, float, float]:
    """AUROC, AUPRC, FPR95 of how many images of each kind have the highest score, the next, and so on."""
    false, true = np.cumsum(normal), np.cumsum(anomalous)
    before = (true - anomalous) / true[-1]
    auroc = float((normal / false[-1] * (before + true / true[-1]) / 2).sum())
    precision = true / np.maximum(true + false, 1)
    auprc = float((anomalous / true[-1] * precision).sum())
    return min(auroc, 1.0), min(auprc, 1.0), float(false[np.argmax(true >= 0.95 * true[-1])] / false[-1])
