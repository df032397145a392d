"""Open-MAGVIT2 (Luo et al. 2024, arXiv:2409.04410; SEED-Voken), after MAGVIT-2 (Yu et al. 2023, arXiv:2310.05737).

There is no attention; strided convolutions halve the sides, and pixel shuffles double them. Each decoder level begins
with a group normalisation whose scale and shift depend on the standard deviation and mean of the image's codes. An id
encodes the signs of 18 channels (`lfq`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..autoencoder import Autoencoder
from ..layers import group_norm
from ..quantizers.base import QuantizerNode
from ..quantizers.lfq import LFQConfig
from ..vqgan import Block, conv3
from .layouts import Layout, Weights
from .plain import PLAIN_NAMES, PlainConfig, plain_decoder, plain_encoder
from .vqgans import take_averages

EPS = 1e-6


class MAGVIT2Config(PlainConfig):
    """Sizes of the networks; the defaults match the ImageNet models."""

    blocks: int = Field(4, ge=1, le=64, description="residual blocks at each level, and at the token resolution")
    quantizer: QuantizerNode = Field(LFQConfig(bits=18), description="maps vectors to ids")


class OpenMAGVIT2(Autoencoder, name="magvit2"):
    """The published encoder and decoder, with any quantizer."""

    Config = MAGVIT2Config

    def __init__(self, config: MAGVIT2Config) -> None:
        super().__init__(config, config.factor)
        self.encoder = plain_encoder(config, self.quantizer.dim, Block, lambda width: nn.Conv2d(width, width, 3, 2, 1))
        self.decoder = AdaptiveDecoder(config, self.quantizer.dim, self.outputs)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class AdaptiveDecoder(nn.Module):
    """Maps `(B, dim, H / f, W / f)` to `(B, outputs, H, W)`, coarsest level first."""

    def __init__(self, config: MAGVIT2Config, dim: int, outputs: int) -> None:
        super().__init__()
        layers: Any = plain_decoder(config, dim, outputs, Block, double, lambda w: AdaptiveNorm(w, config.groups, dim))
        self.stem, self.middle = layers["stem"], layers["middle"]
        self.adaptive, self.levels = layers["adaptive"], layers["levels"]
        self.norm, self.head = layers["norm"], layers["head"]

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.stem(z))
        for adapt, level in zip(self.adaptive, self.levels, strict=True):
            x = level(adapt(x, z))
        return self.head(F.silu(self.norm(x)))


def double(width: int) -> nn.Module:
    return nn.Sequential(conv3(width, 4 * width), nn.PixelShuffle(2))


class AdaptiveNorm(nn.Module):
    """Group normalisation of `(B, width, H, W)` with scale and shift from statistics of the image's codes."""

    ones: Tensor
    zeros: Tensor

    def __init__(self, width: int, groups: int, dim: int) -> None:
        super().__init__()
        self.groups = groups
        self.register_buffer("ones", torch.ones(width), persistent=False)
        self.register_buffer("zeros", torch.zeros(width), persistent=False)
        self.scale, self.shift = nn.Linear(dim, width), nn.Linear(dim, width)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """codes: `(B, dim, h, w)`."""
        rows = codes.flatten(2).contiguous()  # so that sums round identically in every memory format
        deviation = (rows.var(2, correction=min(1, rows.shape[2] - 1)) + EPS).sqrt()
        scale, shift = self.scale(deviation), self.shift(rows.mean(2))
        normalised = group_norm(x, self.groups, self.ones, self.zeros, EPS)
        return normalised * scale[..., None, None] + shift[..., None, None]


def prepare_magvit2(weights: Weights) -> Weights:
    """Use running means, and reorder outputs of upsampling convolutions to torch's (channel, sub-pixel)."""
    prepared = take_averages(weights)
    for name, value in prepared.items():
        if ".upsample.conv1." in name and value.ndim and value.shape[0] % 4 == 0:
            prepared[name] = value.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)
    return prepared


MAGVIT2 = Layout(
    "Open-MAGVIT2",
    OpenMAGVIT2,
    lambda weights: "encoder.mid_block.0.conv1.weight" in weights,
    lambda shapes: {
        **shapes.stem_and_levels(),
        "quantizer": {"kind": "lfq", "bits": shapes.of("encoder.head.weight")[0]},
    },
    (
        (r"\.middle\.", ".mid_block."),
        (r"^encoder\.(.*)\.resample\.", r"encoder.\1.downsample."),
        (r"^decoder\.(.*)\.resample\.0\.", r"decoder.\1.upsample.conv1."),
        (r"^(decoder\.adaptive.*)\.scale\.", r"\1.gamma."),
        (r"^(decoder\.adaptive.*)\.shift\.", r"\1.beta."),
        *PLAIN_NAMES,
    ),
    training=r"loss\.|model_ema\.",
    finest_first=True,
    prepare=prepare_magvit2,
)
