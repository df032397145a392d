"""How unlike the normal images is an image? Scores from a pipeline's density, and what they are measured against.

A high likelihood alone does not make an image normal: simpler images of another kind are often likelier (Nalisnick et
al. 2019). The default score therefore asks two things. How far is what the prior makes of the image from what it makes
of normal ones (nearest neighbours among its features, Sun et al. 2022)? That tells one kind of thing from another. And
are several statistics of the image, together, beyond those of normal images (DoSE, Morningstar et al. 2021)? That finds
what is no such thing at all. One sign everywhere: a larger score is more anomalous, a smaller p-value is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..images.pictures import convert_images, level_of_user
from ..stages.calibration import (
    LEVELS,
    MOST_IMAGES,
    Calibration,
    CalibrationError,
    Gaussian,
    Neighbours,
    digests_of,
    rounded,
)
from ..stages.conformal import Floats, kept, least_scores, p_values_of, threshold

if TYPE_CHECKING:
    from ..stages import Label, Stages

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
"""What some methods are nothing without. `complexity` is the difference of two codes of one image (Serra et al. 2020);
without the pixels' bits one of them would be that of a part of it, and the score the other one's, negated."""
FITTED = ("joint", "neighbours", "mahalanobis", "typicality")
"""The methods that are nothing without a calibration."""
MOST_SURPRISING = 0.05
GREY_LEVEL = 2 / 255
KEPT_SCORES, KEPT_POSITIONS, KEPT_SIDE = 2000, 4096, 64  # what of large calibrations is kept
KEPT_POINTS, KEPT_FEATURES = 1000, 512
USUAL = 0.99


class Measured(NamedTuple):
    """What the models say of some images: `statistics`, float64; `surprise`, the bits of each token,
    `(B, N)`; `error`, |x - decode(encode(x))| meaned over channels, `(B, H, W)`."""

    statistics: dict[str, Tensor]
    surprise: Tensor
    error: Tensor


# Statistics


def statistics(
    pipeline: Stages, images: Any, labels: Label | Sequence[Label] = None, batch_size: int = 256
) -> dict[str, Tensor]:
    """Each `(B,)` float64, but for `features`: `token_bits` under the prior (of the class given, else unconditional);
    `pixel_bits` given the tokens, where the tokenizer has a likelihood; `codec_bits` of a general lossless coder;
    `error`, the mean over pixels of |x - decode(encode(x))| on a scale of 0 to 2; `surprise`, the mean bits of the most
    surprising 5 % of the tokens; `background_bits`, token bits under the pipeline's background prior, where it has one;
    `features` `(B, d)`, the prior's middle layer meaned over positions, where it has layers: at most 512 of its
    channels, evenly spread."""
    parts = [part.statistics for part in measured(pipeline, images, labels, batch_size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def measured(
    pipeline: Stages, images: Any, labels: Label | Sequence[Label] = None, batch_size: int = 256
) -> Iterator[Measured]:
    """Batch by batch, on the CPU. Raises `ValueError` for no images, and for those that the pipeline does not take."""
    batch = pipeline.to_images(images)
    if not len(batch):
        raise ValueError("there should be at least one image")
    for _, part, given in pipeline.batches(batch, labels, batch_size):
        tokens = pipeline.encode_batch(part)
        surprise = bits(pipeline.prior.token_log_probs(tokens, given).flatten(1))
        pixels = pipeline.tokenizer.pixel_log_prob(part, tokens)
        error = (pipeline.decode(tokens, output_type="pt") - part).abs().mean(1).cpu()
        most = max(1, math.ceil(MOST_SURPRISING * surprise.shape[1]))
        found = {"token_bits": surprise.sum(1), **({} if pixels is None else {"pixel_bits": bits(pixels)})}
        found |= {
            "codec_bits": codec_bits(convert_images(part, "np")),
            "error": error.flatten(1).double().mean(1),
            "surprise": surprise.topk(most, 1).values.mean(1),
        }
        if pipeline.background is not None:
            background = pipeline.background.token_log_probs(tokens, given)
            found["background_bits"] = bits(background.flatten(1)).sum(1)
        if pipeline.prior.feature_layers:
            features = pipeline.prior.features(tokens, given).mean(1).cpu().double()
            found["features"] = features[:, :: -(-features.shape[1] // KEPT_FEATURES)]
        yield Measured(found, surprise, error)


def bits(nats: Tensor) -> Tensor:
    """Log-probabilities as code lengths, float64 on the CPU."""
    return -nats.cpu().double() / math.log(2)


def codec_bits(pixels: np.ndarray) -> Tensor:
    """Bits of each uint8 image `(B, H, W, C)` by the best of three: deflate of its bytes, or of their differences down
    or along rows (two of PNG's filters). Without headers, which are a fifth of a PNG file of 28 x 28."""
    down, along = (np.diff(pixels, axis=axis, prepend=np.uint8(0)) for axis in (1, 2))
    variants = zip(pixels, down, along, strict=True)
    return torch.tensor([8.0 * min(map(deflated, three)) for three in variants], dtype=torch.float64)


def deflated(values: np.ndarray) -> int:
    """Bytes of a raw deflate stream."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return len(coder.compress(values.tobytes()) + coder.flush())


# Scores


def anomaly_score(
    pipeline: Stages,
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
    these and the fitted methods need a calibration. They mean nothing for the images that it was made with, of which a
    warning tells. Raises `CalibrationError` (a `ValueError`) where there is none, or not for this.
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
    total = found["token_bits"] + found.get("pixel_bits", torch.zeros(()))
    if method in FITTED:
        fitted = checked(calibration, method, labelled)
        if method == "typicality":
            return (total - fitted.typical_bits).abs()
        return torch.from_numpy(joint(found, fitted) if method == "joint" else distance(method, found, fitted))
    return {
        "nll": total,
        "complexity": total - found["codec_bits"],
        "ratio": found["token_bits"] - found.get("background_bits", torch.zeros(())),
        "reconstruction": found["error"],
        "surprise": found["surprise"],
    }[method]


def possible(found: dict[str, Tensor]) -> list[str]:
    """The methods that these statistics allow."""
    there = {"neighbours": "features", "complexity": "pixel_bits", "ratio": "background_bits"}
    return [method for method in METHODS if there.get(method, "token_bits") in found]


def joint(found: dict[str, Tensor], calibration: Calibration) -> Floats:
    """Both distances in units of what is usual: that of the features, and what that of the statistics is over."""
    statistics = distance("mahalanobis", found, calibration) / calibration.usual["mahalanobis"]
    if calibration.neighbours is None:
        return statistics
    features = distance("neighbours", found, calibration) / calibration.usual["neighbours"]
    return features + np.maximum(0, statistics - 1)


def distance(method: str, found: dict[str, Tensor], calibration: Calibration) -> Floats:
    """That of the features from their neighbours, or the Mahalanobis distance of the statistics. Raises
    `CalibrationError` if these are not what was fitted to."""
    names = columns(found)
    if names != calibration.statistics or (calibration.neighbours is None) == ("features" in found):
        raise CalibrationError(
            f"the pipeline was calibrated with {', '.join(calibration.statistics)}, and now has "
            f"{', '.join(names)}: run `smalti calibrate` again"
        )
    if method == "mahalanobis" or calibration.neighbours is None:
        return np.sqrt(calibration.mahalanobis.distance(rows_of(found)))
    features = found["features"].numpy()
    if features.shape[1] != len(calibration.neighbours.mean):
        raise CalibrationError(
            f"the pipeline was calibrated with {len(calibration.neighbours.mean)} features, and now "
            f"has {features.shape[1]}: run `smalti calibrate` again"
        )
    return calibration.neighbours.distance(features)


def columns(found: dict[str, Tensor]) -> list[str]:
    """Those of `TOGETHER` that there are."""
    return [name for name in TOGETHER if name in found]


def rows_of(found: dict[str, Tensor]) -> Floats:
    """Logarithms of the statistics `(B, d)`: all are positive, and an image's are in proportion to each other. One bit,
    or one grey level, is added, as 0 occurs and differences far below that mean nothing."""
    added = {"error": GREY_LEVEL}
    return np.stack([np.log(found[name].numpy() + added.get(name, 1.0)) for name in columns(found)], axis=1)


def p_value_of(method: str, scores: Tensor, calibration: Calibration | None, *, labelled: bool) -> Tensor:
    """Conformal p-values of scores, ties counted against detection. Raises `CalibrationError`."""
    fitted = checked(calibration, method, labelled)
    return torch.from_numpy(p_values_of(scores.numpy(), fitted.scores[method], fitted.ties[method]))


def checked(calibration: Calibration | None, method: str, labelled: bool) -> Calibration:
    """The calibration, if there is one that holds for this. Raises `CalibrationError`."""
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


# Calibration


def calibrate(
    pipeline: Stages,
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
    normal images, at most a share `false_alarms` is above a threshold *on average over calibrations*: in about every
    second one it is a little more. With a `confidence` of 0.9, the thresholds are so much higher that it is at most
    this share in 90 % of calibrations; p-values stay as they are. Raises `ValueError` for too few images to tell that
    share, and for more than 50,000.
    """
    batch = pipeline.to_images(images)
    count = len(batch)
    check_promise(count, false_alarms, confidence)
    parts, error = [], torch.zeros(batch.shape[2:], dtype=torch.float64)
    for part in measured(pipeline, batch, labels, batch_size):
        parts.append((part.statistics, part.surprise))
        error += part.error.double().sum(0)
    found = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    fit, held = ({name: v[half] for name, v in found.items()} for half in (order[: count // 2], order[count // 2 :]))
    total = fit["token_bits"] + fit.get("pixel_bits", torch.zeros(()))
    points = min(KEPT_POINTS, len(total) // 2)  # the rest of this half says how near is usual
    pixels = convert_images(batch, "np")
    blank = Calibration(
        count=count,
        data=hashlib.sha256(pixels.tobytes()).hexdigest(),
        labels=labels is not None,
        false_alarms=float(false_alarms),
        confidence=None if confidence is None else float(confidence),
        statistics=columns(found),
        typical_bits=float(f"{total.mean().item():.6g}"),
        mahalanobis=Gaussian.fit(rows_of(fit)),
        neighbours=Neighbours.fit(fit["features"].numpy()[:points]) if "features" in fit else None,
        usual={},
        scores={method: np.zeros(1) for method in possible(found)},
        ties={},
        thresholds={},
        surprise=surprise_quantiles(torch.cat([surprise for _, surprise in parts])),
        error=coarse(error / count),
        digests=np.unique(digests_of(pixels)),
    )
    pipeline.calibration = with_scores(with_usual(blank, {name: v[points:] for name, v in fit.items()}), held)
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


def with_usual(calibration: Calibration, rest: dict[str, Tensor]) -> Calibration:
    """With the distances that 99 % of images are below, of images that are not their own neighbours."""
    methods = ["mahalanobis"] + ["neighbours"] * (calibration.neighbours is not None)
    found = {method: np.quantile(distance(method, rest, calibration), USUAL) for method in methods}
    return dataclasses.replace(calibration, usual={name: float(f"{max(v, 1e-9):.6g}") for name, v in found.items()})


def with_scores(calibration: Calibration, held: dict[str, Tensor]) -> Calibration:
    """With the scores of the held half, and the thresholds that keep the promise."""
    scores, ties, thresholds = {}, {}, {}
    share, confidence = calibration.false_alarms, calibration.confidence
    for method in calibration.scores:
        each = score_of(method, held, calibration, labelled=calibration.labels)[:KEPT_SCORES]
        scores[method], ties[method] = kept(each.numpy())
        thresholds[method] = threshold(scores[method], ties[method], share, confidence)
    return dataclasses.replace(calibration, scores=scores, ties=ties, thresholds=thresholds)


def surprise_quantiles(surprise: Tensor) -> Floats:
    """`LEVELS` quantiles of `(n, N)` bits at each position, or over all where there are very many."""
    values = surprise.numpy()
    values = values if values.shape[1] <= KEPT_POSITIONS else values.reshape(-1, 1)
    return rounded(np.quantile(values, LEVELS, axis=0))


def coarse(error: Tensor) -> Floats:
    """An error map `(H, W)` of at most 64 pixels along each side."""
    height, width = (min(side, KEPT_SIDE) for side in error.shape)
    return rounded(F.adaptive_avg_pool2d(error[None], (height, width))[0].numpy())
