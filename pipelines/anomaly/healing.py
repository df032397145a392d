"""Where an image is unlike the normal ones, and what it would look like if it were not.

The map shows the bits of each token on the pixels that it stands for. Healing (after Marimont and Tarroni 2021) draws
the most surprising tokens again, given the others, and decodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.sampling import check_count, whole_number
from tokenizer import Tokenizer
from tokenizer.precision import in_finest

from .calibration import LEVELS, Calibration, require_calibration
from .distances import CalibrationError

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline, Images, Label

SHARPNESS = 0.1
"""How fast a restoration's weight falls with its nats: exp(-0.1 per nat)."""


class Healed(NamedTuple):
    """images `(B, C, H, W)` in [-1, 1]; which tokens were drawn again, bool `(B, *grid.shape)`; how the pixels differ,
    `(B, H, W)`; and the healed tokens, `(B, *grid.shape)`."""

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
    batch_size: int = 256,
) -> Tensor:
    """Bits of each pixel `(B, H, W)`: those of a token are spread evenly over its patch, and those of the pixel given
    the tokens are added where the tokenizer has a likelihood. They sum to the bits of the image. Raises
    `ValueError` for tokens that belong to no part of the image: scales, and a `titok`'s."""
    batch = pipeline.to_images(images)
    rows, columns = (side.to(pipeline.device) for side in patches(pipeline.tokenizer))
    maps = []
    for _, part, given in pipeline.batches(batch, labels, batch_size):
        tokens = pipeline.encode_batch(part)
        bits = -pipeline.prior.token_log_probs(tokens, given).flatten(1) / math.log(2)
        spread = (bits[:, None] * rows.to(bits)) @ columns.to(bits).T  # (B, H, N) @ (N, W)
        if pipeline.tokenizer.has_likelihood:
            spread = spread - pipeline.tokenizer.pixel_log_probs(part, tokens).sum(1) / math.log(2)
        maps.append(spread)
    return torch.cat(maps)


def patches(tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """How a token's bits are spread over the rows of the image `(H, N)` and over its columns `(W, N)`, each summing to
    one per token; the pixels of a token are those without which `known_tokens` does not know it. Raises `ValueError`
    unless tokens are `placed`."""
    _, height, width = tokenizer.image_shape
    along_rows = ~torch.eye(height, dtype=torch.bool)[:, :, None].expand(-1, -1, width)
    along_columns = ~torch.eye(width, dtype=torch.bool)[:, None, :].expand(-1, height, -1)
    rows, columns = ((~tokenizer.known_tokens(known)).flatten(1).float() for known in (along_rows, along_columns))
    return rows / rows.sum(0), columns / columns.sum(0)


@torch.no_grad()
def heal(
    pipeline: ImagePipeline,
    images: Images,
    labels: Label | Sequence[Label] = None,
    *,
    quantile: float = 0.98,
    draws: int = 8,
    seed: int = 0,
) -> Healed:
    """Draw again the tokens that are more surprising than that `quantile` of normal ones at their position.

    Of `draws` restorations of an image, the likeliest is decoded to `images`. `difference` is the mean of |x - decoded|
    over all of them, likelier ones weighing more, less what the tokenizer is wrong by on normal images. A prior of any
    order sees all tokens that stay; any other one those before the drawn token in its order. Image k uses the seeds
    (seed + k) * draws to (seed + k) * draws + draws - 1. Raises `CalibrationError` without a calibration, `ValueError`
    for a quantile that it does not hold.

    Marimont and Tarroni measure each token's surprise given the tokens healed so far, here it is measured once, given
    the image's own. And they weigh restorations by softmax(3 / mean |x - decoded|), the nearer to the image the more;
    here by exp(-0.1 nats), the likelier the more.
    """
    calibration = require_calibration(pipeline.calibration)
    draws, seed = check_count(draws, "draws"), whole_number("seed", seed)
    if quantile not in LEVELS:
        raise ValueError(f"quantile should be one of {', '.join(map(str, LEVELS))} (got {quantile})")
    batch = pipeline.to_images(images)
    ids, tokens = pipeline.label_ids(labels, len(batch)), pipeline.encode_batch(batch)
    bits = -pipeline.prior.token_log_probs(tokens, ids) / math.log(2)
    limit = torch.from_numpy(calibration.surprise[LEVELS.index(quantile)]).to(bits)
    if len(limit) not in (1, len(pipeline.prior.grid)):
        raise CalibrationError(
            f"the calibration is of a grid of {len(limit)} tokens, this one has "
            f"{len(pipeline.prior.grid)}: run `smalti calibrate` again"
        )
    resampled = (bits.flatten(1) > limit).reshape(tokens.shape)
    found, nats = [], []
    for draw in range(draws):
        seeds = [((seed + k) * draws + draw) % (1 << 64) for k in range(len(batch))]
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        found.append(pipeline.prior.sample(len(batch), ids, generator=generators, tokens=tokens, known=~resampled))
        nats.append(-pipeline.prior.log_prob(found[-1], ids))
    weights = (-SHARPNESS * in_finest(torch.stack(nats))).softmax(0).float()
    pixels = [pipeline.decode(restored, output_type="pt") for restored in found]
    difference = torch.stack([(x - batch).abs().mean(1) for x in pixels])
    difference = (difference * weights[:, :, None, None]).sum(0) - error_map(calibration, batch)
    best = weights.argmax(0), torch.arange(len(batch), device=batch.device)
    return Healed(torch.stack(pixels)[best], resampled, difference.clamp(min=0), torch.stack(found)[best])


def error_map(calibration: Calibration, batch: Tensor) -> Tensor:
    """The tokenizer's mean error on normal images, `(H, W)`."""
    error = torch.from_numpy(calibration.error).to(batch)[None, None]
    return F.interpolate(error, size=tuple(batch.shape[2:]), mode="bilinear", align_corners=False)[0, 0]
