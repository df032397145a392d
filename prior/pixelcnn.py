"""PixelCNN: masked convolutions over a grid of ids, row by row.

van den Oord et al. 2016, "Pixel Recurrent Neural Networks" (arXiv 1601.06759), section 3.5 and table 1: a large masked
convolution of type A, then residual blocks of type B (1x1, k x k, 1x1), then two 1x1 layers. A stack of masked k x k
convolutions never sees a wedge to the upper right of each position, whatever its depth: its blind spot (van den Oord et
al. 2016b, fig. 1), which `receptive_field` spells out and `gated_pixelcnn` does not have.

The paper has the channels of a pixel side by side and masks the one from the other. Here they are rows of the grid, one
below the other (`tokenizer.pixels`), and the same dependencies come out of the raster order: green sees the red of its
pixel, blue sees both. The differences: a whole row is painted in red, then in green, then in blue, so red sees no green
or blue to its left, and green sees the red to its right; all channels share one kernel, and a bias of each row
(`row_embedding`, with the label's in every layer) tells them apart; a kernel of k rows covers k / 3 rows of the image,
so that an image in colour wants deeper stacks or larger kernels than a grey one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Prior
from .heads import IdEmbedding
from .layers import ClosingLayers, MaskedConv, RowBias, RowCache, RowsConfig, odd_kernels, pack, see
from .orders import Partition


class PixelCNNConfig(RowsConfig):
    """Sizes of the network. The residual stream is `2 * dim` wide."""

    dim: int = Field(32, ge=1, le=8192, description="channels inside a block; the residual stream has twice as many")
    depth: int = Field(15, ge=1, le=256, description="number of residual blocks")
    first_kernel: int = Field(7, ge=3, le=63, description="side of the first (type A) convolution, odd")
    kernel: int = Field(3, ge=3, le=63, description="side of the blocks' (type B) convolutions, odd")
    hidden: int = Field(32, ge=1, le=65536, description="channels before the last layer")

    def check(self) -> Iterator[str]:
        """Kernels are odd, the grid has two axes, the order is raster."""
        yield from super().check()
        yield from odd_kernels(self, "first_kernel", "kernel")


class Block(nn.Module):
    """A residual block on maps `(B, H, W, 2 * dim)`: narrow, look around, widen."""

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        self.narrow = nn.Linear(2 * config.dim, config.dim)
        self.conv = MaskedConv(config.dim, config.dim, config.kernel, sees_itself=True)
        self.label = nn.Embedding(config.num_classes + 1, config.dim)  # the last is the null class
        self.row = RowBias(config, config.dim)
        self.widen = nn.Linear(config.dim, 2 * config.dim, bias=False)
        nn.init.zeros_(self.label.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        narrow = F.relu(self.narrow(F.relu(x)))
        return x + self.widen(F.relu(self.conv(narrow) + self.row(self.label(labels))))


class PixelCNN(Prior, name="pixelcnn"):
    """A stack of masked convolutions, with row caches for sampling. It has a blind spot; see `receptive_field`."""

    Config = PixelCNNConfig

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__(config)
        vocab_size, dim = config.grid.vocab_size, config.dim
        channels = min(2 * dim, vocab_size)  # more than one per id cannot say more
        self.embedding = IdEmbedding(config.grid, self.readout.together, channels)
        self.first = MaskedConv(channels, 2 * dim, config.first_kernel, sees_itself=False)
        self.label = nn.Embedding(config.num_classes + 1, 2 * dim)
        self.row = RowBias(config, 2 * dim)
        self.layers: Any = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.hidden = nn.Linear(2 * dim, config.hidden)
        self.head = nn.Linear(config.hidden, self.readout.size)
        nn.init.zeros_(self.label.weight)

    @property
    def position_field(self) -> Tensor:
        """bool `(P, P)`: whether the network sees position j at i; not all earlier ones, unless the first kernel covers
        the grid."""
        height, width = self.config.positions.shape
        field = torch.eye(height * width, dtype=torch.bool, device="cpu").view(height, width, -1)
        field = see(field, self.first.taps)
        for block in self.layers:
            field = field | see(field, block.conv.taps)
        return field.flatten(0, 1)

    def outputs(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """As in `Prior`."""
        labels = self.class_ids(labels, len(tokens))
        x = self.first(self.embedding(self.map_of_ids(tokens))) + self.row(self.label(labels))
        for block in self.layers:
            x = block(x, labels)
        return self.head(F.relu(self.hidden(F.relu(x)))).flatten(1, 2)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks: maps `(B, H, W, 2 * dim)`."""
        return list(self.layers)

    def make_cache(self, labels: Tensor, walk: Partition | None) -> Cache:
        """The last rows that each convolution looks at."""
        return Cache(self, labels)


class Cache:
    """What sampling remembers: for each convolution its last rows, and the weights laid out for one position.

    A step is bound by the number of operations, so biases and labels are folded into what `RowCache` stores, and
    results are written where the next product reads them.
    """

    def __init__(self, model: PixelCNN, labels: Tensor) -> None:
        self.width = model.config.positions.shape[1]
        self.rank = 0
        self.embedding = model.embedding
        self.first = RowCache(model.first, self.width, model.label(labels), model.row.weight)
        self.layers = [self._block(block, labels) for block in model.layers]
        self.head = ClosingLayers(model.hidden, model.head, len(labels), torch.relu_)

    def _block(self, block: Block, labels: Tensor) -> tuple[Tensor, Tensor, RowCache, Tensor]:
        cache = RowCache(block.conv, self.width, block.label(labels), block.row.weight)
        narrow, widen = (pack(layer.weight, len(labels)) for layer in (block.narrow, block.widen))
        return block.narrow.bias.detach(), narrow, cache, widen

    def step(self, token: Tensor | None) -> Tensor:
        """What is put out at the next position, `(B, size)`, given the last one's ids, `(B,)` or `(B, together)`."""
        column = self.rank % self.width
        if token is not None:
            self.first.cells[column - 1].copy_(self.embedding.of_rows(token))
        if column == 0:
            for cache in (self.first, *(cache for _, _, cache, _ in self.layers)):
                cache.start_row()
        x = self.first.read(column)
        for bias, narrow, cache, widen in self.layers:
            torch.addmm(bias, x.relu(), narrow, out=cache.cells[column]).relu_()
            x = torch.addmm(x, cache.read(column).relu_(), widen)
        self.rank += 1
        return self.head.outputs(x)
