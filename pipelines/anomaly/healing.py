"""Locate anomalies in an image, and heal them.

The anomaly map spreads the bits of each token over its pixels. Healing (after Marimont and Tarroni 2021) resamples the
most surprising tokens given the others, and decodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.arguments import check_count, whole_number
from prior.columns import LABEL
from prior.given import Given
from tokenizer.precision import in_finest

from ..images.tiles import LazyImages, Place, check_places, give_places, stitch_maps
from .calibration import LEVELS, Calibration, require_calibration
from .distances import CalibrationError
from .maps import MAPS, find_patches, map_calibrated, read_images

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


@torch.no_grad()
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
    if method != "bits":
        several = read_images(pipeline, images, stride)
        given = check_places(pipeline.read_given(labels, condition, len(several)))
        maps = [getattr(each, method) for each in map_calibrated(pipeline, several, given, stride, batch_size)]
        return maps if stride is not None else torch.stack(maps)
    if stride is not None:
        several = pipeline.list_images(images)
        given = check_places(pipeline.read_given(labels, condition, len(several)))
        return map_large(pipeline, several, given, stride, batch_size)
    batch = pipeline.to_images(images)
    given = pipeline.read_given(labels, condition, len(batch))
    return map_bits(pipeline, batch, given, batch_size)


@torch.no_grad()
def map_bits(pipeline: ImagePipeline, batch: Tensor, given: Given, batch_size: int = 256) -> Tensor:
    """Return the bits of each pixel of `batch` `(B, *spec.shape)`, from `to_images`: `(B, H, W)`, of clips `(B, T, H,
    W)`."""
    patches = find_patches(pipeline.tokenizer)
    batches = pipeline.batches(batch, given, batch_size)
    return torch.cat([spread_bits(pipeline, part, own, *patches) for _, part, own in batches])


@torch.no_grad()
def map_large(
    pipeline: ImagePipeline, images: LazyImages, given: Given, stride: int, batch_size: int = 256
) -> list[Tensor]:
    """Return the maps of images of any size; see `anomaly_map`."""
    shape, patches = pipeline.tokenizer.image_shape, find_patches(pipeline.tokenizer)

    def map_tiles(tiles: Tensor, places: list[Place]) -> Tensor:
        return spread_bits(pipeline, tiles, give_places(given, places), *patches)

    return stitch_maps(images, map_tiles, shape, stride, batch_size, pipeline.device)


def spread_bits(pipeline: ImagePipeline, part: Tensor, given: Given, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the bits of each pixel `(B, H, W)` of float images. rows, columns: from `find_patches`."""
    tokens = pipeline.encode_batch(part)
    bits = -pipeline.prior.token_log_probs(tokens, condition=given).flatten(1) / math.log(2)
    spread = (bits[:, None] * rows.to(bits)) @ columns.to(bits).T  # (B, H, N) @ (N, W)
    spread = spread.view(len(part), *part.select(-3, 0).shape[1:])
    if pipeline.tokenizer.has_likelihood:
        spread = spread - pipeline.tokenizer.pixel_log_probs(part, tokens).sum(-3) / math.log(2)
    return spread


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
    batch = pipeline.to_images(images)
    given = pipeline.read_given(labels, condition, len(batch))
    marginal = require_calibration(pipeline.calibration).marginal
    if marginal is not None and marginal not in given.rows:
        given = pipeline.read_given(condition=given, marginal=marginal)
    return heal_images(pipeline, batch, given, quantile, draws, seed)


@torch.no_grad()
def heal_images(
    pipeline: ImagePipeline, batch: Tensor, given: Given, quantile: float = 0.98, draws: int = 8, seed: int = 0
) -> Healed:
    """Heal `batch` `(B, *spec.shape)`, from `to_images`; see `heal`."""
    calibration = require_calibration(pipeline.calibration)
    draws, seed = check_count(draws, "draws"), whole_number("seed", seed)
    if quantile not in LEVELS:
        raise ValueError(f"quantile should be one of {', '.join(map(str, LEVELS))} (got {quantile})")
    tokens = pipeline.encode_batch(batch)
    label = {LABEL} if calibration.labels else set()
    calibration.check_given({*given.terms} - {LABEL} | label | {*calibration.mixture})
    bits = -pipeline.prior.token_log_probs(tokens, condition=given) / math.log(2)
    limit = torch.from_numpy(calibration.surprise[LEVELS.index(quantile)]).to(bits)
    if len(limit) not in (1, len(pipeline.prior.grid)):
        raise CalibrationError(
            f"the calibration is for a grid of {len(limit)} tokens, this pipeline has {len(pipeline.prior.grid)}: "
            "run `smalti calibrate` again"
        )
    resampled = (bits.flatten(1) > limit).reshape(tokens.shape)
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
