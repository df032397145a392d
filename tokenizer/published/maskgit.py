"""MaskGIT's VQGAN (Chang et al. 2022, arXiv:2202.04200), as ported to torch by open-muse; RAR, TiTok and MAGE use it.

There is no attention, average pooling halves the sides, and images are in [0, 1]. In blocks that change the width, the
shortcut's 1x1 convolution is applied to the residual, not to the input; this is reproduced because the weights were
trained with it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ..autoencoder import Autoencoder
from ..layers import Upsample
from ..quantizers.base import QuantizerNode
from ..quantizers.vq import VQConfig
from ..vqgan import Block, named_sequential
from .layouts import Layout
from .plain import PLAIN_NAMES, PlainConfig, plain_decoder, plain_encoder


class MaskGITConfig(PlainConfig):
    """Sizes of the networks; the defaults match the ImageNet model with 16x16 ids."""

    quantizer: QuantizerNode = Field(VQConfig(codes=1024, dim=256), description="maps vectors to ids")


class MaskGIT(Autoencoder, name="maskgit"):
    """The published encoder and decoder, with any quantizer."""

    Config = MaskGITConfig

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config, config.factor)
        dim, block = self.quantizer.dim, MaskGITBlock
        self.encoder = plain_encoder(config, dim, block, lambda width: nn.AvgPool2d(2))
        layers = plain_decoder(config, dim, self.outputs, block, lambda width: Upsample(width, width))
        self.decoder = named_sequential(**layers)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _embed(self, images: Tensor) -> Tensor:
        return super()._embed((images + 1) / 2)

    def _decode_vectors(self, z_q: Tensor) -> Tensor:
        outputs = super()._decode_vectors(z_q)
        return outputs if self.has_likelihood else 2 * outputs - 1


class MaskGITBlock(Block):
    """A block that outputs the residual plus a 1x1 convolution of the residual if the width changes."""

    def shortcut(self, width: int, wide: int, bias: bool) -> nn.Module:
        return nn.Conv2d(wide, wide, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.residual(x)
        return residual + (x if isinstance(self.skip, nn.Identity) else self.skip(residual))


MASKGIT = Layout(
    "MaskGIT-VQGAN",
    MaskGIT,
    lambda weights: {"encoder.mid.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"} <= set(weights),
    lambda shapes: {**shapes.stem_and_levels(), "quantizer": shapes.codebook()},
    ((r"\.middle\.", ".mid."), (r"\.resample\.1\.", ".upsample_conv."), *PLAIN_NAMES),
    finest_first=True,
)
