"""Heal anomalies in an image: resample the most surprising tokens given the others, and decode (after Marimont and
Tarroni 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.arguments import check_count, whole_number
from prior.columns import LABEL
from tokenizer.precision import in_finest
from tokenizer.spec import to_float

from .calibration import LEVELS, require_calibration
from .distances import CalibrationError
from .examine import Examination

if TYPE_CHECKING:
    from ..image_pipeline import Condition, ImagePipeline, Images, Label

SHARPNESS = 0.1  # rate at which the weight of a restoration falls with its nats: exp(-0.1 per nat)


class Healed(NamedTuple):
    """Healed images `(B, C, H, W)` in [-1, 1]; resampled tokens, bool `(B, *grid.shape)`; difference of the pixels,
    `(B, H, W)`; healed tokens, `(B, *grid.shape)`. Of clips, `(B, T, C, H, W)` and `(B, T, H, W)`."""

    images: Tensor
    resampled: Tensor
    difference: Tensor
    tokens: Tensor


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
    restored, nats = [], []
    for draw in range(draws):
        seeds = [((seed + k) * draws + draw) % (1 << 64) for k in range(len(batch))]
        generator = [torch.Generator().manual_seed(one) for one in seeds]
        sampled = pipeline.prior.sample(
            len(batch), condition=given, generator=generator, tokens=tokens, known=~resampled
        )
        restored.append(sampled)
        nats.append(-pipeline.prior.log_prob(sampled, condition=given))
    weights = (-SHARPNESS * in_finest(torch.stack(nats))).softmax(0).float()
    pixels = [pipeline.decode_batch(each) for each in restored]
    differences = torch.stack([(x - batch).abs().mean(-3) for x in pixels])  # (draws, B, H, W)
    difference = (differences * weights.view(*weights.shape, *[1] * (differences.ndim - 2))).sum(0)
    # The mean error on normal images; of clips, stored with the frames below one another.
    error, shape = torch.from_numpy(calibration.error).to(batch)[None, None], difference.shape[1:]
    error = F.interpolate(error, (math.prod(shape[:-1]), shape[-1]), mode="bilinear", align_corners=False)
    difference = (difference - error[0, 0].view(shape)).clamp(min=0)
    best = weights.argmax(0), torch.arange(len(batch), device=batch.device)
    return Healed(torch.stack(pixels)[best], resampled, difference, torch.stack(restored)[best])
