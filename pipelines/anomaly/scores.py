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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..images.pictures import convert_images, level_of_user
from .calibration import Calibration, Fitted, require_calibration
from .conformal import Floats, p_values_of
from .distances import CalibrationError
from .image_statistics import statistics

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline, Label

METHODS = {
    "joint": "neighbours, and by how much bits and error are farther out than in 99 of 100 normal images",
    "neighbours": "how far the prior's features are from those of the nearest normal images",
    "nll": "bits of the tokens, and of the pixels given them where the tokenizer has a likelihood of pixels",
    "typicality": "how far these bits are from their mean over normal images",
    "ratio": "bits of the tokens, less those under the background prior",
    "reconstruction": "mean |x - decode(encode(x))|",
}
NEEDS = {
    "neighbours": "a prior with layers",
    "ratio": "a background prior (`smalti calibrate background=FOLDER`, or `set_background(prior)`)",
}
"""What some methods need."""
FITTED = ("joint", "neighbours", "typicality")
"""The methods that need a calibration."""
TOGETHER = {"token_bits": 1.0, "pixel_bits": 1.0, "error": 2 / 255}
"""The statistics that `joint` takes together, and what is added before the logarithm: one bit, or one grey level, as 0
occurs and differences far below that mean nothing. Background bits are not among them: a score should not change its
meaning when a background prior is added."""


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
    batch, calibration = pipeline.to_images(images), pipeline.calibration
    found = statistics(pipeline, batch, labels, batch_size)
    scores = score_of(method, found, calibration, labelled=labels is not None)
    if calibration is not None and (p_values or method in FITTED):
        warn_of_known(calibration, batch)
    return p_value_of(method, scores, calibration, labelled=labels is not None) if p_values else scores


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
        return plain_score(method, found)
    return fitted_score(method, found, checked(calibration, method, labelled).fitted)


def p_value_of(method: str, scores: Tensor, calibration: Calibration | None, *, labelled: bool) -> Tensor:
    """Conformal p-values of scores, ties counted against detection. Raises `CalibrationError`."""
    normal = checked(calibration, method, labelled).scores[method]
    return torch.from_numpy(p_values_of(scores.numpy(), normal.values, normal.tie))


def possible(found: dict[str, Tensor]) -> list[str]:
    """The methods that these statistics allow."""
    there = {"neighbours": "features", "ratio": "background_bits"}
    return [method for method in METHODS if there.get(method, "token_bits") in found]


def plain_score(method: str, found: dict[str, Tensor]) -> Tensor:
    """The score by a method that is not fitted to anything."""
    if method == "reconstruction":
        return found["error"]
    return found["token_bits"] - found["background_bits"] if method == "ratio" else total_bits(found)


def fitted_score(method: str, found: dict[str, Tensor], fitted: Fitted) -> Tensor:
    """The score by one of `FITTED`."""
    if method == "typicality":
        return (total_bits(found) - fitted.typical_bits).abs()
    far = fitted.statistics.of(log_statistics(found))
    if fitted.features is None:
        return torch.from_numpy(far)
    near = fitted.features.of(found.get("features", torch.empty(len(far), 0)).numpy())
    return torch.from_numpy(near if method == "neighbours" else near + np.maximum(0, far - 1))


def total_bits(found: dict[str, Tensor]) -> Tensor:
    """Bits of the tokens, and of the pixels given them where the tokenizer has a likelihood."""
    return found["token_bits"] + found.get("pixel_bits", torch.zeros(()))


def log_statistics(found: dict[str, Tensor]) -> Floats:
    """Logarithms of the statistics of `TOGETHER` that there are, `(B, d)`: all are positive, and an image's are in
    proportion to each other."""
    return np.stack([np.log(found[name].numpy() + add) for name, add in TOGETHER.items() if name in found], axis=1)


def checked(calibration: Calibration | None, method: str, labelled: bool) -> Calibration:
    """The calibration, if there is one for this method and these labels. Raises `CalibrationError`."""
    calibration = require_calibration(calibration)
    if method not in calibration.scores:
        raise CalibrationError(f"method: the pipeline was calibrated without {method}: run `smalti calibrate` again")
    if calibration.labels != labelled:
        how = "with" if calibration.labels else "without"
        raise CalibrationError(f"labels: the pipeline was calibrated {how} them, and scores are not comparable")
    return calibration
