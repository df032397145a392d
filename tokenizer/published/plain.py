"""What the networks of MaskGIT and MAGVIT-2 share: VQGAN without attention, most of its convolutions without biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..autoencoder import AutoencoderConfig
from ..vqgan import conv3, named, norm, size_problems
from .layouts import Shapes

Resample = Callable[[int], nn.Module]


class PlainConfig(AutoencoderConfig):
    """Sizes of both halves."""

    widths: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (128, 128, 256, 256, 512),
        min_length=1,
        description="channels at each level, finest first; each further level halves the token grid's sides",
    )
    stem: int | None = Field(
        None, ge=1, le=4096, description="channels of the encoder's first convolution; null: those of the finest level"
    )
    blocks: int = Field(2, ge=1, le=64, description="residual blocks at each level, and between the two halves of each")
    groups: int = Field(32, ge=1, le=4096, description="groups of each group normalisation")

    @property
    def halved(self) -> int:
        """How many levels halve height and width."""
        return len(self.widths) - 1

    @property
    def factor(self) -> int:
        """Image pixels per token along each side."""
        return 2**self.halved

    def check(self) -> Iterator[str]:
        """Sizes have to divide."""
        yield from super().check()
        yield from size_problems(self)


class Block(nn.Module):
    """Two normalised 3x3 convolutions added to their input `(B, width, H, W)`, which a 1x1 convolution widens if
    needed."""

    def __init__(self, width: int, wide: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width, groups), bare_conv3(width, wide)
        self.norm2, self.conv2 = norm(wide, groups), bare_conv3(wide, wide)
        self.skip = nn.Identity() if width == wide else self.short_cut(width, wide)

    def short_cut(self, width: int, wide: int) -> nn.Module:
        """Of a block that widens."""
        return nn.Conv2d(width, wide, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        """What is added, `(B, wide, H, W)`."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h)))


class Level(nn.Module):
    """Residual blocks of one width, between what comes before and after them."""

    def __init__(self, blocks: list[nn.Module], resample: nn.Module) -> None:
        super().__init__()
        self.blocks, self.resample = nn.Sequential(*blocks), resample

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.blocks(x))


def encoder(config: PlainConfig, dim: int, block: type[Block], halve: Resample) -> nn.Sequential:
    """`(B, channels, H, W)` to `(B, dim, H / f, W / f)`."""
    width, groups, levels = config.stem or config.widths[0], config.groups, []
    stem = bare_conv3(config.channels, width)
    for level, wide in enumerate(config.widths):
        blocks = blocks_of(config, block, width, wide)
        levels.append(Level(blocks, halve(wide) if level < config.halved else nn.Identity()))
        width = wide
    return named(
        stem=stem,
        levels=nn.Sequential(*levels),
        middle=nn.Sequential(*blocks_of(config, block, width, width)),
        norm=norm(width, groups),
        swish=nn.SiLU(),
        head=nn.Conv2d(width, dim, 1),
    )


def blocks_of(config: PlainConfig, block: type[Block], width: int, wide: int) -> list[nn.Module]:
    """Those of a level, of which the first widens."""
    return [block(wide if index else width, wide, config.groups) for index in range(config.blocks)]


def bare_conv3(width: int, wide: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps height and width, without a bias."""
    return nn.Conv2d(width, wide, 3, padding=1, bias=False)


def ends(config: PlainConfig, dim: int, outputs: int, block: type[Block]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What comes before a decoder's levels, and what after them."""
    coarsest, finest = config.widths[-1], config.widths[0]
    middle = nn.Sequential(*blocks_of(config, block, coarsest, coarsest))
    before = {"stem": conv3(dim, coarsest), "middle": middle}
    after = {"norm": norm(finest, config.groups), "swish": nn.SiLU(), "head": conv3(finest, outputs)}
    return before, after


def plain_sizes(shapes: Shapes) -> tuple[dict[str, Any], int]:
    """Sizes of such a network, and the width of its codes."""
    return shapes.stem_and_levels(), shapes.of("encoder.head.weight")[0]


PLAIN_NAMES = (
    (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),
    (r"\.blocks\.", ".block."),
    (r"\.skip\.", ".nin_shortcut."),
)
