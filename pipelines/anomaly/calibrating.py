"""Fit the anomaly scores of a pipeline to normal images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..images.pictures import convert_images
from .calibration import LEVELS, MOST_IMAGES, Calibration, digests_of
from .conformal import Floats, kept, least_scores, threshold
from .distances import Gaussian, Neighbours, rounded
from .image_statistics import measure
from .scores import (
    Fitted,
    columns,
    features_distance,
    log_statistics,
    possible,
    score_by,
    statistics_distance,
    total_bits,
)

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline, Label

KEPT_SCORES, KEPT_POSITIONS, KEPT_SIDE = 2000, 4096, 64  # what of large calibrations is kept
KEPT_POINTS = 1000
USUAL = 0.99


def calibrate(
    pipeline: ImagePipeline,
    images: Any,
    labels: Label | Sequence[Label] = None,
    *,
    false_alarms: float = 0.05,
    confidence: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Calibration:
    """Learn from normal images that were not trained on; returns the calibration, and gives it to the pipeline.

    One half, chosen by `seed`, is fitted to; the other half gives the scores behind p-values and thresholds. Of new
    normal images, at most a share `false_alarms` is above a threshold *on average over calibrations*: in about half of
    them it is slightly more. With a `confidence` of 0.9, the thresholds are higher, so that it is at most this share in
    90 % of calibrations; p-values do not change. Raises `ValueError` for too few images to tell that
    share, and for more than 50,000.
    """
    batch = pipeline.to_images(images)
    count = len(batch)
    check_promise(count, false_alarms, confidence)
    parts, error = [], torch.zeros(batch.shape[2:], dtype=torch.float64)
    for part in measure(pipeline, batch, labels, batch_size):
        parts.append((part.statistics, part.surprise))
        error += part.error.double().sum(0)
    found = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    fitted = fit({name: values[order[: count // 2]] for name, values in found.items()})
    held = {name: values[order[count // 2 :]] for name, values in found.items()}
    scores, ties, thresholds = {}, {}, {}
    for method in possible(found):
        scores[method], ties[method] = kept(score_by(method, held, fitted)[:KEPT_SCORES].numpy())
        thresholds[method] = threshold(scores[method], ties[method], false_alarms, confidence)
    pixels = convert_images(batch, "np")
    pipeline.calibration = Calibration(
        count=count,
        data=hashlib.sha256(pixels.tobytes()).hexdigest(),
        labels=labels is not None,
        false_alarms=float(false_alarms),
        confidence=None if confidence is None else float(confidence),
        statistics=columns(found),
        typical_bits=fitted.typical_bits,
        mahalanobis=fitted.mahalanobis,
        neighbours=fitted.neighbours,
        usual=fitted.usual,
        scores=scores,
        ties=ties,
        thresholds=thresholds,
        surprise=surprise_quantiles(torch.cat([surprise for _, surprise in parts])),
        error=coarse(error / count),
        digests=np.unique(digests_of(pixels)),
    )
    return pipeline.calibration


def check_promise(count: int, false_alarms: float, confidence: float | None) -> None:
    """Raise `ValueError` unless `count` images are enough for what is promised, and not too many to remember."""
    for name, share in (("false_alarms", false_alarms), ("confidence", confidence)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name} should lie between 0 and 1 (got {share})")
    if count < (least := max(10, 2 * least_scores(false_alarms, confidence))):
        promise = f"a share of {false_alarms:g} false alarms"
        promise += "" if confidence is None else f" with a confidence of {confidence:g}"
        raise ValueError(f"calibrating for {promise} needs at least {least} images (got {count})")
    if count > MOST_IMAGES:
        raise ValueError(f"a pipeline is calibrated with at most {MOST_IMAGES:,} images (got {count:,})")


def fit(found: dict[str, Tensor]) -> Fitted:
    """To the statistics of normal images. Only some of them become neighbours: the others say how near is usual, as
    they are not neighbours of themselves."""
    total = total_bits(found)
    points = min(KEPT_POINTS, len(total) // 2)
    rest = {name: values[points:] for name, values in found.items()}
    mahalanobis, neighbours = Gaussian.fit(log_statistics(found)), None
    usual = {"mahalanobis": usual_of(statistics_distance(rest, mahalanobis))}
    if "features" in found:
        neighbours = Neighbours.fit(found["features"].numpy()[:points])
        usual["neighbours"] = usual_of(features_distance(rest, neighbours))
    return Fitted(float(f"{total.mean().item():.6g}"), mahalanobis, neighbours, usual)


def usual_of(distances: Floats) -> float:
    """What 99 % of distances are below, to six digits, and above 0."""
    return float(f"{max(np.quantile(distances, USUAL), 1e-9):.6g}")


def surprise_quantiles(surprise: Tensor) -> Floats:
    """`LEVELS` quantiles of `(n, N)` bits at each position, or over all where there are very many."""
    values = surprise.numpy()
    values = values if values.shape[1] <= KEPT_POSITIONS else values.reshape(-1, 1)
    return rounded(np.quantile(values, LEVELS, axis=0))


def coarse(error: Tensor) -> Floats:
    """An error map `(H, W)` of at most 64 pixels along each side."""
    height, width = (min(side, KEPT_SIDE) for side in error.shape)
    return rounded(F.adaptive_avg_pool2d(error[None], (height, width))[0].numpy())
