"""VQGAN (Esser et al. 2021, arXiv:2012.09841): the network of taming-transformers, diffusers' `VQModel` and LlamaGen.

Residual blocks at each resolution, with self-attention where it is cheap; each level halves the sides of the previous
one. `smalti import` loads published weights. The adversarial critic is part of training, not of this network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .autoencoder import Autoencoder, AutoencoderConfig
from .layers import Upsample, norm, one_head_attention
from .quantizers.base import QuantizerNode
from .quantizers.vq import VQConfig

Width = Annotated[int, Field(ge=1, le=4096)]
LevelNumbers = Annotated[tuple[int, ...], Field(min_length=1)]


class LevelsConfig(AutoencoderConfig):
    widths: tuple[Width, ...] = Field(
        (128, 128, 256, 256, 512),
        min_length=1,
        description="channels at each level, finest first; each further one halves the sides",
    )
    stem: int | None = Field(None, ge=1, le=4096, description="channels of the first convolution; null: widths[0]")
    groups: int = Field(32, ge=1, le=4096, description="groups of each group normalisation")

    @property
    def halved(self) -> int:
        """Number of levels that halve height and width (the encoder's finest levels)."""
        return len(self.widths) - 1

    @property
    def factor(self) -> int:
        """Image pixels per token along each side."""
        return 2**self.halved

    def check(self) -> Iterator[str]:
        yield from super().check()
        levels, size = len(self.widths), "x".join(map(str, self.image_size))
        if levels > 12 or any(side % 2**self.halved for side in self.image_size):
            yield f"widths: {levels} levels halve the image {self.halved} times, but its size is {size}"
        wrong = [width for width in (self.stem or self.widths[0], *self.widths) if width % self.groups]
        if wrong:
            yield f"groups: {self.groups} does not divide the width {wrong[0]}"


class NetworkConfig(LevelsConfig):
    """Sizes of the networks; the defaults match the paper's ImageNet model with 16x16 ids."""

    blocks: int = Field(2, ge=1, le=64, description="residual blocks at each encoder level; the decoder has one more")
    encoder_attention: LevelNumbers | None = Field(
        (-1,), description="encoder levels with self-attention after every block (0 is the finest, -1 the coarsest)"
    )
    decoder_attention: LevelNumbers | None = Field(
        (-1,), description="decoder levels with self-attention after every block, numbered like the encoder's"
    )
    mid_attention: bool = Field(True, description="self-attention between the two blocks at the token resolution")
    z_channels: int = Field(256, ge=1, le=4096, description="channels between the network and the quantizer's layers")
    quantizer: QuantizerNode = Field(VQConfig(codes=1024, dim=256), description="maps vectors to ids")

    def check(self) -> Iterator[str]:
        yield from super().check()
        levels = len(self.widths)
        for name in ("encoder_attention", "decoder_attention"):
            if any(not -levels <= level < levels for level in getattr(self, name) or ()):
                yield f"{name}: the levels are 0 to {levels - 1} (got {list(getattr(self, name))})"


class VQGANConfig(NetworkConfig):
    unit_codes: bool = Field(False, description="decode codes of length 1, as transformers' JanusVQVAE does")


class VQGAN(Autoencoder, name="vqgan"):
    """The published encoder and decoder, with any quantizer."""

    Config = VQGANConfig
    resizable = True

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config, config.factor)
        dim = self.quantizer.dim
        self.encoder = named_sequential(
            **encoder_layers(config, config.channels), project=nn.Conv2d(config.z_channels, dim, 1)
        )
        unit = {"unit": UnitLength()} if config.unit_codes else {}
        self.decoder = named_sequential(**unit, **decoder_layers(config, dim, self.outputs))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def encoder_layers(config: NetworkConfig, channels: int) -> dict[str, nn.Module]:
    """Build named layers from `(B, channels, H, W)` to `(B, z_channels, H / f, W / f)`, f = 2 ** halved."""
    width, groups, levels = config.stem or config.widths[0], config.groups, []
    stem = conv3(channels, width)
    attentive = {level % len(config.widths) for level in config.encoder_attention or ()}
    for level, wide in enumerate(config.widths):
        resample = Downsample(wide) if level < config.halved else nn.Identity()
        levels.append(build_level(width, wide, config.blocks, groups, level in attentive, resample))
        width = wide
    return {
        "stem": stem,
        "levels": nn.Sequential(*levels),
        "middle": middle(width, config.mid_attention, groups),
        "norm": norm(width, groups),
        "swish": nn.SiLU(),
        "head": conv3(width, config.z_channels),
    }


def decoder_layers(config: NetworkConfig, dim: int, outputs: int) -> dict[str, nn.Module]:
    """Build named layers from `(B, dim, H / f, W / f)` to `(B, outputs, H, W)`, coarsest level first."""
    width, groups, last = config.widths[-1], config.groups, len(config.widths) - 1
    project, stem = nn.Conv2d(dim, config.z_channels, 1), conv3(config.z_channels, width)
    between, levels = middle(width, config.mid_attention, groups), []
    attentive = {level % len(config.widths) for level in config.decoder_attention or ()}
    for level, wide in reversed(list(enumerate(config.widths))):
        resample = Upsample(wide, wide) if last - level < config.halved else nn.Identity()
        levels.append(build_level(width, wide, config.blocks + 1, groups, level in attentive, resample))
        width = wide
    return {
        "project": project,
        "stem": stem,
        "middle": between,
        "levels": nn.Sequential(*levels),
        "norm": norm(width, groups),
        "swish": nn.SiLU(),
        "head": conv3(width, outputs),
    }


def build_level(width: int, wide: int, count: int, groups: int, attentive: bool, resample: nn.Module) -> Level:
    blocks = [Block(wide if index else width, wide, groups) for index in range(count)]
    return Level(blocks, resample, [Attention(wide, groups) for _ in blocks] if attentive else None)


class Level(nn.Module):
    """Residual blocks of one width, each followed by its `attention`, if any; then a change of resolution."""

    def __init__(
        self, blocks: Sequence[nn.Module], resample: nn.Module, attention: Sequence[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention = nn.ModuleList(attention or [nn.Identity() for _ in blocks])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attend in zip(self.blocks, self.attention, strict=True):
            x = attend(block(x))
        return self.resample(x)


class Block(nn.Module):
    """Two normalised 3x3 convolutions added to their input `(B, width, H, W)`; a 1x1 convolution adapts the input if
    `wide` differs from `width`."""

    def __init__(self, width: int, wide: int, groups: int, bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width, groups), conv3(width, wide, bias)
        self.norm2, self.conv2 = norm(wide, groups), conv3(wide, wide, bias)
        self.skip = nn.Identity() if width == wide else self.shortcut(width, wide, bias)

    def shortcut(self, width: int, wide: int, bias: bool) -> nn.Module:
        return nn.Conv2d(width, wide, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention with one head over all positions, added to the input `(B, width, H, W)`."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(width, groups)
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))
        return x + self.out(one_head_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class UnitLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class Downsample(nn.Sequential):
    """Halves height and width by a 3x3 convolution of stride 2, padded only at the bottom and right."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))


def middle(width: int, attention: bool, groups: int) -> nn.Sequential:
    between = Attention(width, groups) if attention else nn.Identity()
    return nn.Sequential(Block(width, width, groups), between, Block(width, width, groups))


def conv3(width: int, wide: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width, wide, 3, padding=1, bias=bias)


def named_sequential(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))
