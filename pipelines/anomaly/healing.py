"""Locate anomalies in an image, and heal them.

The anomaly map spreads the bits of each token over its pixels. Healing (after Marimont and Tarroni 2021) resamples the
most surprising tokens given the others, and decodes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.arguments import check_count, whole_number
from prior.columns import LABEL
from tokenizer.precision import in_finest
from tokenizer.spec import to_float

from ..images.views import check_places
from .calibration import LEVELS, Calibration, MapReference, require_calibration
from .distances import CalibrationError
from .examine import Evidence, Examination
from .maps import MAPPED, MAPS, NEEDED, map_image

if TYPE_CHECKING:
    from ..image_pipeline import Condition, ImagePipeline, Images, Label

SHARPNESS = 0.1
"""Rate at which the weight of a restoration falls with its nats: exp(-0.1 per nat)."""


class Healed(NamedTuple):
    """Healed images `(B, C, H, W)` in [-1, 1]; resampled tokens, bool `(B, *grid.shape)`; difference of the pixels,
    `(B, H, W)`; healed tokens, `(B, *grid.shape)`."""

    images: Tensor
    resampled: Tensor
    difference: Tensor
    tokens: Tensor


def anomaly_map(
    pipeline: ImagePipeline,
    images: Any,
    labels: Label | Sequence[Label] = None,
    *,
    method: str = "bits",
    condition: Condition = None,
    stride: int | None = None,
    batch_size: int = 256,
) -> Any:
    """Return the bits of each pixel, `(B, H, W)`: the bits of a token are spread evenly over its patch, plus the bits
    of the pixel given the tokens if the tokenizer has a likelihood. They sum to the bits of the image. labels,
    condition: what the bits are conditioned on; a `condition` that is computed from the image, such as its outline,
    hides what it shows. Raises `ValueError` for tokens without a position in the image: those of scales and of
    `titok`. Of clips, the maps are `(B, T, H, W)`.

    stride: take images of any size from the model's size on, also of different sizes in one list, and return a list of
    maps, each `(H, W)` at the size of its image: the average over tiles of the model's size at every `stride` pixels
    and at the borders. An image of the model's size is one tile. Raises `ValueError` for a stride that is larger than a
    tile, and for an image that is smaller.

    method: `bits`; `hidden`, the bits of tokens while their block is hidden, less the mean of their id (see `hidden`);
    or `combined`, these and the distance from normal filter responses, which finds places best. The latter two are
    blurred and need a calibration with the same stride and condition, else raise `CalibrationError`."""
    if method not in MAPS:
        raise ValueError(f"method: unknown map {method!r}; choose one of {', '.join(MAPS)}")
    examination = Examination.open(pipeline, images, labels, condition, stride, batch_size)
    if method != "bits":
        check_places(examination.given)
    maps = [found[method] for _, found in map_images(examination, [method])]
    if examination.view.is_tiled:
        return maps
    return torch.stack(maps) if maps else torch.empty(0, *pipeline.spec.shape[:-3], *pipeline.spec.size)


def map_images(examination: Examination, methods: Collection[str]) -> Iterator[tuple[Evidence, dict[str, Tensor]]]:
    """Yield the evidence and the maps `(H, W)` of each image by methods of `MAPS`. Raises `ValueError` if there are
    none, `CalibrationError` without a calibration for them."""
    references = [] if {*methods} == {"bits"} else require_maps(examination)
    examination.patches  # noqa: B018 - raises for tokens without a place
    want = [*(MAPPED if references else ()), *(["bits"] if "bits" in methods else [])]
    for evidence in examination.examine(want):
        found = {"bits": examination.map_bits(evidence)} if "bits" in methods else {}
        if references:
            maps = map_image(examination, references, evidence)
            found |= {"hidden": maps.hidden, "combined": maps.combined}
        yield evidence, found


def require_maps(examination: Examination) -> list[MapReference]:
    """Return the references for the maps of these images, else raise `CalibrationError`."""
    calibration = require_calibration(examination.pipeline.calibration)
    calibration.check_view(examination.view)
    calibration.check_given((*examination.given.names, *calibration.mixture))  # hidden tokens have none
    if not calibration.has_maps:
        raise CalibrationError(f"the pipeline was calibrated without maps, which need {NEEDED}; or calibrate again")
    return [each.maps for each in calibration.references if each.maps]


@torch.no_grad()
def heal(
    pipeline: ImagePipeline,
    images: Images,
    labels: Label | Sequence[Label] = None,
    *,
    condition: Condition = None,
    quantile: float = 0.98,
    draws: int = 8,
    seed: int = 0,
) -> Healed:
    """Resample the tokens that are more surprising than a `quantile` of normal tokens at their position.

    The likeliest of `draws` restorations is decoded to `images`. `difference` is the mean of |x - decoded| over all
    restorations, weighted by likelihood, minus the tokenizer's mean error on normal images. An any-order prior
    conditions on all other tokens, and any other prior on those that come earlier in its order. Image k uses the seeds
    (seed + k) * draws to (seed + k) * draws + draws - 1. condition: values of the columns that were given in the
    calibration; its `marginal` applies, too, unless that column is given. Raises `CalibrationError` without a
    calibration or with other columns, and `ValueError` for a quantile that is not calibrated.

    Marimont and Tarroni measure a token's surprise given the tokens healed so far; here it is measured once, given the
    original tokens. They weight restorations by softmax(3 / mean |x - decoded|), favouring those near the image; here
    the weight is exp(-0.1 nats), favouring likely ones.

    Of clips, images are `(B, T, C, H, W)` and differences `(B, T, H, W)`.
    """
    examination = Examination.open(pipeline, images, labels, condition)
    marginal = require_calibration(pipeline.calibration).marginal
    if marginal is not None and marginal not in examination.given.rows:
        given = pipeline.read_given(condition=examination.given, marginal=marginal)
        examination = replace(examination, given=given)
    return heal_images(examination, quantile, draws, seed)


@torch.no_grad()
def heal_images(examination: Examination, quantile: float = 0.98, draws: int = 8, seed: int = 0) -> Healed:
    """Heal whole images; see `heal`."""
    pipeline, given = examination.pipeline, examination.given
    if not len(examination):
        raise ValueError("expected at least one image")
    calibration = require_calibration(pipeline.calibration)
    draws, seed = check_count(draws, "draws"), whole_number("seed", seed)
    if quantile not in LEVELS:
        raise ValueError(f"quantile should be one of {', '.join(map(str, LEVELS))} (got {quantile})")
    label = {LABEL} if calibration.labels else set()
    calibration.check_given({*given.terms} - {LABEL} | label | {*calibration.mixture})
    batch = torch.stack([to_float(examination.read(number)) for number in range(len(examination))]).to(pipeline.device)
    rows = [evidence.rows for evidence in examination.examine(["surprise"])]
    tokens, bits = (torch.cat([each[name] for each in rows]).to(pipeline.device) for name in ("tokens", "surprise"))
    limit = torch.from_numpy(calibration.surprise[LEVELS.index(quantile)]).to(bits)
    if len(limit) not in (1, len(pipeline.prior.grid)):
        raise CalibrationError(
            f"the calibration is for a grid of {len(limit)} tokens, this pipeline has {len(pipeline.prior.grid)}: "
            "run `smalti calibrate` again"
        )
    resampled = (bits > limit).reshape(tokens.shape)
    found, nats = [], []
    for draw in range(draws):
        seeds = [((seed + k) * draws + draw) % (1 << 64) for k in range(len(batch))]
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        options: dict[str, Any] = {"generator": generators, "tokens": tokens, "known": ~resampled}
        found.append(pipeline.prior.sample(len(batch), condition=given, **options))
        nats.append(-pipeline.prior.log_prob(found[-1], condition=given))
    weights = (-SHARPNESS * in_finest(torch.stack(nats))).softmax(0).float()
    pixels = [pipeline.decode_batch(restored) for restored in found]
    difference = torch.stack([(x - batch).abs().mean(-3) for x in pixels])
    weights_of_pixels = weights.view(*weights.shape, *[1] * (difference.ndim - 2))
    difference = (difference * weights_of_pixels).sum(0) - error_map(calibration, batch)
    best = weights.argmax(0), torch.arange(len(batch), device=batch.device)
    return Healed(torch.stack(pixels)[best], resampled, difference.clamp(min=0), torch.stack(found)[best])


def error_map(calibration: Calibration, batch: Tensor) -> Tensor:
    """Resize the tokenizer's mean error on normal images to `(H, W)`; of clips, stored with the frames below one
    another, to `(T, H, W)`."""
    shape = batch[0].select(-3, 0).shape
    size = (math.prod(shape[:-1]), shape[-1])
    error = torch.from_numpy(calibration.error).to(batch)[None, None]
    return F.interpolate(error, size=size, mode="bilinear", align_corners=False)[0, 0].view(shape)
