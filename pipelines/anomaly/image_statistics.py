"""Statistics of an image under the models: bits of tokens and pixels, reconstruction error, features of the prior."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prior.given import Given

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

MAX_FEATURES = 128


class Measured(NamedTuple):
    """Measurements of n images: `statistics`, each float64 `(n,)` except `features`; `surprise`, the bits of each
    token, float32 `(n, N)`; `error`, the mean of |x - decode(encode(x))| over images and channels, `(H, W)`, the frames
    of clips below one another.

    The statistics are `token_bits` under the prior, given what is given; `pixel_bits` given the tokens, if the
    tokenizer has a likelihood; `error`, the mean over pixels of |x - decode(encode(x))|, from 0 to 2;
    `background_bits`, token bits under the background prior, if any; `features` `(n, d)`, the prior's middle layer
    averaged over positions (at most 128 evenly spaced channels), if the prior has layers.
    """

    statistics: dict[str, Tensor]
    surprise: Tensor
    error: Tensor


@torch.no_grad()
def measure(pipeline: ImagePipeline, batch: Tensor, given: Given, batch_size: int = 256) -> Measured:
    """Measure images `(B, C, H, W)` in [-1, 1], as returned by `to_images`; the result is on the CPU. Raises
    `ValueError` for an empty batch."""
    if not len(batch):
        raise ValueError("expected at least one image")
    parts, surprise, total_error = [], [], torch.zeros((), dtype=torch.float64)
    background = pipeline.background
    for _, part, own in pipeline.batches(batch, given, batch_size):
        tokens = pipeline.encode_batch(part)
        token_bits = bits(pipeline.prior.token_log_probs(tokens, condition=own).flatten(1))
        error = (pipeline.decode_batch(tokens) - part).abs().mean(-3).flatten(1, -2).cpu().double()
        found = {"token_bits": token_bits.sum(1), "error": error.flatten(1).mean(1)}
        if (pixels := pipeline.tokenizer.pixel_log_prob(part, tokens)) is not None:
            found["pixel_bits"] = bits(pixels)
        if background is not None:
            less = own.without(set(own.columns) - background.columns.keys())
            nats = background.token_log_probs(tokens, condition=less)
            found["background_bits"] = bits(nats.flatten(1)).sum(1)
        if pipeline.prior.feature_layers:
            features = pipeline.prior.features(tokens, condition=own).mean(1).cpu().double()
            found["features"] = features[:, :: -(-features.shape[1] // MAX_FEATURES)]
        parts.append(found)
        surprise.append(token_bits.float())
        total_error = total_error + error.sum(0)
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Measured(together, torch.cat(surprise), total_error / len(batch))


def bits(nats: Tensor) -> Tensor:
    """Convert log-probabilities to bits, float64 on the CPU."""
    return -nats.cpu().double() / math.log(2)
