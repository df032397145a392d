"""Cosmos' discrete image tokenizer (NVIDIA 2025, arXiv:2501.03575): VQGAN's network on Haar wavelets.

A fixed transform folds patches into channels: the mean and three differences of each 2x2 block, applied recursively.
The network therefore has fewer halvings than levels. Vectors are rounded (`fsq`): 8x8x8x5x5x5 gives 64,000 ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..autoencoder import Autoencoder
from ..files import WeightsError
from ..quantizers.base import QuantizerNode
from ..quantizers.fsq import FSQConfig
from ..vqgan import LevelNumbers, NetworkConfig, Width, decoder_layers, encoder_layers, named_sequential
from .layouts import Layout, Shapes, Weights
from .vqgans import TAMING_FIRST, TAMING_NAMES, network_sizes

LEVELS = (8, 8, 8, 5, 5, 5)  # of all published models
BUFFERS = r"(encoder\.patcher|decoder\.unpatcher)\.(wavelets|_arange)$|quantizer\.(_levels|_basis|implicit_codebook)$"


class CosmosConfig(NetworkConfig):
    """Sizes of the networks; the defaults match DI16x16."""

    widths: tuple[Width, ...] = Field((256, 512, 512), min_length=1, description="channels at each level, finest first")
    stem: int | None = Field(128, ge=1, le=4096, description="channels of the first convolution; null: widths[0]")
    patch: Literal[1, 2, 4, 8, 16] = Field(4, description="side of the patches that the wavelets fold into channels")
    halvings: int = Field(2, ge=0, le=12, description="number of levels that halve the sides, the encoder's finest")
    encoder_attention: LevelNumbers | None = Field(None, description="encoder levels with attention; 0 is the finest")
    decoder_attention: LevelNumbers | None = Field(None, description="decoder levels with attention; 0 is the finest")
    quantizer: QuantizerNode = Field(FSQConfig(levels=LEVELS), description="maps vectors to ids")

    @property
    def halved(self) -> int:
        return self.halvings

    @property
    def factor(self) -> int:
        return self.patch * 2**self.halvings

    def check(self) -> Iterator[str]:
        yield from super().check()
        yield from self.check_picture("a published cosmos")
        if self.halvings > len(self.widths):
            yield f"halvings: at most one per level, {len(self.widths)} (got {self.halvings})"
        halved = all(side % 2**self.halvings == 0 for side in self.image_size)
        if halved and any(side % self.factor for side in self.image_size):
            size = "x".join(map(str, self.image_size))
            yield f"patch: {self.factor} pixels per token do not divide the image size {size}"


class Cosmos(Autoencoder, name="cosmos"):
    """The published encoder and decoder, with any quantizer."""

    Config = CosmosConfig

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__(config, config.factor)
        dim, area = self.quantizer.dim, config.patch**2
        layers = encoder_layers(config, config.channels * area)
        self.encoder = named_sequential(haar=Haar(config.patch), **layers, project=nn.Conv2d(config.z_channels, dim, 1))
        self.decoder = named_sequential(
            **decoder_layers(config, dim, self.outputs * area), haar=InverseHaar(config.patch)
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Haar(nn.Module):
    """Maps `(B, C, H, W)` to `(B, C * patch ** 2, H / patch, W / patch)`: the mean of a 2x2 block, then the differences
    of its rows, columns and diagonals."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.times = patch.bit_length() - 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            a, b, c, d = (x[..., row::2, column::2] for row in range(2) for column in range(2))
            x = torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], 1) / 4
        return x


class InverseHaar(nn.Module):
    """Maps `(B, C * patch ** 2, h, w)` to `(B, C, h * patch, w * patch)`."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.times = patch.bit_length() - 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            mean, rows, columns, diagonals = x.chunk(4, 1)
            top = torch.stack([mean + rows + columns + diagonals, mean + rows - columns - diagonals], -1)
            bottom = torch.stack([mean - rows + columns - diagonals, mean - rows - columns + diagonals], -1)
            x = torch.stack([top.flatten(-2), bottom.flatten(-2)], -2).flatten(-3, -2)
        return x


def cosmos_sizes(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of a `cosmos`. Raises `WeightsError` unless the wavelets are of grey or RGB images."""
    network = network_sizes(shapes)
    folded = {channels * patch**2: (channels, patch) for channels in (1, 3) for patch in (2, 4, 8, 16)}
    if network["channels"] not in folded:
        allowed = ", ".join(map(str, sorted(folded)))
        raise WeightsError(
            f"{shapes.path}: encoder.conv_in.weight has {network['channels']} input channels, expected one of {allowed}"
        )
    channels, patch = folded[network["channels"]]
    stored = shapes.weights.get("quantizer._levels")
    levels = list(LEVELS) if stored is None else stored.flatten().tolist()
    halvings = shapes.count("encoder.levels.{}.resample.1.weight")
    quantizer = {"kind": "fsq", "levels": levels}
    return {**network, "channels": channels, "patch": patch, "halvings": halvings, "quantizer": quantizer}


def fits_cosmos(weights: Weights) -> bool:
    """Return whether weights have taming-transformers' names, wavelet inputs and no codebook."""
    pixels = TAMING_FIRST in weights and "encoder.conv_in.weight" in weights
    wavelets = pixels and weights["encoder.conv_in.weight"].shape[1:2] not in ((1,), (3,))
    return wavelets and not any(name.startswith("quantize.") for name in weights)


COSMOS = Layout(
    "NVIDIA Cosmos DI",
    Cosmos,
    fits_cosmos,
    cosmos_sizes,
    TAMING_NAMES,
    training=BUFFERS,
    finest_first=True,
)
