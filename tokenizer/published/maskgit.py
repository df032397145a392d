"""MaskGIT's VQGAN (Chang et al. 2022, arXiv:2202.04200), as open-muse gave it to torch; RAR, TiTok and MAGE use it.

It has no attention; means of 2x2 pixels halve the sides. Its images lie in [0, 1], which is between it and ours. Where
a block of the published network widens, the 1x1 convolution of its short cut sees what the block adds, not what comes
in: so it is here, as the weights were trained with it.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..autoencoder import Autoencoder
from ..config import ModelConfig, Node
from ..layers import Upsample
from ..quantizers.vq import VQConfig
from ..vqgan import named
from .layouts import Layout, Shapes
from .plain import PLAIN_NAMES, Block, Level, PlainConfig, blocks_of, encoder, ends, plain_sizes


class MaskGITConfig(PlainConfig):
    """Sizes of the networks; the defaults are those of the ImageNet model with 16x16 ids."""

    quantizer: Annotated[ModelConfig, Node("tokenizer.quantizers:Quantizer")] = Field(
        VQConfig(codes=1024, dim=256), description="how vectors become ids"
    )


class MaskGIT(Autoencoder, name="maskgit"):
    """The published network between pixels and codes, with any quantizer."""

    Config = MaskGITConfig

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config, config.factor)
        self.encoder = encoder(config, self.quantizer.dim, ShortBlock, lambda width: nn.AvgPool2d(2))
        self.decoder = decoder(config, self.quantizer.dim, self.outputs)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _embed(self, images: Tensor) -> Tensor:
        return super()._embed((images + 1) / 2)

    def _decoded(self, z_q: Tensor) -> Tensor:
        painted = super()._decoded(z_q)
        return painted if self.has_likelihood else 2 * painted - 1


class ShortBlock(Block):
    """Where it widens, what it adds is all there is: itself, and a 1x1 convolution of it."""

    def short_cut(self, width: int, wide: int) -> nn.Module:
        return nn.Conv2d(wide, wide, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        change = self.change(x)
        return change + (x if isinstance(self.skip, nn.Identity) else self.skip(change))


def decoder(config: MaskGITConfig, dim: int, outputs: int) -> nn.Sequential:
    """`(B, dim, H / f, W / f)` to `(B, outputs, H, W)`; levels are in the order in which they run, coarsest first."""
    width, levels = config.widths[-1], []
    before, after = ends(config, dim, outputs, ShortBlock)
    for level, wide in reversed(list(enumerate(config.widths))):
        blocks = blocks_of(config, ShortBlock, width, wide)
        levels.append(Level(blocks, Upsample(wide, wide) if level else nn.Identity()))
        width = wide
    return named(**before, levels=nn.Sequential(*levels), **after)


def sizes(shapes: Shapes) -> dict[str, Any]:
    """Of a `maskgit`."""
    network, _ = plain_sizes(shapes)
    return {**network, "quantizer": shapes.codebook()}


MASKGIT = Layout(
    "MaskGIT-VQGAN",
    MaskGIT,
    lambda weights: {"encoder.mid.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"} <= set(weights),
    sizes,
    ((r"\.middle\.", ".mid."), (r"\.resample\.1\.", ".upsample_conv."), *PLAIN_NAMES),
    finest_first=True,
)
