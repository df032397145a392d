"""Stages of two streams of shifted convolutions, each at half the resolution of the one before: PixelCNN++'s network.

Salimans et al. 2017 (arXiv:1701.05517), sections 2.3 and 2.4, figure 2. A stage is a way down of gated residual blocks,
the next stage, and a way up, whose blocks take the maps of the way down in reverse order by short-cuts.

Maps are `(B, H, W, dim)`. That of the vertical stream, `above`, knows at a position of the rows above, that of the
horizontal stream, `left`, of what comes before the position. Kernels that reach up and aside only keep it so; there are
no masks. Position (y, x) of a coarse map knows what (2y, 2x) of the finer one does, and is read on the way back by rows
2y and 2y + 1: in the horizontal stream by columns 2x and 2x + 1, in the vertical one by 2x - 1, too. Sides are rounded
up, and what is too many on the way back is cut off, so that any size goes.

`see` of each part follows what a position knows of: it is `forward` over maps of sets of tokens, bool `(H, W, N)`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .layers import CausalConv2d, Pair, RowsConfig, see

ABOVE, LEFT = (-1, 1), (-1, 0)
"""The columns of the two streams' kernels, which have two rows: the one above and the position's own."""


class StagesConfig(RowsConfig):
    """Sizes of the network."""

    dim: int = Field(64, ge=1, le=8192, description="channels of each stream; the paper has 160")
    depth: int = Field(3, ge=1, le=64, description="gated residual blocks of a stage on the way down; the paper has 5")
    stages: int = Field(3, ge=1, le=8, description="resolutions, each half of the one before; the paper has 3")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside each residual block; the paper has 0.5")


def concat_elu(x: Tensor) -> Tensor:
    """elu of the channels and of their negatives: `(..., dim)` to `(..., 2 * dim)`."""
    return F.elu_(torch.cat([x, -x], -1))


class Gated(nn.Module):
    """A residual block of one stream on maps `(B, H, W, dim)`: two convolutions, a gate that hears the class, and what
    it is told of `count` maps beside its own, by 1x1 layers."""

    def __init__(self, config: StagesConfig, columns: Pair, count: int) -> None:
        super().__init__()
        dim = config.dim
        self.first = CausalConv2d(2 * dim, dim, (-1, 0), columns)
        self.second = CausalConv2d(2 * dim, 2 * dim, (-1, 0), columns)
        self.beside: Any = nn.ModuleList(nn.Linear(2 * dim, dim, bias=False) for _ in range(count))
        self.label = nn.Embedding(config.num_classes + 1, 2 * dim)  # the last is the null class
        self.dropout = nn.Dropout(config.dropout)
        nn.init.zeros_(self.label.weight)

    def forward(self, x: Tensor, labels: Tensor, *beside: Tensor) -> Tensor:
        inner = self.first(concat_elu(x))
        for layer, other in zip(self.beside, beside, strict=True):
            inner = inner + layer(concat_elu(other))
        inner = self.dropout(concat_elu(inner))
        return x + F.glu(self.second(inner) + self.label(labels)[:, None, None])

    def see(self, x: Tensor, *beside: Tensor) -> Tensor:
        """What a position sees, given what its inputs see: bool `(H, W, N)` each."""
        inner = see(x, self.first.taps)
        for other in beside:
            inner = inner | other
        return see(inner, self.second.taps)  # itself included


class Block(nn.Module):
    """A residual block of both streams; on the way up it takes the maps of both from the way down, `skips`."""

    def __init__(self, config: StagesConfig, *, up: bool) -> None:
        super().__init__()
        self.vertical, self.horizontal = Gated(config, ABOVE, up), Gated(config, LEFT, 1 + up)

    def forward(self, above: Tensor, left: Tensor, labels: Tensor, *skips: Tensor) -> tuple[Tensor, Tensor]:
        above = self.vertical(above, labels, *skips[:1])
        return above, self.horizontal(left, labels, above, *skips[1:])

    def see(self, above: Tensor, left: Tensor, *skips: Tensor) -> tuple[Tensor, Tensor]:
        """Of both streams."""
        above = self.vertical.see(above, *skips[:1])
        return above, self.horizontal.see(left, above, *skips[1:])


class Grow(nn.Module):
    """Twice the resolution: a convolution of a map with zeros between its positions, which is the transpose of one
    with a stride of 2."""

    def __init__(self, dim: int, columns: Pair) -> None:
        super().__init__()
        self.right, width = columns[1], columns[1] - columns[0] + 1
        self.conv: Any = nn.ConvTranspose2d(dim, dim, (2, width), stride=2)
        bound = (dim * width / 2) ** -0.5  # as nn.Linear has it: a position sees one row, and every other column
        nn.init.uniform_(self.conv.weight, -bound, bound)
        self.taps = [(row, column) for row in (-1, 0) for column in range(columns[0], columns[1] + 1)]

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """`(B, h, w, dim)` to `(B, height, width, dim)`, at most twice as high and wide."""
        grown = self.conv(x.movedim(-1, 1)).movedim(1, -1)
        return grown[:, :height, self.right : self.right + width]

    def see(self, x: Tensor, height: int, width: int) -> Tensor:
        """As in all parts."""
        stretched = x.new_zeros(2 * x.shape[0], 2 * x.shape[1], x.shape[2])
        stretched[::2, ::2] = x
        return see(stretched, self.taps)[:height, :width]


class Coarser(nn.Module):
    """A stage at half the resolution, sides rounded up, and the ways there and back."""

    def __init__(self, config: StagesConfig, stages: int) -> None:
        super().__init__()
        dim = config.dim
        self.shrink_above, self.shrink_left = (
            CausalConv2d(dim, dim, (-1, 0), columns, stride=2) for columns in (ABOVE, LEFT)
        )
        self.stage = Stage(config, stages)
        self.grow_above, self.grow_left = Grow(dim, ABOVE), Grow(dim, LEFT)

    def forward(self, above: Tensor, left: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = left.shape[1:3]
        above, left = self.stage(self.shrink_above(above), self.shrink_left(left), labels)
        return self.grow_above(above, height, width), self.grow_left(left, height, width)

    def see(self, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Of both streams."""
        height, width = left.shape[:2]
        above, left = see(above, self.shrink_above.taps)[::2, ::2], see(left, self.shrink_left.taps)[::2, ::2]
        above, left = self.stage.see(above, left)
        return self.grow_above.see(above, height, width), self.grow_left.see(left, height, width)


class Stage(nn.Module):
    """One resolution and all coarser ones: down, there and back, up. There is a block of the way up for each map that
    the way down leaves behind, its first included, but not for the one that the coarsest stage goes on from."""

    def __init__(self, config: StagesConfig, stages: int) -> None:
        super().__init__()
        self.down: Any = nn.ModuleList(Block(config, up=False) for _ in range(config.depth))
        self.coarser: Any = Coarser(config, stages - 1) if stages > 1 else None
        self.up: Any = nn.ModuleList(Block(config, up=True) for _ in range(config.depth + (stages > 1)))

    def forward(self, above: Tensor, left: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        maps = [(above, left)]
        for block in self.down:
            maps.append(block(*maps[-1], labels))
        above, left = self.coarser(*maps[-1], labels) if self.coarser else maps.pop()
        for block in self.up:
            above, left = block(above, left, labels, *maps.pop())
        return above, left

    def see(self, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Of both streams."""
        fields = [(above, left)]
        for block in self.down:
            fields.append(block.see(*fields[-1]))
        above, left = self.coarser.see(*fields[-1]) if self.coarser else fields.pop()
        for block in self.up:
            above, left = block.see(above, left, *fields.pop())
        return above, left
