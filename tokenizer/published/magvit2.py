"""Open-MAGVIT2 (Luo et al. 2024, arXiv:2409.04410; SEED-Voken), after MAGVIT-2 (Yu et al. 2023, arXiv:2310.05737).

There is no attention; strided convolutions halve the sides, and pixel shuffles double them. Each decoder level begins
with a group normalisation whose scale and shift depend on the standard deviation and mean of the image's codes. An id
encodes the signs of 18 channels (`lfq`).
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..autoencoder import Autoencoder
from ..config import ModelConfig, Node
from ..layers import group_norm
from ..quantizers.lfq import LFQConfig
from ..vqgan import Block, Level, conv3
from .layouts import Layout, Weights
from .plain import PLAIN_NAMES, PlainConfig, decoder_ends, level_blocks, plain_encoder
from .vqgans import take_averages

EPS = 1e-6


class MAGVIT2Config(PlainConfig):
    """Sizes of the networks; the defaults match the ImageNet models."""

    blocks: int = Field(4, ge=1, le=64, description="residual blocks at each level, and at the token resolution")
    quantizer: Annotated[ModelConfig, Node("tokenizer.quantizers:Quantizer")] = Field(
        LFQConfig(bits=18), description="maps vectors to ids"
    )


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
        before, after = decoder_ends(config, dim, outputs, Block)
        self.stem, self.middle = before["stem"], before["middle"]
        self.adaptive, self.levels = nn.ModuleList(), nn.ModuleList()
        width = config.widths[-1]
        for level, wide in reversed(list(enumerate(config.widths))):
            self.adaptive.append(AdaptiveNorm(width, config.groups, dim))
            blocks = level_blocks(config, Block, width, wide)
            double = nn.Sequential(conv3(wide, 4 * wide), nn.PixelShuffle(2)) if level else nn.Identity()
            self.levels.append(Level(blocks, double))
            width = wide
        self.norm, self.head = after["norm"], after["head"]

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.stem(z))
        for adapt, level in zip(self.adaptive, self.levels, strict=True):
            x = level(adapt(x, z))
        return self.head(F.silu(self.norm(x)))


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
    """Use running means, and reorder the outputs of upsampling convolutions from (sub-pixel, channel) to torch's
    (channel, sub-pixel)."""
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
