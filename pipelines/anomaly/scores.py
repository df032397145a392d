"""Anomaly scores from a pipeline's density.

A high likelihood alone does not make an image normal: simpler images of another kind are often likelier (Nalisnick et
al. 2019). The default score therefore combines two tests. The distance of the prior's features from those of normal
images (nearest neighbours, Sun et al. 2022) separates kinds of objects. Whether several statistics of the image are
jointly outside their normal range (DoSE, Morningstar et al. 2021) detects images without any such object. Larger scores
and smaller p-values are always more anomalous.

A condition that is computed from the tested image, such as its outline, hides what it shows. An anomaly that is in the
condition, too, is likely given the condition, so that only what the condition leaves open can be found.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prior.given import Given

from ..images.pictures import find_user_stacklevel
from ..images.tiles import LazyImages, Place, check_places, cut_tiles, give_places, load_image
from .calibration import Calibration, Fitted, digest_of_pixels, require_calibration
from .conformal import Floats, p_values_of
from .distances import CalibrationError
from .image_statistics import measure
from .maps import NEEDED, map_calibrated, read_images

if TYPE_CHECKING:
    from ..image_pipeline import Condition, ImagePipeline, Label

METHODS = {
    "joint": "the `neighbours` score, raised when the bits or the reconstruction error lie outside the range "
    "of 99 % of normal images",
    "neighbours": "distance of the prior's features to those of the nearest normal images",
    "nll": "bits of the tokens, plus bits of the pixels given the tokens if the tokenizer has a pixel likelihood",
    "typicality": "difference of the nll bits from their mean over normal images",
    "ratio": "bits of the tokens, minus their bits under the background prior",
    "reconstruction": "mean absolute reconstruction error",
    "hidden": "bits of tokens while their block of the grid is hidden: the highest ones of their map, less its median; "
    "or the largest change of texture, if it is more unusual",
}
NEEDS = {
    "neighbours": "a prior with layers",
    "ratio": "a background prior (`smalti calibrate background=FOLDER`, or `set_background(prior)`)",
    "hidden": NEEDED,
}
"""Requirements of some methods."""
FITTED = ("joint", "neighbours", "typicality", "hidden")
"""The methods that need a calibration."""
TOGETHER = {"token_bits": 1.0, "pixel_bits": 1.0, "error": 2 / 255}
"""The statistics that `joint` combines, and the offset added before the logarithm: one bit or one grey level, because
values may be 0 and smaller differences are meaningless. Background bits are left out, so that adding a background prior
does not change the score."""


def anomaly_score(
    pipeline: ImagePipeline,
    images: Any,
    method: str = "joint",
    labels: Label | Sequence[Label] = None,
    *,
    condition: Condition = None,
    marginal: str | None = None,
    p_values: bool = False,
    stride: int | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Score each image by one of `METHODS`, `(B,)` float64; larger is more anomalous.

    condition: values of columns, one for all images or one per image. A condition that is computed from the tested
    image, such as its outline, hides what it shows: given an outline with a crack, the crack is likely.
    marginal: a column of classes that are not known; bits are those of the mixture over them, see
    `ImagePipeline.log_prob`. Features, and `hidden`, take the class as null.

    p_values: return p-values instead, the share of normal images that are at least as anomalous, (1 + #{s_i >= s}) / (n
    + 1); on average over calibrations, at most a share a of new normal images has p <= a. P-values and the fitted
    methods need a calibration with the same labels, columns and `marginal`, and are invalid for the images of the
    calibration itself, which triggers a warning. Raises `CalibrationError` (a `ValueError`) without a calibration for
    the method.

    stride: take images of any size, as `anomaly_map` does; the score of an image is the maximum of the scores of its
    tiles. P-values and the fitted methods need a calibration with the same stride.
    """
    calibration = pipeline.calibration
    if method == "hidden":
        several = read_images(pipeline, images, stride)
        given = check_places(pipeline.read_given(labels, condition, len(several), marginal=marginal))
        return score_hidden(pipeline, several, given, p_values, stride, batch_size)
    if stride is not None:
        several = pipeline.list_images(images)
        given = check_places(pipeline.read_given(labels, condition, len(several), marginal=marginal))
        tiled = score_tiles(pipeline, several, method, given, stride, batch_size)
        if calibration is not None and (p_values or method in FITTED):
            known = set(calibration.digests)
            warn_of_known(sum(digest in known for digest in tiled.digests), len(several))
        options = pipeline.tokenizer.image_shape[1:], stride
        return p_value_of(method, tiled.scores, calibration, given.terms, options) if p_values else tiled.scores
    batch = pipeline.to_images(images)
    given = pipeline.read_given(labels, condition, len(batch), marginal=marginal)
    scores = score_of(method, measure(pipeline, batch, given, batch_size).statistics, calibration, given.terms)
    if calibration is not None and (p_values or method in FITTED):
        warn_if_calibrated(pipeline, calibration, batch)
    return p_value_of(method, scores, calibration, given.terms) if p_values else scores


def score_hidden(
    pipeline: ImagePipeline, several: LazyImages, given: Given, p_values: bool, stride: int | None, batch_size: int
) -> Tensor:
    """Compute `anomaly_score` for `hidden`, which is a score of the map of the whole image."""
    tiling = WHOLE if stride is None else (pipeline.tokenizer.image_shape[1:], stride)
    known = set(require_scores(pipeline.calibration, "hidden", given.terms, tiling).digests)
    found = [each.scores["hidden"] for each in map_calibrated(pipeline, several, given, stride, batch_size)]
    warn_of_known(sum(digest_of_pixels(several.load(k)) in known for k in range(len(several))), len(several))
    scores = torch.tensor(found, dtype=torch.float64)
    return p_value_of("hidden", scores, pipeline.calibration, given.terms, tiling) if p_values else scores


def warn_if_calibrated(pipeline: ImagePipeline, calibration: Calibration, batch: Tensor) -> None:
    """Warn if some of the images `(B, C, H, W)` were used for the calibration."""
    warn_of_known(int(calibration.includes(pipeline.convert_images(batch, "np")).sum()), len(batch))


def warn_of_known(known: int, count: int) -> None:
    """Warn if some of `count` images were used for the calibration."""
    if known:
        warnings.warn(
            f"{known} of {count} images were used to calibrate the pipeline: they look more normal than new "
            "images, and their p-values are not valid",
            stacklevel=find_user_stacklevel(),
        )


class TileScores(NamedTuple):
    """Scores of images by their tiles: `scores` float64 `(n,)`, the maxima; `places`, the tile of each; `counts`, the
    number of its tiles; `digests` of the images."""

    scores: Tensor
    places: list[Place]
    counts: list[int]
    digests: list[str]


def score_tiles(
    pipeline: ImagePipeline, images: LazyImages, method: str, given: Given, stride: int, batch_size: int = 256
) -> TileScores:
    """Score images of any size by the maximum of the scores of their tiles."""
    shape, digests = pipeline.tokenizer.image_shape, list[str]()
    best, places, counts = [-math.inf] * len(images), [Place(0, 0, 0)] * len(images), [0] * len(images)

    def load() -> Iterator[tuple[int, Tensor]]:
        for number in range(len(images)):
            image = load_image(images, number, shape)
            digests.append(digest_of_pixels(image))
            yield number, image

    for tiles, where in cut_tiles(load(), shape, stride, batch_size):
        measured = measure(pipeline, tiles.to(pipeline.device), give_places(given, where))
        scores = score_of(method, measured.statistics, pipeline.calibration, given.terms, (shape[1:], stride))
        for score, place in zip(scores.tolist(), where, strict=True):
            counts[place.image] += 1
            if not math.isnan(best[place.image]) and not score <= best[place.image]:
                best[place.image], places[place.image] = score, place
    return TileScores(torch.tensor(best, dtype=torch.float64), places, counts, digests)


Tiling = tuple[Sequence[int], int | None]
"""Height and width of the tiles, and their stride; `WHOLE` for whole images."""
WHOLE: Tiling = ((), None)


def score_of(
    method: str,
    found: dict[str, Tensor],
    calibration: Calibration | None,
    given: Collection[str] = (),
    tiling: Tiling = WHOLE,
) -> Tensor:
    """Compute `anomaly_score` from `statistics`. given: the `terms` of what is given. tiling: of what the statistics
    are."""
    if method not in METHODS:
        raise ValueError(f"method: unknown score {method!r}; choose one of {', '.join(METHODS)}")
    if method not in list_methods(found):
        raise CalibrationError(f"method: {method} needs {NEEDS[method]}")
    if method not in FITTED:
        return plain_score(method, found)
    return fitted_score(method, found, require_scores(calibration, method, given, tiling).fitted)


def p_value_of(
    method: str,
    scores: Tensor,
    calibration: Calibration | None,
    given: Collection[str] = (),
    tiling: Tiling = WHOLE,
) -> Tensor:
    """Return conformal p-values of scores; ties count as normal. Raises `CalibrationError`."""
    normal = require_scores(calibration, method, given, tiling).scores[method]
    return torch.from_numpy(p_values_of(scores.numpy(), normal.values, normal.tie))


def list_methods(found: dict[str, Tensor]) -> list[str]:
    """Return the methods that these statistics allow."""
    there = {"neighbours": "features", "ratio": "background_bits"}
    return [method for method in METHODS if there.get(method, "token_bits") in found and method != "hidden"]


def plain_score(method: str, found: dict[str, Tensor]) -> Tensor:
    """Compute a score that needs no fitting."""
    if method == "reconstruction":
        return found["error"]
    return found["token_bits"] - found["background_bits"] if method == "ratio" else total_bits(found)


def fitted_score(method: str, found: dict[str, Tensor], fitted: Fitted) -> Tensor:
    """Compute one of the scores in `FITTED`."""
    if method == "typicality":
        return (total_bits(found) - fitted.typical_bits).abs()
    far = fitted.statistics.of(log_statistics(found))
    if fitted.features is None:
        return torch.from_numpy(far)
    near = fitted.features.of(found.get("features", torch.empty(len(far), 0)).numpy())
    return torch.from_numpy(near if method == "neighbours" else near + np.maximum(0, far - 1))


def total_bits(found: dict[str, Tensor]) -> Tensor:
    """Return the bits of the tokens, plus the bits of the pixels given the tokens if the tokenizer has a likelihood."""
    return found["token_bits"] + found.get("pixel_bits", torch.zeros(()))


def log_statistics(found: dict[str, Tensor]) -> Floats:
    """Return the logarithms of the available statistics in `TOGETHER`, `(B, d)`; they are positive and roughly
    proportional to each other."""
    return np.stack([np.log(found[name].numpy() + add) for name, add in TOGETHER.items() if name in found], axis=1)


def require_scores(
    calibration: Calibration | None, method: str, given: Collection[str], tiling: Tiling = WHOLE
) -> Calibration:
    """Return the calibration if it covers this method, what is given and these tiles, else raise `CalibrationError`."""
    calibration = require_calibration(calibration)
    calibration.check_tiles(*tiling)
    if method not in calibration.scores:
        raise CalibrationError(f"method: the pipeline was calibrated without {method}: run `smalti calibrate` again")
    calibration.check_given(given)
    return calibration
