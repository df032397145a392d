"""PixelCNN++: two streams of shifted convolutions at several resolutions, with short-cuts between them.

Salimans et al. 2017 (arXiv:1701.05517), sections 2.3 to 2.5; the network's parts are in `prior.stages`. What is put in
is intensities, where ids are (`TokenGrid.channels`), else embeddings, and a channel of ones, which tells the border
from black. The paper's mixture of logistics is a head, `logistic`; any other goes as well.

What differs from the authors' code (github.com/openai/pixel-cnn): there is no weight normalisation, whose beginning
looks at data; weights begin as those of an `nn.Linear` do. Where a stream begins, the border has the convolution's
bias. And both streams may be told the row (`row_embedding`), which grids need whose rows are channels or levels.

Sampling: the vertical stream never looks at the row at hand, so all resolutions of it that begin a row make it whole,
before its first position. The horizontal stream goes on position by position: at full resolution at each, at half the
resolution at every other one of every other row, when all that a coarse position sees is complete, and so on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Prior
from .heads import IdEmbedding
from .layers import CausalConv2d, MapRows, RowBias, RowCache, WholeRows, pack, see
from .orders import Partition
from .stages import Block, Coarser, Stage, StagesConfig, concat_elu


class PixelCNNPP(Prior, name="pixelcnn_pp"):
    """Stages within stages; `receptive_field` says what a position sees."""

    Config = StagesConfig

    def __init__(self, config: StagesConfig) -> None:
        super().__init__(config)
        grid, dim, together = config.grid, config.dim, self.readout.together
        channels = together if grid.channels else min(dim, grid.vocab_size)  # more than one per id cannot say more
        self.embedding = None if grid.channels else IdEmbedding(grid, together, channels)
        self.first_above = CausalConv2d(channels + 1, dim, (-2, -1), (-1, 1))
        self.first_over = CausalConv2d(channels + 1, dim, (-1, -1), (-1, 1))
        self.first_left = CausalConv2d(channels + 1, dim, (-1, 0), (-1, -1))
        self.above_row, self.left_row = RowBias(config, dim), RowBias(config, dim)
        self.stage = Stage(config, config.stages)
        self.head = nn.Linear(dim, self.readout.size)

    def embed(self, ids: Tensor) -> Tensor:
        """Ids `(..., together)` as the network's input `(..., channels + 1)`, with the channel of ones."""
        if self.embedding is None:
            x = ids.to(self.dtype) * (2 / max(1, self.grid.vocab_size - 1)) - 1
        else:
            x = self.embedding(ids)
        return F.pad(x, (0, 1), value=1.0)

    def outputs(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """As in `Prior`."""
        x = self.embed(self.map_of_ids(tokens))
        above = self.first_above(x) + self.above_row.weight[:, None]
        left = self.first_over(x) + self.first_left(x) + self.left_row.weight[:, None]
        _, left = self.stage(above, left, self.class_ids(labels, len(tokens)))
        return self.head(F.elu(left)).flatten(1, 2)

    @property
    def position_field(self) -> Tensor:
        """bool `(P, P)`: whether the network sees position j at i."""
        height, width = self.config.positions.shape
        x = torch.eye(height * width, dtype=torch.bool, device="cpu").view(height, width, -1)
        left = see(x, self.first_over.taps) | see(x, self.first_left.taps)
        return self.stage.see(see(x, self.first_above.taps), left)[1].flatten(0, 1)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks at full resolution (a position has no features of its own in the others), of which `arrange` takes
        the horizontal map: it knows what the vertical one does."""
        return [*self.stage.down, *self.stage.up]

    def arrange(self, output: Any) -> Tensor:
        """The horizontal map `(B, H, W, dim)` as `(B, N, dim)`."""
        return super().arrange(output[1])

    def make_cache(self, labels: Tensor, walk: Partition | None) -> Cache:
        """The last rows that each convolution looks at; a row of the vertical stream is made before its first
        position, and a coarse map's position once, when what it sees is complete."""
        return Cache(self, labels)


def add_product(sums: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add `x @ weight` to `sums`."""
    torch.addmm(sums, x, weight, out=sums)


class BlockCache:
    """A `Block`: the vertical stream a row at a time, the horizontal one position by position."""

    def __init__(self, block: Block, width: int, labels: Tensor) -> None:
        vertical, horizontal = block.vertical, block.horizontal
        across, *skip = horizontal.beside
        above, left = vertical.label(labels), horizontal.label(labels)
        batch, nothing = len(labels), torch.zeros_like(left.chunk(2, 1)[0])
        self.above = WholeRows(vertical.first, width, nothing), WholeRows(vertical.second, width, above)
        self.left = RowCache(horizontal.first, width, nothing), RowCache(horizontal.second, width, left)
        self.across = pack(across.weight, width * batch)
        self.skip_above = [pack(layer.weight, width * batch) for layer in vertical.beside]
        self.skip_left = [pack(layer.weight, batch) for layer in skip]
        self.inputs, inner = (cache.map.cells for cache in self.left)  # concat_elu of what comes in, and of the inside
        self.halves = [[cell.unflatten(1, (2, -1)) for cell in cells] for cells in (self.inputs, inner)]
        self.inner, self.signs = inner, torch.cat([torch.ones_like(left[:1, :1]), -torch.ones_like(left[:1, :1])])

    def start_row(self, x: Tensor, *skip: Tensor) -> Tensor:
        """The vertical map's next row, `(W, B, dim)`, of that of its input and concat_elu of that of the skip."""
        first, second = self.above
        first.turn().copy_(concat_elu(x))
        inner = first.read()
        for other, weight in zip(skip, self.skip_above, strict=True):
            add_product(inner.flatten(0, 1), other.flatten(0, 1), weight)
        second.turn().copy_(concat_elu(inner))
        x = x + F.glu(second.read())
        for cache in self.left:
            cache.start_row()
        add_product(self.left[0].sums_above.flatten(0, 1), concat_elu(x).flatten(0, 1), self.across)
        return x

    def step(self, x: Tensor, column: int, *skip: Tensor) -> Tensor:
        """The horizontal map's next position, `(B, dim)`, likewise."""
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
    """A `Coarser`: every other row and position go down, and what comes back is kept for four positions."""

    def __init__(self, coarser: Coarser, width: int, labels: Tensor) -> None:
        weight = coarser.grow_left.conv.weight.detach()  # (inputs, outputs, 2, 2)
        batch, dim, half = len(labels), len(weight), (width + 1) // 2
        nothing = weight.new_zeros(batch, dim)
        self.shrink_above = WholeRows(coarser.shrink_above, width, nothing)
        self.shrink_left = RowCache(coarser.shrink_left, width, nothing)
        self.stage = StageCache(coarser.stage, half, labels)
        self.grow_above, self.above = coarser.grow_above, weight.new_zeros(2, width, batch, dim)
        self.bias = coarser.grow_left.conv.bias.detach().repeat(4)
        self.grow_left = pack(weight.permute(2, 3, 1, 0).flatten(0, 2), batch)
        self.grown = weight.new_empty(half, batch, 4 * dim)
        quarters = self.grown.view(half, batch, 2, 2, dim)
        self.left = [[quarters[at // 2, :, row, at % 2] for at in range(width)] for row in (0, 1)]

    def start_row(self, above: Tensor, row: int) -> Tensor:
        """The vertical map that comes back to this row, `(W, B, dim)`, and the one that goes down from it."""
        self.shrink_above.turn().copy_(above)
        if row % 2 == 0:
            self.shrink_left.start_row()
            found = self.stage.start_row(self.shrink_above.read(), row // 2).transpose(0, 1)[:, None]
            self.above.copy_(self.grow_above(found, 2, len(above)).detach().permute(1, 2, 0, 3))
        return self.above[row % 2]

    def step(self, x: Tensor, row: int, column: int) -> Tensor:
        """The horizontal map that comes back to this position, `(B, dim)`, and the one that goes down from it."""
        self.shrink_left.map.cells[column].copy_(x)
        if row % 2 == 0 and column % 2 == 0:
            half = column // 2
            found = self.stage.step(self.shrink_left.read(half), row // 2, half)
            torch.addmm(self.bias, found, self.grow_left, out=self.grown[half])
        return self.left[row % 2][column]


class StageCache:
    """A `Stage`, whose skips are what the blocks of the way down keep of their inputs."""

    def __init__(self, stage: Stage, width: int, labels: Tensor) -> None:
        self.down, self.up = ([BlockCache(block, width, labels) for block in way] for way in (stage.down, stage.up))
        self.coarser = CoarserCache(stage.coarser, width, labels) if stage.coarser else None

    def start_row(self, above: Tensor, row: int) -> Tensor:
        """The vertical map's next row, `(W, B, dim)`."""
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
        """The horizontal map's next position, `(B, dim)`."""
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
    """What sampling remembers: the rows that each convolution looks at, and the weights laid out for one position."""

    def __init__(self, model: PixelCNNPP, labels: Tensor) -> None:
        rows, over, left = len(labels), model.first_over.weight, model.first_left.weight
        self.model, self.rank, self.width = model, 0, model.config.positions.shape[1]
        self.inputs = MapRows(over.new_zeros(rows, over.shape[1]).detach(), 2, self.width, (-1, 1), 1)
        self.first_above = pack(model.first_above.weight, self.width * rows)
        self.first_over = pack(over + F.pad(left[:, :, :1], (0, 2)), self.width * rows)  # of one row of three columns
        self.first_left = pack(left[:, :, 1:], rows)
        above_bias, left_bias = model.first_above.bias, model.first_over.bias + model.first_left.bias
        self.biases = iter((model.above_row.weight + above_bias).detach())
        self.left_biases = iter((model.left_row.weight + left_bias).detach())
        self.sums_over = over.new_empty(self.width, rows, len(over)).detach()
        self.over = self.sums_over.unbind(0)
        self.stage = StageCache(model.stage, self.width, labels)
        self.head_bias, self.head = model.head.bias.detach(), pack(model.head.weight, rows)

    def start_row(self, row: int) -> None:
        """Make the vertical stream's row, and what the horizontal one sees of the row above."""
        patches = self.inputs.patches()
        above = torch.addmm(next(self.biases), patches, self.first_above).view_as(self.sums_over)
        last = patches[:, patches.shape[1] // 2 :]  # of the two rows
        torch.addmm(next(self.left_biases), last, self.first_over, out=self.sums_over.flatten(0, 1))
        self.inputs.turn()
        self.stage.start_row(above, row)

    def step(self, token: Tensor | None) -> Tensor:
        """What is put out at the next position, `(B, size)`, given the last one's ids, `(B,)` or `(B, together)`."""
        row, column = divmod(self.rank, self.width)
        if token is not None:
            self.inputs.cells[column - 1].copy_(self.model.embed(token.view(len(token), -1)).detach())
        if column == 0:
            self.start_row(row)
        x = torch.addmm(self.over[column], self.inputs.windows[column], self.first_left)
        self.rank += 1
        return torch.addmm(self.head_bias, F.elu(self.stage.step(x, row, column)), self.head)
