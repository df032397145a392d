"""Calibrate the anomaly scores of a pipeline on normal images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prior.conditions import LABEL

from ..condition_values import GivenCondition
from .calibration import LEVELS, MAX_IMAGES, Calibration, Fitted, NormalScores, digest_of
from .conformal import Floats, least_scores, round_scores, threshold
from .distances import Distance, round_digits
from .image_statistics import measure
from .scores import FITTED, fitted_score, list_methods, log_statistics, plain_score, total_bits

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline, Label

MAX_SCORES, MAX_POINTS, MAX_POSITIONS, MAX_SIDE = 2000, 1000, 4096, 64  # bounds on the size of the file


def calibrate(
    pipeline: ImagePipeline,
    images: Any,
    labels: Label | Sequence[Label] = None,
    *,
    false_alarms: float = 0.05,
    condition: GivenCondition = None,
    groups: Sequence[str] | None = None,
    confidence: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Calibration:
    """Calibrate on normal images that were not used in training; set and return `pipeline.calibration`.

    condition: values of columns, one for all images or one per image; the same columns must then be given for scores.
    groups: the object that each image shows, `(B,)`. Images of one object are not independent: they stay in the same
    half, and only the highest score of each object counts, so that p-values and thresholds hold for objects.

    One half, chosen by `seed`, is used for fitting; the other half gives the scores for p-values and thresholds. On
    average over calibrations, at most a share `false_alarms` of new normal images exceeds a threshold; for about half
    of the calibrations the share is slightly larger. `confidence=0.9` raises the thresholds so that the bound holds for
    90 % of calibrations; p-values do not change. Raises `ValueError` for too few images, and for more than 50,000.
    """
    batch = pipeline.to_images(images)
    count = len(batch)
    if groups is not None and len(groups) != count:
        raise ValueError(f"groups: expected one for each of {count} images (got {len(groups)})")
    numbers = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    objects = len(np.unique(numbers))
    check_promise(count, false_alarms, confidence, None if groups is None else objects)
    found, surprise, error, given = measure(pipeline, batch, labels, batch_size, condition=condition)
    rank = np.argsort(np.random.default_rng(seed).permutation(objects))[numbers]  # of each image's object
    order = torch.from_numpy(np.argsort(rank, kind="stable"))
    half = int((rank < objects // 2).sum())
    fitted = fit_reference({name: values[order[:half]] for name, values in found.items()})
    held = {name: values[order[half:]] for name, values in found.items()}
    first = np.flatnonzero(np.diff(rank[order[half:].numpy()], prepend=-1))  # of each object's images
    scores = {}
    for method in list_methods(found):
        score = fitted_score(method, held, fitted) if method in FITTED else plain_score(method, held)
        values, tie = round_scores(np.maximum.reduceat(score.numpy(), first)[:MAX_SCORES])
        limit = threshold(values, tie, false_alarms, confidence)
        scores[method] = NormalScores(values=values, tie=tie, threshold=limit)
    pipeline.calibration = Calibration(
        count=count,
        objects=None if groups is None else objects,
        labels=LABEL in given,
        columns=sorted({*given} - {LABEL}),
        false_alarms=float(false_alarms),
        confidence=None if confidence is None else float(confidence),
        fitted=fitted,
        scores=scores,
        surprise=surprise_quantiles(surprise),
        error=downsample_error(error),
        digests=sorted({digest_of(image) for image in pipeline.convert_images(batch, "np")}),
    )
    return pipeline.calibration


def check_promise(count: int, false_alarms: float, confidence: float | None, objects: int | None = None) -> None:
    """Raise `ValueError` if there are too few images for the guarantee, or too many to store. objects: the number of
    objects, if each has one score."""
    for name, share in (("false_alarms", false_alarms), ("confidence", confidence)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name} should be between 0 and 1 (got {share})")
    units, noun = (count, "images") if objects is None else (objects, "objects")
    if units < (least := max(10, 2 * least_scores(false_alarms, confidence))):
        promise = f"a false alarm rate of {false_alarms:g}"
        promise += "" if confidence is None else f" with a confidence of {confidence:g}"
        raise ValueError(f"a calibration for {promise} needs at least {least} {noun} (got {units})")
    if count > MAX_IMAGES:
        raise ValueError(f"a calibration can use at most {MAX_IMAGES:,} images (got {count:,})")


def fit_reference(found: dict[str, Tensor]) -> Fitted:
    """Fit to the statistics of normal images. At most half of them serve as neighbours."""
    bits = total_bits(found)
    features = None
    if "features" in found:
        features = Distance.fit(found["features"].numpy(), min(MAX_POINTS, len(bits) // 2))
    statistics = Distance.fit(log_statistics(found))
    return Fitted(typical_bits=float(f"{bits.mean().item():.6g}"), statistics=statistics, features=features)


def surprise_quantiles(surprise: Tensor) -> Floats:
    """Return the `LEVELS` quantiles of `(n, N)` bits at each position, or over all positions if there are very many."""
    values = surprise.double().numpy()
    values = values if values.shape[1] <= MAX_POSITIONS else values.reshape(-1, 1)
    return round_digits(np.quantile(values, LEVELS, axis=0))


def downsample_error(error: Tensor) -> Floats:
    """Reduce an error map `(H, W)` to at most 64 pixels per side."""
    height, width = (min(side, MAX_SIDE) for side in error.shape)
    return round_digits(F.adaptive_avg_pool2d(error[None], (height, width))[0].numpy())
