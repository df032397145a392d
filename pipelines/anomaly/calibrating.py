"""Calibrate the anomaly scores of a pipeline on normal images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from prior.columns import LABEL
from prior.given import Given

from ..images.tiles import LazyImages, as_lazy, check_places, cut_tiles, give_places, load_image
from .calibration import (
    LEVELS,
    MAX_IMAGES,
    Calibration,
    Fitted,
    NormalScores,
    digest_of,
    digest_of_name,
    digest_of_pixels,
)
from .conformal import Floats, least_scores, round_scores, threshold
from .distances import Distance, round_digits
from .image_statistics import Measured, measure
from .maps import fit_maps, has_maps, map_images
from .scores import FITTED, fitted_score, list_methods, log_statistics, plain_score, total_bits

if TYPE_CHECKING:
    from ..image_pipeline import Condition, ImagePipeline, Label

MAX_SCORES, MAX_POINTS, MAX_POSITIONS, MAX_SIDE = 2000, 1000, 4096, 64  # bounds on the size of the file
MAX_TILES = 10_000
"""Tiles that are used for fitting, which bounds memory."""


def calibrate(
    pipeline: ImagePipeline,
    images: Any,
    labels: Label | Sequence[Label] = None,
    *,
    false_alarms: float = 0.05,
    condition: Condition = None,
    groups: Sequence[str] | None = None,
    confidence: float | None = None,
    seed: int = 0,
    stride: int | None = None,
    marginal: str | None = None,
    batch_size: int = 256,
) -> Calibration:
    """Calibrate on normal images that were not used in training; set and return `pipeline.calibration`.

    condition: values of columns, one for all images or one per image; the same columns must then be given for scores.
    marginal: as in `anomaly_score`, and the same for scores.
    groups: the name of the object that each image shows, `(B,)`. Images of one object are not independent: they stay
    in the same half, and only the highest score of each object counts, so that p-values and thresholds hold for
    objects.

    One half, chosen by `seed`, is used for fitting; the other half gives the scores for p-values and thresholds. On
    average over calibrations, at most a share `false_alarms` of new normal images exceeds a threshold; for about half
    of the calibrations the share is slightly larger. `confidence=0.9` raises the thresholds so that the bound holds for
    90 % of calibrations; p-values do not change. Raises `ValueError` for too few images, and for more than 50,000.

    stride: take images of any size, as `anomaly_map` does. Tiles of one half are used for fitting (at most 10,000,
    evenly spaced), and the score of an image of the other half is the maximum of those of its tiles.
    """
    if stride is None:
        images = pipeline.to_images(images)
    else:
        images = pipeline.list_images(images)
    count = len(images)
    if groups is not None and len(groups) != count:
        raise ValueError(f"groups: expected one for each of {count} images (got {len(groups)})")
    numbers = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    objects = len(np.unique(numbers))
    check_promise(count, false_alarms, confidence, None if groups is None else objects)
    halves = halve(numbers, objects, seed)
    given = pipeline.read_given(labels, condition, count, marginal=marginal)
    mapped = has_maps(pipeline, stride)
    if stride is not None or mapped:
        check_places(given)
    if stride is None:
        reference = measure_images(pipeline, images, given, halves, batch_size)
    else:
        reference = measure_tiles(pipeline, images, given, halves, stride, seed, batch_size)
    maps = None
    if mapped:
        several, (fitting, scoring) = as_lazy(images), (half.tolist() for half in halves[:2])
        maps = fit_maps(pipeline, several, fitting, given, stride, seed, batch_size)
        each = [one.scores for one in map_images(pipeline, maps, several, scoring, given, stride, batch_size)]
        for method in each[0]:
            reference.scores[method] = torch.tensor([own[method] for own in each], dtype=torch.float64)
    scores = {}
    for method, found in reference.scores.items():
        values, tie = round_scores(worst_of_objects(found, halves.owners))
        limit = threshold(values, tie, false_alarms, confidence)
        scores[method] = NormalScores(values=values, tie=tie, threshold=limit)
    pipeline.calibration = Calibration(
        count=count,
        objects=None if groups is None else objects,
        labels=LABEL in given.names,
        columns=sorted({*given.names} - {LABEL}),
        marginal=next(iter(given.weights), None),
        tile=None if stride is None else list(pipeline.tokenizer.image_shape[1:]),
        stride=stride,
        sizes=reference.sizes,
        false_alarms=float(false_alarms),
        confidence=None if confidence is None else float(confidence),
        fitted=reference.fitted,
        scores=scores,
        surprise=surprise_quantiles(reference.surprise),
        error=downsample_error(reference.error),
        maps=maps,
        digests=sorted(reference.digests),
        object_digests=None if groups is None else sorted({digest_of_name(str(name)) for name in groups}),
    )
    return pipeline.calibration


def check_promise(count: int, false_alarms: float, confidence: float | None, objects: int | None = None) -> None:
    """Raise `ValueError` if there are too few images for the guarantee, or too many to store. objects: the number of
    objects, if each has one score."""
    for name, share in (("false_alarms", false_alarms), ("confidence", confidence)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name} should be between 0 and 1 (got {share})")
    units, noun = (count, "images") if objects is None else (objects, "objects")
    if units < (least := least_units(false_alarms, confidence)):
        promise = f"a false alarm rate of {false_alarms:g}"
        promise += "" if confidence is None else f" with a confidence of {confidence:g}"
        raise ValueError(f"a calibration for {promise} needs at least {least} {noun} (got {units})")
    if count > MAX_IMAGES:
        raise ValueError(f"a calibration can use at most {MAX_IMAGES:,} images (got {count:,})")


def least_units(false_alarms: float, confidence: float | None) -> int:
    """Return the smallest number of images, or of objects, for the guarantee."""
    return max(10, 2 * least_scores(false_alarms, confidence))


def least_false_alarms(units: int, confidence: float | None) -> float | None:
    """Return the smallest rate of false alarms, in hundredths, that this number of images or objects can promise; None
    for fewer than 10."""
    return next((k / 100 for k in range(1, 100) if units >= least_units(k / 100, confidence)), None)


class Halves(NamedTuple):
    """Images to fit to, images to score, in the random order of their objects, and the number of each scored image's
    object, from 0 and ascending."""

    fitting: Tensor
    scoring: Tensor
    owners: NDArray[np.int64]


def halve(numbers: NDArray[np.int64], objects: int, seed: int) -> Halves:
    """Divide the objects at random; at most 2,000 are scored. numbers: the object of each image, `(n,)`."""
    rank = np.argsort(np.random.default_rng(seed).permutation(objects))[numbers]
    order = torch.from_numpy(np.argsort(rank, kind="stable"))
    fitting = int((rank < objects // 2).sum())
    owners = rank[order[fitting:].numpy()] - objects // 2
    scored = int((owners < MAX_SCORES).sum())
    return Halves(order[:fitting], order[fitting:][:scored], owners[:scored])


def worst_of_objects(scores: Tensor, owners: NDArray[np.int64]) -> Floats:
    """Return the highest of the scores `(n,)` of each object's images."""
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    highest: Floats = np.maximum.reduceat(scores.numpy(), first)
    return highest


class Reference(NamedTuple):
    """What normal images, or their tiles, are like: what was fitted, scores of the images in `Halves.scoring` by
    method, bits of tokens and the mean error map of those in `Halves.fitting`, digests of all images and, with tiles,
    the smallest height and width, and the largest."""

    fitted: Fitted
    scores: dict[str, Tensor]
    surprise: Tensor
    error: Tensor
    digests: set[str]
    sizes: list[int] | None = None


def measure_images(pipeline: ImagePipeline, batch: Tensor, given: Given, halves: Halves, batch_size: int) -> Reference:
    """Fit to one half of the images `(B, C, H, W)` and score the other."""
    normal, scored = (
        measure(pipeline, batch[half], given[half], batch_size) for half in (halves.fitting, halves.scoring)
    )
    held = scored.statistics
    fitted = fit_reference(normal.statistics)
    scores = {method: score_with(method, held, fitted) for method in list_methods(held)}
    digests = {digest_of(image) for image in pipeline.convert_images(batch, "np")}
    return Reference(fitted, scores, normal.surprise, normal.error, digests)


def measure_tiles(
    pipeline: ImagePipeline,
    images: LazyImages,
    given: Given,
    halves: Halves,
    stride: int,
    seed: int,
    batch_size: int,
) -> Reference:
    """Fit to the tiles of one half of the images and score the images of the other. Each image is loaded once."""
    shape, digests, sizes = pipeline.tokenizer.image_shape, set[str](), list[list[int]]()

    def load(numbers: list[int]) -> Iterator[tuple[int, Tensor]]:
        for number in numbers:
            image = load_image(images, number, shape)
            digests.add(digest_of_pixels(image))
            sizes.append(list(image.shape[1:]))
            yield number, image

    def measure_some(numbers: list[int], most: int | None = None) -> Iterator[tuple[Measured, list[int]]]:
        for tiles, places in cut_tiles(load(numbers), shape, stride, batch_size, most):
            measured = measure(pipeline, tiles.to(pipeline.device), give_places(given, places))
            yield measured, [place.image for place in places]

    fitting, scoring = sorted(halves.fitting.tolist()), halves.scoring.tolist()
    parts = [measured for measured, _ in measure_some(fitting, max(1, MAX_TILES // len(fitting)))]
    found = {name: torch.cat([part.statistics[name] for part in parts]) for name in parts[0].statistics}
    mixed = torch.from_numpy(np.random.default_rng(seed).permutation(len(found["error"])))  # neighbours of all images
    fitted = fit_reference({name: values[mixed] for name, values in found.items()})
    weights = [len(part.surprise) / len(mixed) for part in parts]
    error = sum((weight * part.error for weight, part in zip(weights, parts, strict=True)), torch.zeros(shape[1:]))
    scores = {method: torch.full((len(images),), -math.inf, dtype=torch.float64) for method in list_methods(found)}
    for measured, own in measure_some(scoring):
        for method, best in scores.items():
            best.scatter_reduce_(0, torch.tensor(own), score_with(method, measured.statistics, fitted), "amax")
    for _ in load(sorted({*range(len(images))} - {*fitting, *scoring})):  # for their digests
        pass
    scores = {method: best[scoring] for method, best in scores.items()}
    bounds = [*np.min(sizes, 0).tolist(), *np.max(sizes, 0).tolist()]
    return Reference(fitted, scores, torch.cat([part.surprise for part in parts]), error, digests, bounds)


def score_with(method: str, found: dict[str, Tensor], fitted: Fitted) -> Tensor:
    """Compute one of the scores."""
    return fitted_score(method, found, fitted) if method in FITTED else plain_score(method, found)


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
