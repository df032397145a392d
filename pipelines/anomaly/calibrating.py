"""Calibrate the anomaly scores of a pipeline on normal images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prior.conditions import LABEL

from ..condition_values import GivenCondition
from ..images.pictures import convert_images
from .calibration import LEVELS, MAX_IMAGES, Calibration, Fitted, NormalScores, digest_of
from .conformal import Floats, least_scores, round_scores, threshold
from .distances import Distance, round_digits
from .image_statistics import Measured, measure, measure_batch
from .scores import FITTED, fitted_score, list_methods, log_statistics, plain_score, total_bits
from .tiling import GivenRows, LazyImages, cut_tiles, digest_of_pixels, list_images, load_image, read_given

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline, Label

MAX_SCORES, MAX_POINTS, MAX_POSITIONS, MAX_SIDE = 2000, 1000, 4096, 64  # bounds on the size of the file
MAX_TILES = 10_000
"""Tiles that are used for fitting, which bounds memory."""


def calibrate(
    pipeline: ImagePipeline,
    images: Any,
    labels: Label | Sequence[Label] = None,
    *,
    false_alarms: float = 0.05,
    condition: GivenCondition = None,
    confidence: float | None = None,
    seed: int = 0,
    stride: int | None = None,
    batch_size: int = 256,
) -> Calibration:
    """Calibrate on normal images that were not used in training; set and return `pipeline.calibration`.

    condition: values of columns, one for all images or one per image; the same columns must then be given for scores.

    One half, chosen by `seed`, is used for fitting; the other half gives the scores for p-values and thresholds. On
    average over calibrations, at most a share `false_alarms` of new normal images exceeds a threshold; for about half
    of the calibrations the share is slightly larger. `confidence=0.9` raises the thresholds so that the bound holds for
    90 % of calibrations; p-values do not change. Raises `ValueError` for too few images, and for more than 50,000.

    stride: take images of any size, as `anomaly_map` does. Tiles of one half are used for fitting (at most 10,000,
    evenly spaced), and the score of an image of the other half is the maximum of those of its tiles, so that p-values
    and thresholds are of images.
    """
    if stride is not None:
        several = list_images(images, pipeline.tokenizer.image_shape)
        rows = read_given(pipeline, labels, condition, len(several))
        promise = false_alarms, confidence
        pipeline.calibration = calibrate_tiles(pipeline, several, rows, promise, seed, stride, batch_size)
        return pipeline.calibration
    batch = pipeline.to_images(images)
    count = len(batch)
    check_promise(count, false_alarms, confidence)
    found, surprise, error, given = measure(pipeline, batch, labels, batch_size, condition=condition)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    fitted = fit_reference({name: values[order[: count // 2]] for name, values in found.items()})
    held = {name: values[order[count // 2 :]] for name, values in found.items()}
    scores = {method: score_with(method, held, fitted) for method in list_methods(found)}
    pipeline.calibration = Calibration(
        count=count,
        labels=LABEL in given,
        columns=sorted({*given} - {LABEL}),
        false_alarms=float(false_alarms),
        confidence=None if confidence is None else float(confidence),
        fitted=fitted,
        scores={
            method: normal_scores(score[:MAX_SCORES], false_alarms, confidence) for method, score in scores.items()
        },
        surprise=surprise_quantiles(surprise),
        error=downsample_error(error),
        digests=sorted({digest_of(image) for image in convert_images(batch, "np")}),
    )
    return pipeline.calibration


def calibrate_tiles(
    pipeline: ImagePipeline,
    images: LazyImages,
    rows: GivenRows,
    promise: tuple[float, float | None],
    seed: int,
    stride: int,
    batch_size: int,
) -> Calibration:
    """Return the calibration on tiles of images; see `calibrate`. promise: `false_alarms` and
    `confidence`. Each image is loaded once."""
    false_alarms, confidence = promise
    count, shape, digests = len(images), pipeline.tokenizer.image_shape, set[str]()
    check_promise(count, false_alarms, confidence)
    order = np.random.default_rng(seed).permutation(count).tolist()
    fitting, scoring = sorted(order[: count // 2]), order[count // 2 :]

    def load(numbers: list[int]) -> Iterator[tuple[int, Tensor]]:
        for number in numbers:
            image = load_image(images, number, shape)
            digests.add(digest_of_pixels(image))
            yield number, image

    def measure_tiles(numbers: list[int], most: int | None = None) -> Iterator[tuple[Measured, list[int]]]:
        for tiles, places in cut_tiles(load(numbers), shape, stride, batch_size, most):
            own = [place.image for place in places]
            labels, condition = rows.select(own)
            yield measure_batch(pipeline, tiles.to(pipeline.device), labels, condition=condition), own

    parts = [measured for measured, _ in measure_tiles(fitting, max(1, MAX_TILES // len(fitting)))]
    found = {name: torch.cat([part.statistics[name] for part in parts]) for name in parts[0].statistics}
    mixed = torch.from_numpy(np.random.default_rng(seed).permutation(len(found["error"])))  # neighbours of all images
    fitted = fit_reference({name: values[mixed] for name, values in found.items()})
    weights = [len(part.surprise) / len(mixed) for part in parts]
    error = sum((weight * part.error for weight, part in zip(weights, parts, strict=True)), torch.zeros(shape[1:]))
    chosen = scoring[:MAX_SCORES]
    scores = {method: torch.full((count,), -math.inf, dtype=torch.float64) for method in list_methods(found)}
    for measured, own in measure_tiles(chosen):
        for method, best in scores.items():
            best.scatter_reduce_(0, torch.tensor(own), score_with(method, measured.statistics, fitted), "amax")
    for _ in load(scoring[MAX_SCORES:]):  # for their digests
        pass
    return Calibration(
        count=count,
        labels=LABEL in rows.names,
        columns=sorted({*rows.names} - {LABEL}),
        tile=list(shape[1:]),
        stride=stride,
        false_alarms=float(false_alarms),
        confidence=None if confidence is None else float(confidence),
        fitted=fitted,
        scores={method: normal_scores(best[chosen], false_alarms, confidence) for method, best in scores.items()},
        surprise=surprise_quantiles(torch.cat([part.surprise for part in parts])),
        error=downsample_error(error),
        digests=sorted(digests),
    )


def score_with(method: str, found: dict[str, Tensor], fitted: Fitted) -> Tensor:
    """Compute one of the scores."""
    return fitted_score(method, found, fitted) if method in FITTED else plain_score(method, found)


def normal_scores(score: Tensor, false_alarms: float, confidence: float | None) -> NormalScores:
    """Return the scores of normal images, and the threshold."""
    values, tie = round_scores(score.numpy())
    return NormalScores(values=values, tie=tie, threshold=threshold(values, tie, false_alarms, confidence))


def check_promise(count: int, false_alarms: float, confidence: float | None) -> None:
    """Raise `ValueError` if `count` images are too few for the guarantee, or too many to store."""
    for name, share in (("false_alarms", false_alarms), ("confidence", confidence)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name} should be between 0 and 1 (got {share})")
    if count < (least := max(10, 2 * least_scores(false_alarms, confidence))):
        promise = f"a false alarm rate of {false_alarms:g}"
        promise += "" if confidence is None else f" with a confidence of {confidence:g}"
        raise ValueError(f"a calibration for {promise} needs at least {least} images (got {count})")
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
