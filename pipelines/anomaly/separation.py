"""How well a score separates anomalous (positive) from normal images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conformal import Floats

NORMAL_975 = 1.959964
"""The 97.5 % quantile of a normal distribution."""


def separation(scores: Floats, anomalous: NDArray[np.bool_]) -> dict[str, Any]:
    """Compute `auroc` as `[value, low, high]` with the 95 % interval of `auroc_interval`; `auprc`, the average
    precision; `fpr95`, the false positive rate at 95 % recall; and `prevalence`, the share of anomalous images, which
    is the AUPRC of a random score."""
    levels, place = np.unique(-scores, return_inverse=True)  # highest score first; ties share a level
    normal, positive = (np.bincount(place[kind], minlength=len(levels)) for kind in (~anomalous, anomalous))
    false, true = np.cumsum(normal), np.cumsum(positive)
    recall = true / true[-1]
    auroc = min(float((normal / false[-1] * (recall - positive / true[-1] / 2)).sum()), 1.0)
    return {
        "auroc": [auroc, *auroc_interval(auroc, int(false[-1]), int(true[-1]))],
        "auprc": min(float((positive / true[-1] * true / (true + false)).sum()), 1.0),
        "fpr95": float(false[np.argmax(recall >= 0.95)] / false[-1]),
        "prevalence": float(anomalous.mean()),
    }


def auroc_interval(auroc: float, normal: int, anomalous: int) -> tuple[float, float]:
    """Compute a 95 % interval by Newcombe's method 5 (2006): all true values t for which `auroc` lies within 1.96
    standard errors *at t*, by Hanley and McNeil (1982) with both counts replaced by their mean. Like Wilson's interval,
    it stays in [0, 1] and has a positive width at 0 and 1."""
    half = (normal + anomalous) / 2 - 1
    t = np.union1d(np.linspace(0, 1, 100_001), auroc)
    variance = t * (1 - t) * (1 + half * ((1 - t) / (2 - t) + t / (1 + t))) / (normal * anomalous)
    possible = t[(auroc - t) ** 2 <= NORMAL_975**2 * variance]
    return float(possible[0]), float(possible[-1])
