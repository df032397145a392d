"""VQGAN without attention and with few biases, as in MaskGIT and MAGVIT-2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..autoencoder import AutoencoderConfig
from ..vqgan import conv3, named_sequential, norm, size_problems

Resample = Callable[[int], nn.Module]


class PlainConfig(AutoencoderConfig):
    """Sizes of encoder and decoder."""

    widths: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (128, 128, 256, 256, 512),
        min_length=1,
        description="channels at each level, finest first; each additional level halves the token grid's sides",
    )
    stem: int | None = Field(
        None, ge=1, le=4096, description="channels of the encoder's first convolution; null: as at the finest level"
    )
    blocks: int = Field(2, ge=1, le=64, description="residual blocks at each level, and at the token resolution")
    groups: int = Field(32, ge=1, le=4096, description="groups of each group normalisation")

    @property
    def halved(self) -> int:
        return len(self.widths) - 1

    @property
    def factor(self) -> int:
        return 2**self.halved

    def check(self) -> Iterator[str]:

        yield from super().check()
        yield from self.check_picture(f"a published {self.kind}")
        yield from size_problems(self)


class Block(nn.Module):
    """Two normalised 3x3 convolutions added to their input `(B, width, H, W)`; a 1x1 convolution adapts the input if
    `wide` differs from `width`."""

    def __init__(self, width: int, wide: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width, groups), bare_conv3(width, wide)
        self.norm2, self.conv2 = norm(wide, groups), bare_conv3(wide, wide)
        self.skip = nn.Identity() if width == wide else self.shortcut(width, wide)

    def shortcut(self, width: int, wide: int) -> nn.Module:
        return nn.Conv2d(width, wide, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h)))


class Level(nn.Module):
    """Residual blocks of one width, then a change of resolution."""

    def __init__(self, blocks: list[nn.Module], resample: nn.Module) -> None:
        super().__init__()
        self.blocks, self.resample = nn.Sequential(*blocks), resample

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.blocks(x))


def encoder(config: PlainConfig, dim: int, block: type[Block], halve: Resample) -> nn.Sequential:
    """Build a network from `(B, channels, H, W)` to `(B, dim, H / f, W / f)`."""
    width, groups, levels = config.stem or config.widths[0], config.groups, []
    stem = bare_conv3(config.channels, width)
    for level, wide in enumerate(config.widths):
        blocks = level_blocks(config, block, width, wide)
        levels.append(Level(blocks, halve(wide) if level < config.halved else nn.Identity()))
        width = wide
    return named_sequential(
        stem=stem,
        levels=nn.Sequential(*levels),
        middle=nn.Sequential(*level_blocks(config, block, width, width)),
        norm=norm(width, groups),
        swish=nn.SiLU(),
        head=nn.Conv2d(width, dim, 1),
    )


def level_blocks(config: PlainConfig, block: type[Block], width: int, wide: int) -> list[nn.Module]:
    """Build the blocks of a level; the first changes the width."""
    return [block(wide if index else width, wide, config.groups) for index in range(config.blocks)]


def bare_conv3(width: int, wide: int) -> nn.Conv2d:
    return nn.Conv2d(width, wide, 3, padding=1, bias=False)


def decoder_ends(
    config: PlainConfig, dim: int, outputs: int, block: type[Block]
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Build the layers before and after a decoder's levels."""
    coarsest, finest = config.widths[-1], config.widths[0]
    middle = nn.Sequential(*level_blocks(config, block, coarsest, coarsest))
    before = {"stem": conv3(dim, coarsest), "middle": middle}
    after = {"norm": norm(finest, config.groups), "swish": nn.SiLU(), "head": conv3(finest, outputs)}
    return before, after


PLAIN_NAMES = (
    (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),
    (r"\.blocks\.", ".block."),
    (r"\.skip\.", ".nin_shortcut."),
)
