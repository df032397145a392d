"""How unlike the normal images is an image? Scores from a pipeline's density, and what they are measured against.

A high likelihood alone does not make an image normal: simpler images of another kind are often likelier (Nalisnick et
al. 2019). The default score therefore asks two questions. How far are the prior's features of the image from those of
normal images (nearest neighbours, Sun et al. 2022)? This separates one kind of object from another. Are several
statistics of the image, taken together, outside the range of normal images (DoSE, Morningstar et al. 2021)? This finds
images that show no such object at all. One sign everywhere: a larger score is more anomalous, and so is a smaller
p-value.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..images.pictures import convert_images, level_of_user
from .calibration import Calibration, CalibrationError
from .conformal import Floats, p_values_of
from .distances import Gaussian, Neighbours
from .image_statistics import statistics

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline, Label

METHODS = {
    "joint": "neighbours, and by how much the statistics are farther out than in 99 of 100 normal images",
    "neighbours": "how far the prior's features are from those of the nearest normal images",
    "mahalanobis": "how far all statistics are, together, from those of normal images",
    "nll": "bits of the tokens, and of the pixels given them where the tokenizer has a likelihood of pixels",
    "typicality": "how far these bits are from their mean over normal images",
    "complexity": "bits of tokens and pixels, less those of a general lossless coder",
    "ratio": "bits of the tokens, less those under the background prior",
    "reconstruction": "mean |x - decode(encode(x))|",
    "surprise": "mean bits of the most surprising 5 % of the tokens",
}
TOGETHER = ("token_bits", "pixel_bits", "codec_bits", "error", "surprise")
"""The statistics that `mahalanobis` takes together. Background bits are not among them: a score should not change its
meaning when a background prior is added."""
NEEDS = {
    "neighbours": "a prior with layers",
    "complexity": "a tokenizer with a likelihood of pixels (`model.likelihood`)",
    "ratio": "a background prior (`smalti calibrate background=FOLDER`, or `set_background(prior)`)",
}
"""What some methods need. `complexity` is the difference between two code lengths of one image (Serra et al. 2020).
Without the bits of the pixels, the first code would cover only part of the image."""
FITTED = ("joint", "neighbours", "mahalanobis", "typicality")
"""The methods that need a calibration."""
GREY_LEVEL = 2 / 255


class Fitted(NamedTuple):
    """What the fitted methods compare to: the mean bits of normal images; a Gaussian of the logarithms of their
    statistics; their features, or None for a prior without layers; and what 99 % of them are below, in distances from
    both."""

    typical_bits: float
    mahalanobis: Gaussian
    neighbours: Neighbours | None
    usual: dict[str, float]


def anomaly_score(
    pipeline: ImagePipeline,
    images: Any,
    method: str = "joint",
    labels: Label | Sequence[Label] = None,
    *,
    p_values: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """Score of each image by one of `METHODS`, `(B,)` float64: larger is more anomalous.

    p_values: instead, the share of normal images that are at least as anomalous, (1 + #{s_i >= s}) / (n + 1), in which
    smaller is more anomalous: on average over calibrations, at most a share a of new normal images has p <= a. Both
    these and the fitted methods need a calibration. They mean nothing for the images that the calibration was made
    with; a warning says so. Raises `CalibrationError` (a `ValueError`) where the pipeline has no calibration, or none
    for this method.
    """
    batch = pipeline.to_images(images)
    found = statistics(pipeline, batch, labels, batch_size)
    scores = score_of(method, found, pipeline.calibration, labelled=labels is not None)
    if pipeline.calibration is not None and (p_values or method in FITTED):
        warn_of_known(pipeline.calibration, batch)
    return p_value_of(method, scores, pipeline.calibration, labelled=labels is not None) if p_values else scores


def warn_of_known(calibration: Calibration, batch: Tensor) -> None:
    """Warn if images `(B, C, H, W)` are among those that the calibration was made with."""
    if known := int(calibration.includes(convert_images(batch, "np")).sum()):
        warnings.warn(
            f"{known} of {len(batch)} images are among those that the pipeline was calibrated with: they look more "
            "normal than new ones do, and their p-values hold no promise",
            stacklevel=level_of_user(),
        )


def score_of(method: str, found: dict[str, Tensor], calibration: Calibration | None, *, labelled: bool) -> Tensor:
    """As `anomaly_score`, from `statistics`."""
    if method not in METHODS:
        raise ValueError(f"method: no score is called {method!r}; there are {', '.join(METHODS)}")
    if method not in possible(found):
        raise CalibrationError(f"method: {method} needs {NEEDS[method]}")
    if method not in FITTED:
        return score_by(method, found, None)
    known = checked(calibration, method, labelled)
    check_statistics(found, known)
    fitted = Fitted(known.typical_bits, known.mahalanobis, known.neighbours, known.usual)
    return score_by(method, found, fitted)


def score_by(method: str, found: dict[str, Tensor], fitted: Fitted | None) -> Tensor:
    """The score by one of the methods that the statistics allow; the methods of `FITTED` need what was fitted."""
    if fitted is None or method not in FITTED:
        return plain_score(method, found)
    if method == "typicality":
        return (total_bits(found) - fitted.typical_bits).abs()
    if method == "joint":
        return torch.from_numpy(joint_distance(found, fitted))
    if method == "mahalanobis" or fitted.neighbours is None:
        return torch.from_numpy(statistics_distance(found, fitted.mahalanobis))
    return torch.from_numpy(features_distance(found, fitted.neighbours))


def plain_score(method: str, found: dict[str, Tensor]) -> Tensor:
    """The score by a method that is not fitted to anything."""
    total = total_bits(found)
    return {
        "nll": total,
        "complexity": total - found["codec_bits"],
        "ratio": found["token_bits"] - found.get("background_bits", torch.zeros(())),
        "reconstruction": found["error"],
        "surprise": found["surprise"],
    }[method]


def total_bits(found: dict[str, Tensor]) -> Tensor:
    """Bits of the tokens, and of the pixels given them where the tokenizer has a likelihood."""
    return found["token_bits"] + found.get("pixel_bits", torch.zeros(()))


def possible(found: dict[str, Tensor]) -> list[str]:
    """The methods that these statistics allow."""
    there = {"neighbours": "features", "complexity": "pixel_bits", "ratio": "background_bits"}
    return [method for method in METHODS if there.get(method, "token_bits") in found]


def statistics_distance(found: dict[str, Tensor], fitted: Gaussian) -> Floats:
    """The Mahalanobis distance of the statistics, `(B,)`."""
    return np.sqrt(fitted.distance(log_statistics(found)))


def features_distance(found: dict[str, Tensor], fitted: Neighbours) -> Floats:
    """That of the features from their neighbours, `(B,)`."""
    return fitted.distance(found["features"].numpy())


def joint_distance(found: dict[str, Tensor], fitted: Fitted) -> Floats:
    """Both distances in units of what is usual: that of the features, and what that of the statistics is over."""
    statistics = statistics_distance(found, fitted.mahalanobis) / fitted.usual["mahalanobis"]
    if fitted.neighbours is None:
        return statistics
    features = features_distance(found, fitted.neighbours) / fitted.usual["neighbours"]
    return features + np.maximum(0, statistics - 1)


def check_statistics(found: dict[str, Tensor], calibration: Calibration) -> None:
    """Raise `CalibrationError` if the pipeline now has other statistics or features than were fitted to."""
    names, again = columns(found), "run `smalti calibrate` again"
    if names != calibration.statistics or (calibration.neighbours is None) == ("features" in found):
        before, now = ", ".join(calibration.statistics), ", ".join(names)
        raise CalibrationError(f"the pipeline was calibrated with {before}, and now has {now}: {again}")
    if calibration.neighbours is None:
        return
    count, expected = found["features"].shape[1], len(calibration.neighbours.mean)
    if count != expected:
        raise CalibrationError(f"the pipeline was calibrated with {expected} features, and now has {count}: {again}")


def columns(found: dict[str, Tensor]) -> list[str]:
    """Those of `TOGETHER` that there are."""
    return [name for name in TOGETHER if name in found]


def log_statistics(found: dict[str, Tensor]) -> Floats:
    """Logarithms of the statistics `(B, d)`: all are positive, and an image's are in proportion to each other. One bit,
    or one grey level, is added, as 0 occurs and differences far below that mean nothing."""
    added = {"error": GREY_LEVEL}
    return np.stack([np.log(found[name].numpy() + added.get(name, 1.0)) for name in columns(found)], axis=1)


def p_value_of(method: str, scores: Tensor, calibration: Calibration | None, *, labelled: bool) -> Tensor:
    """Conformal p-values of scores, ties counted against detection. Raises `CalibrationError`."""
    fitted = checked(calibration, method, labelled)
    return torch.from_numpy(p_values_of(scores.numpy(), fitted.scores[method], fitted.ties[method]))


def checked(calibration: Calibration | None, method: str, labelled: bool) -> Calibration:
    """The calibration, if there is one for this method and these labels. Raises `CalibrationError`."""
    if calibration is None:
        raise CalibrationError(
            f"method: {method} and p-values need a calibrated pipeline: `smalti calibrate`, or "
            "`calibrate(images)`, fits it to normal images"
        )
    if method not in calibration.scores:
        raise CalibrationError(f"method: the pipeline was calibrated without {method}: run `smalti calibrate` again")
    if calibration.labels != labelled:
        how = "with" if calibration.labels else "without"
        raise CalibrationError(f"labels: the pipeline was calibrated {how} them, and scores are not comparable")
    return calibration
