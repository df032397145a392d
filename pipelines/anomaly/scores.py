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

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..images.pictures import find_user_stacklevel
from ..images.views import check_places
from .calibration import Calibration, Fitted, NormalStatistics, require_calibration
from .conformal import Floats, cross_p_values
from .distances import CalibrationError
from .examine import Evidence, Examination
from .maps import MAPPED, NEEDED, ImageMaps, map_image

if TYPE_CHECKING:
    from ..image_pipeline import Condition, ImagePipeline, Label

METHODS = {
    "joint": "the `neighbours` score, raised when the bits or the reconstruction error lie outside the range "
    "of 99 % of normal images",
    "neighbours": "distance of the prior's features to those of the nearest normal images",
    "nll": "bits of the tokens, plus bits of the pixels given the tokens if the tokenizer has a pixel likelihood",
    "top_bits": "mean bits of the most surprising 5 % of the tokens",
    "typicality": "difference of the nll bits from their mean over normal images",
    "ratio": "bits of the tokens, minus their bits under the background prior",
    "reconstruction": "mean absolute reconstruction error",
    "hidden": "bits of tokens while their block of the grid is hidden: the highest ones of their map, less its median; "
    "or the largest change of texture, if it is more unusual",
}
NEEDS = {
    "neighbours": "a prior with layers",
    "ratio": "a background prior (`smalti calibrate background=FOLDER`, or `set_background(prior)`)",
    "top_bits": "a prior with an exact density, since an estimate has no bits of single tokens",
    "hidden": NEEDED,
}
FITTED = ("joint", "neighbours", "typicality", "hidden")  # these need a calibration
TOGETHER = {"token_bits": 1.0, "pixel_bits": 1.0, "error": 2 / 255, "top_bits": 1.0}
"""The statistics that `joint` combines, and the offset added before the logarithm: one bit or one grey level, because
values may be 0 and smaller differences are meaningless. Background bits are left out, so that adding a background prior
does not change the score. Calibrations of 0.3 have no `top_bits`."""
ROWS = 1024  # tiles that are scored at a time
OF_MAPS = ("hidden", "map")  # scores of the map of a whole image, not of its tiles


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
    + 1); on average over calibrations, at most a share a of new normal images has p <= a (with folds, see `calibrate`).
    P-values and the fitted methods need a calibration with the same labels, columns and `marginal`, and are invalid for
    the images of the calibration itself, which triggers a warning. With folds, the score is the mean of those by what
    was fitted without each. Raises `CalibrationError` (a `ValueError`) without a calibration for the method.

    stride: take images of any size, as `anomaly_map` does; the score of an image is the maximum of the scores of its
    tiles. P-values and the fitted methods need a calibration with the same stride.
    """
    examination = Examination.open(pipeline, images, labels, condition, stride, batch_size, marginal)
    if not len(examination):
        raise ValueError("expected at least one image")
    if method not in METHODS:
        raise ValueError(f"method: unknown score {method!r}; choose one of {', '.join(METHODS)}")
    if method not in (*list_methods(pipeline), "hidden"):
        raise CalibrationError(f"method: {method} needs {NEEDS[method]}")
    if method in OF_MAPS:
        check_places(examination.given)
    calibration = require_scores(examination, method) if p_values or method in FITTED else None
    references = calibration.references if calibration is not None and method in FITTED else []
    want = [*(MAPPED if method in OF_MAPS else ["statistics"]), *([] if calibration is None else ["digest"])]
    evidence = examination.examine(want)
    found, digests = list[Floats](), list[str]()
    for each in score_images(examination, evidence, [method], references):
        found.append(each.scores[method])
        digests.append(each.evidence.digest)
    scores = np.stack(found, 1)
    if calibration is None:
        return torch.from_numpy(scores.mean(0))
    if known := int(calibration.find_used(digests).sum()):
        warnings.warn(
            f"{known} of {len(digests)} images were used to calibrate the pipeline: they look more normal than new "
            "images, and their p-values are not valid",
            stacklevel=find_user_stacklevel(),
        )
    return p_values_by(method, scores, calibration) if p_values else torch.from_numpy(scores.mean(0))


class ImageScores(NamedTuple):
    """What an image scores by each of K references, `(K,)`, by method: the maxima over its tiles; for one of the
    methods, the row of the `worst` tile, by the mean of the references; its maps or None, and its evidence."""

    scores: dict[str, Floats]
    worst: int
    maps: ImageMaps | None
    evidence: Evidence


def score_images(
    examination: Examination, every: Iterable[Evidence], methods: Sequence[str], references: Sequence[NormalStatistics]
) -> Iterator[ImageScores]:
    """Score images by `methods`, of which the first has the `worst` tile. Evidence of maps gives those, too. Tiles are
    scored together, up to `ROWS` at a time or those of one image."""
    names, maps = [name for name in methods if name not in OF_MAPS], [each.maps for each in references if each.maps]
    for several in take_together(every):
        rows = {name: torch.cat([each.rows[name] for each in several]) for name in several[0].statistics}
        found, stop = {name: score_tiles(name, rows, references) for name in names}, 0
        for evidence in several:
            start, stop = stop, stop + len(evidence.tiles)
            own = {name: each[:, start:stop] for name, each in found.items()}
            mapped = map_image(examination, maps, evidence) if maps and "hidden" in evidence.rows else None
            scores = {name: each.max(1) for name, each in own.items()} | ({} if mapped is None else mapped.scores)
            yield ImageScores(scores, int(own[names[0]].mean(0).argmax()) if names else 0, mapped, evidence)


def take_together(every: Iterable[Evidence]) -> Iterator[list[Evidence]]:
    waiting, count = list[Evidence](), 0
    for evidence in every:
        if waiting and count + len(evidence.tiles) > ROWS:
            yield waiting
            waiting, count = [], 0
        waiting.append(evidence)
        count += len(evidence.tiles)
    if waiting:
        yield waiting


def score_tiles(method: str, found: dict[str, Tensor], references: Sequence[NormalStatistics]) -> Floats:
    """Score tiles by their statistics, `(K, n)`: by each of K references, or once if there is none."""
    if method in FITTED:
        return np.stack([fitted_score(method, found, each.fitted) for each in references])
    return np.repeat(plain_score(method, found).numpy()[None], max(1, len(references)), 0)


def p_values_by(method: str, scores: Floats, calibration: Calibration) -> Tensor:
    """Return conformal p-values `(B,)` of scores by each reference, `(K, B)`; ties count as normal."""
    normal = [each.scores[method] for each in calibration.references]
    if len(scores) == 1:  # the same by all references
        scores = np.repeat(scores, len(normal), 0)
    return torch.from_numpy(cross_p_values(scores, normal, calibration.scores[method].tie))


def list_methods(pipeline: ImagePipeline) -> list[str]:
    """Return the methods that score the tiles of these models."""
    there = {
        "neighbours": pipeline.prior.feature_layers,
        "ratio": pipeline.background is not None,
        "top_bits": pipeline.prior.exact,
    }
    return [method for method in METHODS if there.get(method, True) and method not in OF_MAPS]


def plain_score(method: str, found: dict[str, Tensor]) -> Tensor:
    if method in ("reconstruction", "top_bits"):
        return found["error" if method == "reconstruction" else method]
    return found["token_bits"] - found["background_bits"] if method == "ratio" else total_bits(found)


def fitted_score(method: str, found: dict[str, Tensor], fitted: Fitted) -> Floats:
    if method == "typicality":
        typical: Floats = (total_bits(found) - fitted.typical_bits).abs().numpy()
        return typical
    far = fitted.statistics.of(log_statistics(found, fitted.names))
    if fitted.features is None:
        return far
    near = fitted.features.of(found.get("features", torch.empty(len(far), 0)).numpy())
    return near if method == "neighbours" else near + np.maximum(0, far - 1)


def total_bits(found: dict[str, Tensor]) -> Tensor:
    """Return the bits of the tokens, plus the bits of the pixels given the tokens if the tokenizer has a likelihood."""
    return found["token_bits"] + found.get("pixel_bits", torch.zeros(()))


def log_statistics(found: dict[str, Tensor], names: Sequence[str] | None) -> Floats:
    """Return the logarithms of the available statistics in `TOGETHER`, `(B, d)`; they are positive and roughly
    proportional to each other. names: those of a calibration, None for one of 0.3. Raises `CalibrationError` for
    others."""
    there = [name for name in TOGETHER if name in found and (names is not None or name != "top_bits")]
    if names is not None and names != there:
        raise CalibrationError(
            f"calibrated with {', '.join(names)} of each image, now there are {', '.join(there)}: run `smalti "
            "calibrate` again"
        )
    return np.stack([np.log(found[name].numpy() + TOGETHER[name]) for name in there], axis=1)


def require_scores(examination: Examination, method: str) -> Calibration:
    """Return the calibration if it covers this method, what is given and the view, else raise `CalibrationError`."""
    calibration = require_calibration(examination.pipeline.calibration)
    calibration.check_view(examination.view)
    if method not in calibration.scores:
        raise CalibrationError(f"method: the pipeline was calibrated without {method}: run `smalti calibrate` again")
    calibration.check_given(examination.given.terms)
    return calibration
