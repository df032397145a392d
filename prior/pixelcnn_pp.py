"""PixelCNN++: two streams of shifted convolutions at several resolutions, with shortcuts.

Salimans et al. 2017 (arXiv:1701.05517), sections 2.3 to 2.5, figure 2. Inputs are intensities if ids are intensities
(`TokenGrid.channels`), else embeddings, plus a channel of ones, which distinguishes the border from black. The paper's
mixture of logistics is the output head `logistic`; other heads work as well. Unlike the authors' code
(github.com/openai/pixel-cnn), this one has no weight normalisation with data-dependent initialisation, borders at the
start of a stream receive the convolution's bias, and both streams may have a bias per row (`row_embedding`), for grids
whose rows are channels or levels.

A stage consists of a down path of gated residual blocks, the next stage at half the resolution, and an up path whose
blocks read the down path's maps in reverse order through shortcuts. Maps are `(B, H, W, dim)`. At each position, the
vertical stream, `above`, depends on the rows above, and the horizontal stream, `left`, on everything before the
position. Kernels that reach only up and sideways preserve this without masks. Position (y, x) of a coarse map depends
on the same tokens as (2y, 2x) of the finer map. On the up path it is read by rows 2y and 2y + 1: by columns 2x and 2x +
1 in the horizontal stream, and also by column 2x - 1 in the vertical stream. Sides are rounded up on the down path and
cropped on the up path, so any size is possible. Each module's `see` is the `forward` of receptive fields, bool `(H, W,
N)`: it tracks the tokens on which a position depends.

In sampling, the vertical stream never sees the current row, so it computes each new row as a whole, at each resolution,
before the first position. The horizontal stream advances position by position: at every position at full resolution, at
every other position of every other row at half resolution, once all inputs of a coarse position are complete, and so
on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Prior
from .condition_encoder import ConditionEmbedding, Encoded
from .heads import IdEmbedding
from .layers import CausalConv2d, MapRows, Pair, RowBias, RowCache, RowsConfig, WholeRows, pack, see
from .orders import Partition

ABOVE, LEFT = (-1, 1), (-1, 0)
"""The columns of the two streams' kernels, which have two rows: the one above and the position's own."""


class PixelCNNPPConfig(RowsConfig):
    dim: int = Field(64, ge=1, le=8192, description="channels of each stream (the paper: 160)")
    depth: int = Field(3, ge=1, le=64, description="gated residual blocks on a stage's down path (the paper: 5)")
    stages: int = Field(
        3, ge=1, le=8, description="number of resolutions, each half of the previous one (the paper: 3)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside each residual block (the paper: 0.5)")


def concat_elu(x: Tensor) -> Tensor:
    return F.elu_(torch.cat([x, -x], -1))


def halve(encoded: Encoded, width: int) -> Encoded:
    """Return the condition of a map at half the resolution: that of every other row and column."""
    if encoded.map is None:
        return encoded
    return replace(encoded, map=encoded.map.unflatten(1, (-1, width))[:, ::2, ::2].flatten(1, 2))


class Gated(nn.Module):
    """A residual block of one stream on maps `(B, H, W, dim)`: two convolutions, a gate with a class bias, and 1x1
    layers that read `count` other maps."""

    def __init__(self, config: PixelCNNPPConfig, columns: Pair, count: int) -> None:
        super().__init__()
        dim = config.dim
        self.first = CausalConv2d(2 * dim, dim, (-1, 0), columns)
        self.second = CausalConv2d(2 * dim, 2 * dim, (-1, 0), columns)
        self.beside: Any = nn.ModuleList(nn.Linear(2 * dim, dim, bias=False) for _ in range(count))
        self.label = ConditionEmbedding(config, 2 * dim)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.zeros_(self.label.weight)

    def forward(self, x: Tensor, encoded: Encoded, *beside: Tensor) -> Tensor:
        inner = self.first(concat_elu(x))
        for layer, other in zip(self.beside, beside, strict=True):
            inner = inner + layer(concat_elu(other))
        inner = self.dropout(concat_elu(inner))
        return x + F.glu(self.second(inner) + self.label.on_map(encoded, x.shape[2]))

    def see(self, x: Tensor, *beside: Tensor) -> Tensor:
        """Propagate receptive fields, bool `(H, W, N)`, from the inputs to the output."""
        inner = see(x, self.first.taps)
        for other in beside:
            inner = inner | other
        return see(inner, self.second.taps)  # includes the input's own position


class Block(nn.Module):
    """A residual block of both streams; on the up path it also reads the down path's maps, `skips`."""

    def __init__(self, config: PixelCNNPPConfig, *, up: bool) -> None:
        super().__init__()
        self.vertical, self.horizontal = Gated(config, ABOVE, up), Gated(config, LEFT, 1 + up)

    def forward(self, above: Tensor, left: Tensor, encoded: Encoded, *skips: Tensor) -> tuple[Tensor, Tensor]:
        above = self.vertical(above, encoded, *skips[:1])
        return above, self.horizontal(left, encoded, above, *skips[1:])

    def see(self, above: Tensor, left: Tensor, *skips: Tensor) -> tuple[Tensor, Tensor]:
        above = self.vertical.see(above, *skips[:1])
        return above, self.horizontal.see(left, above, *skips[1:])


class Grow(nn.Module):
    """Doubles the resolution by a transposed convolution with a stride of 2."""

    def __init__(self, dim: int, columns: Pair) -> None:
        super().__init__()
        self.right, width = columns[1], columns[1] - columns[0] + 1
        self.conv: Any = nn.ConvTranspose2d(dim, dim, (2, width), stride=2)
        bound = (dim * width / 2) ** -0.5  # as in nn.Linear, as a position sees one row and every other column
        nn.init.uniform_(self.conv.weight, -bound, bound)
        self.taps = [(row, column) for row in (-1, 0) for column in range(columns[0], columns[1] + 1)]

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map `(B, h, w, dim)` to `(B, height, width, dim)`, at most twice as high and wide."""
        grown = self.conv(x.movedim(-1, 1)).movedim(1, -1)
        return grown[:, :height, self.right : self.right + width]

    def see(self, x: Tensor, height: int, width: int) -> Tensor:
        stretched = x.new_zeros(2 * x.shape[0], 2 * x.shape[1], x.shape[2])
        stretched[::2, ::2] = x
        return see(stretched, self.taps)[:height, :width]


class Coarser(nn.Module):
    """A stage at half the resolution, with sides rounded up, and its down- and upsampling layers."""

    def __init__(self, config: PixelCNNPPConfig, stages: int) -> None:
        super().__init__()
        dim = config.dim
        self.shrink_above, self.shrink_left = (
            CausalConv2d(dim, dim, (-1, 0), columns, stride=2) for columns in (ABOVE, LEFT)
        )
        self.stage = Pyramid(config, stages)
        self.grow_above, self.grow_left = Grow(dim, ABOVE), Grow(dim, LEFT)

    def forward(self, above: Tensor, left: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        height, width = left.shape[1:3]
        above, left = self.stage(self.shrink_above(above), self.shrink_left(left), halve(encoded, width))
        return self.grow_above(above, height, width), self.grow_left(left, height, width)

    def see(self, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        height, width = left.shape[:2]
        above, left = see(above, self.shrink_above.taps)[::2, ::2], see(left, self.shrink_left.taps)[::2, ::2]
        above, left = self.stage.see(above, left)
        return self.grow_above.see(above, height, width), self.grow_left.see(left, height, width)


class Pyramid(nn.Module):
    """One resolution and all coarser ones: a down path, the coarser stages, and an up path. The up path has one block
    for each map of the down path, including its input, except that the coarsest stage starts from the last map."""

    def __init__(self, config: PixelCNNPPConfig, stages: int) -> None:
        super().__init__()
        self.down: Any = nn.ModuleList(Block(config, up=False) for _ in range(config.depth))
        self.coarser: Any = Coarser(config, stages - 1) if stages > 1 else None
        self.up: Any = nn.ModuleList(Block(config, up=True) for _ in range(config.depth + (stages > 1)))

    def forward(self, above: Tensor, left: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        maps = [(above, left)]
        for block in self.down:
            maps.append(block(*maps[-1], encoded))
        above, left = self.coarser(*maps[-1], encoded) if self.coarser else maps.pop()
        for block in self.up:
            above, left = block(above, left, encoded, *maps.pop())
        return above, left

    def see(self, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        fields = [(above, left)]
        for block in self.down:
            fields.append(block.see(*fields[-1]))
        above, left = self.coarser.see(*fields[-1]) if self.coarser else fields.pop()
        for block in self.up:
            above, left = block.see(above, left, *fields.pop())
        return above, left


class PixelCNNPP(Prior, name="pixelcnn_pp"):
    """Nested stages of two streams; see `receptive_field`."""

    Config = PixelCNNPPConfig

    def __init__(self, config: PixelCNNPPConfig) -> None:
        super().__init__(config)
        grid, dim, together = config.grid, config.dim, self.output_head.ids_per_position
        channels = together if grid.channels else min(dim, grid.vocab_size)  # more channels than ids are redundant
        self.embedding = None if grid.channels else IdEmbedding(grid, together, channels)
        self.first_above = CausalConv2d(channels + 1, dim, (-2, -1), (-1, 1))
        self.first_over = CausalConv2d(channels + 1, dim, (-1, -1), (-1, 1))
        self.first_left = CausalConv2d(channels + 1, dim, (-1, 0), (-1, -1))
        self.above_row, self.left_row = RowBias(config, dim), RowBias(config, dim)
        self.stage = Pyramid(config, config.stages)
        self.head = nn.Linear(dim, self.output_head.size)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the input `(..., channels + 1)` of ids `(..., ids_per_position)`, with the channel of ones."""
        if self.embedding is None:
            x = ids.to(self.dtype) * (2 / max(1, self.grid.vocab_size - 1)) - 1
        else:
            x = self.embedding(ids)
        return F.pad(x, (0, 1), value=1.0)

    def outputs(self, tokens: Tensor, encoded: Encoded) -> Tensor:
        x = self.embed(self.position_id_map(tokens))
        above = self.first_above(x) + self.above_row.weight[:, None]
        left = self.first_over(x) + self.first_left(x) + self.left_row.weight[:, None]
        _, left = self.stage(above, left, encoded)
        return self.head(F.elu(left)).flatten(1, 2)

    @property
    def position_field(self) -> Tensor:
        height, width = self.config.positions.shape
        x = torch.eye(height * width, dtype=torch.bool, device="cpu").view(height, width, -1)
        left = see(x, self.first_over.taps) | see(x, self.first_left.taps)
        return self.stage.see(see(x, self.first_above.taps), left)[1].flatten(0, 1)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks at full resolution, because coarse maps have no features per position; `arrange_features` selects
        the horizontal map, which depends on the vertical map."""
        return [*self.stage.down, *self.stage.up]

    def arrange_features(self, output: Any) -> Tensor:
        return super().arrange_features(output[1])

    def make_cache(self, encoded: Encoded, partition: Partition | None) -> Cache:
        return Cache(self, encoded)


def add_product(sums: Tensor, x: Tensor, weight: Tensor) -> None:
    torch.addmm(sums, x, weight, out=sums)


class BlockCache:
    """Evaluates a `Block`: the vertical stream by rows, the horizontal stream by positions."""

    def __init__(self, block: Block, width: int, encoded: Encoded) -> None:
        vertical, horizontal = block.vertical, block.horizontal
        across, *skip = horizontal.beside
        above, left = vertical.label.on_map(encoded, width), horizontal.label.on_map(encoded, width)
        batch, nothing = len(encoded), left.new_zeros(len(left), left.shape[-1] // 2)
        self.above = WholeRows(vertical.first, width, nothing), WholeRows(vertical.second, width, above)
        self.left = RowCache(horizontal.first, width, nothing), RowCache(horizontal.second, width, left)
        self.across = pack(across.weight, width * batch)
        self.skip_above = [pack(layer.weight, width * batch) for layer in vertical.beside]
        self.skip_left = [pack(layer.weight, batch) for layer in skip]
        self.inputs, inner = (cache.map.cells for cache in self.left)  # concat_elu of the input, and of the inner map
        self.halves = [[cell.unflatten(1, (2, -1)) for cell in cells] for cells in (self.inputs, inner)]
        self.inner = inner
        self.signs = torch.linspace(1, -1, 2, dtype=left.dtype, device=left.device)[:, None]  # no copy from the host

    def start_row(self, x: Tensor, *skip: Tensor) -> Tensor:
        """Return the next row of the vertical map, `(W, B, dim)`, given the input's row and concat_elu of the skip's
        row."""
        first, second = self.above
        first.next_row().copy_(concat_elu(x))
        inner = first.read()
        for other, weight in zip(skip, self.skip_above, strict=True):
            add_product(inner.flatten(0, 1), other.flatten(0, 1), weight)
        second.next_row().copy_(concat_elu(inner))
        x = x + F.glu(second.read())
        for cache in self.left:
            cache.start_row()
        add_product(self.left[0].sums_above.flatten(0, 1), concat_elu(x).flatten(0, 1), self.across)
        return x

    def step(self, x: Tensor, column: int, *skip: Tensor) -> Tensor:
        """Return the next position of the horizontal map, `(B, dim)`, from the same inputs at that position."""
        first, second = self.left
        torch.mul(x.unsqueeze(1), self.signs, out=self.halves[0][column])
        F.elu_(self.inputs[column])
        inner = first.read(column)
        for other, weight in zip(skip, self.skip_left, strict=True):
            add_product(inner, other, weight)
        torch.mul(inner.unsqueeze(1), self.signs, out=self.halves[1][column])
        F.elu_(self.inner[column])
        return x + F.glu(second.read(column))


class CoarserCache:
    """Evaluates a `Coarser`: every other row and position is passed on, and each result serves four positions."""

    def __init__(self, coarser: Coarser, width: int, encoded: Encoded) -> None:
        weight = coarser.grow_left.conv.weight.detach()  # (inputs, outputs, 2, 2)
        batch, dim, half = len(encoded), len(weight), (width + 1) // 2
        nothing = weight.new_zeros(batch, dim)
        self.shrink_above = WholeRows(coarser.shrink_above, width, nothing)
        self.shrink_left = RowCache(coarser.shrink_left, width, nothing)
        self.stage = PyramidCache(coarser.stage, half, halve(encoded, width))
        self.grow_above, self.above = coarser.grow_above, weight.new_zeros(2, width, batch, dim)
        self.bias = coarser.grow_left.conv.bias.detach().repeat(4)
        self.grow_left = pack(weight.permute(2, 3, 1, 0).flatten(0, 2), batch)
        self.grown = weight.new_empty(half, batch, 4 * dim)
        quarters = self.grown.view(half, batch, 2, 2, dim)
        self.left = [[quarters[at // 2, :, row, at % 2] for at in range(width)] for row in (0, 1)]

    def start_row(self, above: Tensor, row: int) -> Tensor:
        """Pass this row of the vertical map, `(W, B, dim)`, to the coarser stage, and return the row grown from it."""
        self.shrink_above.next_row().copy_(above)
        if row % 2 == 0:
            self.shrink_left.start_row()
            found = self.stage.start_row(self.shrink_above.read(), row // 2).transpose(0, 1)[:, None]
            self.above.copy_(self.grow_above(found, 2, len(above)).detach().permute(1, 2, 0, 3))
        return self.above[row % 2]

    def step(self, x: Tensor, row: int, column: int) -> Tensor:
        """Pass this position of the horizontal map, `(B, dim)`, to the coarser stage, and return its grown result."""
        self.shrink_left.map.cells[column].copy_(x)
        if row % 2 == 0 and column % 2 == 0:
            half = column // 2
            found = self.stage.step(self.shrink_left.read(half), row // 2, half)
            torch.addmm(self.bias, found, self.grow_left, out=self.grown[half])
        return self.left[row % 2][column]


class PyramidCache:
    """Evaluates a `Pyramid`; its skips are the inputs stored by the blocks of the down path."""

    def __init__(self, stage: Pyramid, width: int, encoded: Encoded) -> None:
        self.down, self.up = ([BlockCache(block, width, encoded) for block in way] for way in (stage.down, stage.up))
        self.coarser = CoarserCache(stage.coarser, width, encoded) if stage.coarser else None

    def start_row(self, above: Tensor, row: int) -> Tensor:
        for block in self.down:
            above = block.start_row(above)
        skips = [block.above[0].map.row for block in self.down]
        if self.coarser:
            skips.append(concat_elu(above))
            above = self.coarser.start_row(above, row)
        for block in self.up:
            above = block.start_row(above, skips.pop())
        return above

    def step(self, x: Tensor, row: int, column: int) -> Tensor:
        for block in self.down:
            x = block.step(x, column)
        skips = [block.inputs[column] for block in self.down]
        if self.coarser:
            skips.append(concat_elu(x))
            x = self.coarser.step(x, row, column)
        for block in self.up:
            x = block.step(x, column, skips.pop())
        return x


class Cache:
    """The rows that each convolution reads, and weights laid out for one-position steps."""

    def __init__(self, model: PixelCNNPP, encoded: Encoded) -> None:
        rows, over, left = len(encoded), model.first_over.weight, model.first_left.weight
        self.model, self.rank, self.width = model, 0, model.config.positions.shape[1]
        self.inputs = MapRows(over.new_zeros(rows, over.shape[1]).detach(), 2, self.width, (-1, 1), 1)
        self.first_above = pack(model.first_above.weight, self.width * rows)
        self.first_over = pack(over + F.pad(left[:, :, :1], (0, 2)), self.width * rows)  # one row, three columns
        self.first_left = pack(left[:, :, 1:], rows)
        above_bias, left_bias = model.first_above.bias, model.first_over.bias + model.first_left.bias
        self.biases = iter((model.above_row.weight + above_bias).detach())
        self.left_biases = iter((model.left_row.weight + left_bias).detach())
        self.sums_over = over.new_empty(self.width, rows, len(over)).detach()
        self.over = self.sums_over.unbind(0)
        self.stage = PyramidCache(model.stage, self.width, encoded)
        self.head_bias, self.head = model.head.bias.detach(), pack(model.head.weight, rows)

    def start_row(self, row: int) -> None:
        """Compute the vertical stream's row, and the row above's contribution to the horizontal stream."""
        patches = self.inputs.patches()
        above = torch.addmm(next(self.biases), patches, self.first_above).view_as(self.sums_over)
        last = patches[:, patches.shape[1] // 2 :]  # of the two rows
        torch.addmm(next(self.left_biases), last, self.first_over, out=self.sums_over.flatten(0, 1))
        self.inputs.next_row()
        self.stage.start_row(above, row)

    def step(self, token: Tensor | None) -> Tensor:
        row, column = divmod(self.rank, self.width)
        if token is not None:
            self.inputs.cells[column - 1].copy_(self.model.embed(token.view(len(token), -1)).detach())
        if column == 0:
            self.start_row(row)
        x = torch.addmm(self.over[column], self.inputs.windows[column], self.first_left)
        self.rank += 1
        return torch.addmm(self.head_bias, F.elu(self.stage.step(x, row, column)), self.head)
