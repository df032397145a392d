"""Heal anomalies in an image: resample the most surprising tokens given the others, and decode (after Marimont and
Tarroni 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.arguments import check_count, whole_number
from prior.canvas import canvas_log_probs
from prior.columns import LABEL
from prior.given import Given
from prior.options import DecodingOptions
from tokenizer.precision import in_finest
from tokenizer.spec import to_float

from ..canvas import decode_canvas_batch, make_chain, merge_windows, read_canvas_given, read_equal, sample_canvas
from .calibration import LEVELS, require_calibration
from .distances import CalibrationError
from .examine import Examination

if TYPE_CHECKING:
    from ..image_pipeline import Condition, ImagePipeline, Images, Label

SHARPNESS = 0.1  # rate at which the weight of a restoration falls with its nats: exp(-0.1 per nat)


class Healed(NamedTuple):
    """Healed images `(B, C, H, W)` in [-1, 1]; resampled tokens, bool `(B, *grid.shape)`; difference of the pixels,
    `(B, H, W)`; healed tokens, `(B, *grid.shape)`, of large images those of the canvas. Of clips, `(B, T, C, H, W)` and
    `(B, T, H, W)`."""

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
    stride: int | None = None,
) -> Healed:
    """Resample the tokens that are more surprising than a `quantile` of normal tokens at their position.

    The likeliest of `draws` restorations is decoded to `images`. `difference` is the mean of |x - decoded| over all
    restorations, weighted by likelihood, minus the tokenizer's mean error on normal images. An any-order prior
    conditions on all other tokens, and any other prior on those that come earlier in its order. Image k uses the seeds
    (seed + k) * draws to (seed + k) * draws + draws - 1. condition: values of the columns that were given in the
    calibration; its `marginal` applies, too, unless that column is given. stride: heal images of one size at their own
    size, as a canvas with windows at every `stride` pixels. Raises `CalibrationError` without a calibration or with
    other columns, and `ValueError` for a quantile that is not calibrated.

    Marimont and Tarroni measure a token's surprise given the tokens healed so far; here it is measured once, given the
    original tokens. They weight restorations by softmax(3 / mean |x - decoded|), favouring those near the image; here
    the weight is exp(-0.1 nats), favouring likely ones.
    """
    examination = Examination.open(pipeline, images, labels, condition, stride)
    marginal = require_calibration(pipeline.calibration).marginal
    if marginal is not None and marginal not in examination.given.rows:
        given = pipeline.read_given(condition=examination.given, marginal=marginal)
        examination = replace(examination, given=given)
    if stride is not None:
        return heal_canvas(examination, stride, quantile, draws, seed)
    return heal_images(examination, quantile, draws, seed)


def find_limit(pipeline: ImagePipeline, given: Given, quantile: float) -> Tensor:
    """Return the bits above which a token is surprising, of each position or `(1,)` of all. Raises as `heal` does."""
    calibration = require_calibration(pipeline.calibration)
    if quantile not in LEVELS:
        raise ValueError(f"quantile should be one of {', '.join(map(str, LEVELS))} (got {quantile})")
    label = {LABEL} if calibration.labels else set()
    calibration.check_given({*given.terms} - {LABEL} | label | {*calibration.mixture})
    limit = torch.from_numpy(calibration.surprise[LEVELS.index(quantile)])
    if len(limit) not in (1, len(pipeline.prior.grid)):
        raise CalibrationError(
            f"the calibration is for a grid of {len(limit)} tokens, this pipeline has {len(pipeline.prior.grid)}: "
            "run `smalti calibrate` again"
        )
    return limit


def heal_canvas(examination: Examination, stride: int, quantile: float, draws: int, seed: int) -> Healed:
    """Heal images at their own size; see `heal`."""
    pipeline, draws = examination.pipeline, check_count(draws, "draws")
    limit = find_limit(pipeline, examination.given, quantile)
    batch = torch.stack(read_equal(examination.source))
    chain = make_chain(pipeline, batch.shape[-2:], stride)
    evidence = [each.rows for each in examination.examine(["surprise"])]
    tokens, surprising = (torch.stack([rows[name].cpu() for rows in evidence]) for name in ("tokens", "surprise"))
    surprising = (surprising.flatten(2) > limit.to(surprising)).view(tokens.shape)
    tokens, resampled = merge_windows(chain, tokens.long()), merge_windows(chain, surprising)
    given = read_canvas_given(pipeline, chain, condition=examination.given)
    request: Any = {"sampling": pipeline.prior.make_sampling_options(), "decoding": DecodingOptions()}
    pixels, nats, restored = [], [], []
    for draw in range(draws):
        seeds = [((seed + k) * draws + draw) % (1 << 64) for k in range(len(batch))]
        generator = [torch.Generator().manual_seed(one) for one in seeds]
        canvas = sample_canvas(pipeline, chain, given, generator=generator, tokens=tokens, known=~resampled, **request)
        log_probs = canvas_log_probs(pipeline.prior, chain, given, canvas.tokens.cpu(), canvas.known)
        restored.append(canvas.tokens.cpu())
        nats.append(-log_probs.flatten(1).sum(1))
        pixels.append(decode_canvas_batch(pipeline, restored[-1], chain))
    weights = (-SHARPNESS * torch.stack(nats)).softmax(0).float()
    differences = torch.stack([(x - batch).abs().mean(-3) for x in pixels])
    usual = float(require_calibration(pipeline.calibration).error.mean())
    difference = ((differences * weights[..., None, None]).sum(0) - usual).clamp(min=0)
    best = weights.argmax(0), torch.arange(len(batch))
    return Healed(torch.stack(pixels)[best], resampled, difference, torch.stack(restored)[best])


@torch.no_grad()
def heal_images(examination: Examination, quantile: float = 0.98, draws: int = 8, seed: int = 0) -> Healed:
    """Heal whole images; see `heal`."""
    pipeline, given = examination.pipeline, examination.given
    if not len(examination):
        raise ValueError("expected at least one image")
    calibration = require_calibration(pipeline.calibration)
    draws, seed = check_count(draws, "draws"), whole_number("seed", seed)
    limit = find_limit(pipeline, given, quantile)
    batch = torch.stack([to_float(examination.read(number)) for number in range(len(examination))]).to(pipeline.device)
    rows = [evidence.rows for evidence in examination.examine(["surprise"])]
    tokens, bits = (torch.cat([each[name] for each in rows]).to(pipeline.device) for name in ("tokens", "surprise"))
    resampled = (bits > limit.to(bits)).reshape(tokens.shape)
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
