"""What the models say of an image: bits of its tokens and pixels, its reconstruction error, features of the prior."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..images.pictures import convert_images

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline, Label

MOST_SURPRISING = 0.05
KEPT_FEATURES = 512


class Measured(NamedTuple):
    """What the models say of some images: `statistics`, float64; `surprise`, the bits of each token,
    `(B, N)`; `error`, the mean of |x - decode(encode(x))| over channels, `(B, H, W)`."""

    statistics: dict[str, Tensor]
    surprise: Tensor
    error: Tensor


def statistics(
    pipeline: ImagePipeline, images: Any, labels: Label | Sequence[Label] = None, batch_size: int = 256
) -> dict[str, Tensor]:
    """Each `(B,)` float64, but for `features`: `token_bits` under the prior (of the class given, else unconditional);
    `pixel_bits` given the tokens, where the tokenizer has a likelihood; `codec_bits` of a general lossless coder;
    `error`, the mean over pixels of |x - decode(encode(x))| on a scale of 0 to 2; `surprise`, the mean bits of the most
    surprising 5 % of the tokens; `background_bits`, token bits under the pipeline's background prior, where it has one;
    `features` `(B, d)`, the prior's middle layer averaged over positions, where it has layers: at most 512 of its
    channels, evenly spread."""
    parts = [part.statistics for part in measure(pipeline, images, labels, batch_size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def measure(
    pipeline: ImagePipeline, images: Any, labels: Label | Sequence[Label] = None, batch_size: int = 256
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
