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
    return [block(wide if index else width, wide, config.groups, bias=False) for index in range(config.blocks)]


def plain_decoder(
    config: PlainConfig,
    dim: int,
    outputs: int,
    block: type[Block],
    double: Callable[[int], nn.Module],
    adapt: Callable[[int], nn.Module] | None = None,
) -> dict[str, nn.Module]:
    """Build named layers from `(B, dim, H / f, W / f)` to `(B, outputs, H, W)`, coarsest level first. double: builds
    the layer that doubles the sides. adapt: builds one of the layers `adaptive`, which precede the levels."""
    width, finest = config.widths[-1], config.widths[0]
    middle = nn.Sequential(*level_blocks(config, block, width, width))
    stem, head, adaptive, levels = conv3(dim, width), conv3(finest, outputs), [], []
    for level, wide in reversed(list(enumerate(config.widths))):
        adaptive += [adapt(width)] if adapt else []
        blocks = level_blocks(config, block, width, wide)
        levels.append(Level(blocks, double(wide) if level else nn.Identity()))
        width = wide
    return {
        "stem": stem,
        "middle": middle,
        **({"adaptive": nn.ModuleList(adaptive)} if adapt else {}),
        "levels": nn.Sequential(*levels),
        "norm": norm(finest, config.groups),
        "swish": nn.SiLU(),
        "head": head,
    }


PLAIN_NAMES = (
    (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),
    (r"\.blocks\.", ".block."),
    (r"\.skip\.", ".nin_shortcut."),
)
