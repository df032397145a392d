"""How well a score tells anomalous images from normal ones, and which images to flag by their p-values.

Anomalous is positive everywhere, and a larger score is more anomalous.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .calibration import Floats


def benjamini_hochberg(p: Floats, rate: float) -> np.ndarray:
    """What to flag, bool `(n,)`, so that the expected share of normal images among it is at most `rate` (1995): the k
    smallest p-values, for the largest k with p_(k) <= rate k / n. Conformal p-values allow it (Bates et al. 2023)."""
    ordered = np.sort(p)
    below = np.flatnonzero(ordered <= rate * np.arange(1, len(p) + 1) / len(p))
    return p <= ordered[below[-1]] if len(below) else np.zeros(len(p), bool)


def separation(scores: Floats, anomalous: np.ndarray, seed: int = 0, draws: int = 1000) -> dict[str, Any]:
    """AUROC, AUPRC (average precision) and FPR95 (normal images flagged where 95 % of the anomalous are), anomalous
    being positive; each `[value, low, high]` with a 95 % interval from `draws` bootstrap samples of both kinds."""
    values, place = np.unique(-scores, return_inverse=True)  # descending; ties share a place
    kinds = [np.bincount(place[mask], minlength=len(values)) for mask in (~anomalous, anomalous)]
    chance = np.random.default_rng(seed)
    samples = [[chance.multinomial(kind.sum(), kind / kind.sum()) for kind in kinds] for _ in range(draws)]
    low, high = np.quantile([areas(*sample) for sample in samples], [0.025, 0.975], axis=0).tolist()
    intervals = zip(("auroc", "auprc", "fpr95"), areas(*kinds), low, high, strict=True)
    return {name: list(figures) for name, *figures in intervals} | {"prevalence": float(anomalous.mean())}


def areas(normal: np.ndarray, anomalous: np.ndarray) -> tuple[float, float, float]:
    """AUROC, AUPRC, FPR95 of how many images of each kind have the highest score, the next, and so on."""
    false, true = np.cumsum(normal), np.cumsum(anomalous)
    before = (true - anomalous) / true[-1]
    auroc = float((normal / false[-1] * (before + true / true[-1]) / 2).sum())
    precision = true / np.maximum(true + false, 1)
    auprc = float((anomalous / true[-1] * precision).sum())
    return min(auroc, 1.0), min(auprc, 1.0), float(false[np.argmax(true >= 0.95 * true[-1])] / false[-1])
