"""VQGAN without attention and with few biases, as in MaskGIT and MAGVIT-2."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydantic import Field
from torch import nn

from ..layers import norm
from ..vqgan import Block, Level, LevelsConfig, conv3, named_sequential


class PlainConfig(LevelsConfig):
    blocks: int = Field(2, ge=1, le=64, description="residual blocks at each level, and at the token resolution")

    def check(self) -> Iterator[str]:
        yield from super().check()
        yield from self.check_picture(f"a published {self.kind}")


def plain_encoder(
    config: PlainConfig, dim: int, block: type[Block], halve: Callable[[int], nn.Module]
) -> nn.Sequential:
    """Build a network from `(B, channels, H, W)` to `(B, dim, H / f, W / f)`."""
    width, groups, levels = config.stem or config.widths[0], config.groups, []
    stem = conv3(config.channels, width, bias=False)
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
    return [block(wide if index else width, wide, config.groups, bias=False) for index in range(config.blocks)]


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
