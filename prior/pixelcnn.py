"""PixelCNN: masked convolutions over a grid of ids in raster order.

van den Oord et al. 2016, "Pixel Recurrent Neural Networks" (arXiv 1601.06759), section 3.5 and table 1: a large masked
convolution of type A, then residual blocks of type B (1x1, k x k, 1x1), then two 1x1 layers. At any depth, a stack of
masked k x k convolutions misses a wedge to the upper right of each position, its blind spot (van den Oord et al. 2016b,
fig. 1; see `receptive_field`); `gated_pixelcnn` has no blind spot.

The paper stores a pixel's channels side by side and masks them from one another. Here channels are interleaved rows of
the grid (`tokenizer.pixels`), and raster order gives the same dependencies: green sees the red of its pixel, and blue
sees both. There are three differences. A whole row is drawn in red, then green, then blue, so red does not see green or
blue to its left, and green sees red to its right. All channels share one kernel, and a bias per row (`row_embedding`)
distinguishes them. A kernel of k rows covers k / 3 image rows, so colour images need deeper stacks or larger
kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Prior
from .condition_encoder import ConditionEmbedding, Encoded
from .heads import IdEmbedding
from .layers import ClosingLayers, MaskedConv, RowBias, RowCache, RowsConfig, pack, see
from .orders import Partition


class PixelCNNConfig(RowsConfig):
    """Sizes of the network. The residual stream is `2 * dim` wide."""

    kernels = ("first_kernel", "kernel")

    dim: int = Field(32, ge=1, le=8192, description="channels inside a block; the residual stream has twice as many")
    depth: int = Field(15, ge=1, le=256, description="number of residual blocks")
    first_kernel: int = Field(7, ge=3, le=63, description="side of the first (type A) convolution, odd")
    kernel: int = Field(3, ge=3, le=63, description="side of the blocks' (type B) convolutions, odd")
    hidden: int = Field(32, ge=1, le=65536, description="channels before the last layer")


class Block(nn.Module):
    """A residual block on maps `(B, H, W, 2 * dim)`: 1x1 layer, masked convolution, 1x1 layer."""

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        self.narrow = nn.Linear(2 * config.dim, config.dim)
        self.conv = MaskedConv(config.dim, config.dim, config.kernel, sees_itself=True)
        self.label = ConditionEmbedding(config, config.dim)
        self.row = RowBias(config, config.dim)
        self.widen = nn.Linear(config.dim, 2 * config.dim, bias=False)
        nn.init.zeros_(self.label.weight)

    def forward(self, x: Tensor, encoded: Encoded) -> Tensor:
        narrow = F.relu(self.narrow(F.relu(x)))
        bias = self.row(self.label.on_map(encoded, x.shape[2]))
        return x + self.widen(F.relu(self.conv(narrow) + bias))


class PixelCNN(Prior, name="pixelcnn"):
    """A stack of masked convolutions, with row caches for sampling and a blind spot (see `receptive_field`)."""

    Config = PixelCNNConfig

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__(config)
        vocab_size, dim = config.grid.vocab_size, config.dim
        channels = min(2 * dim, vocab_size)  # more channels than ids are redundant
        self.embedding = IdEmbedding(config.grid, self.output_head.ids_per_position, channels)
        self.first = MaskedConv(channels, 2 * dim, config.first_kernel, sees_itself=False)
        self.label = ConditionEmbedding(config, 2 * dim)
        self.row = RowBias(config, 2 * dim)
        self.layers: Any = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.hidden = nn.Linear(2 * dim, config.hidden)
        self.head = nn.Linear(config.hidden, self.output_head.size)
        nn.init.zeros_(self.label.weight)

    @property
    def position_field(self) -> Tensor:
        """See `Prior`; not all earlier positions, unless the first kernel covers the grid."""
        height, width = self.config.positions.shape
        field = torch.eye(height * width, dtype=torch.bool, device="cpu").view(height, width, -1)
        field = see(field, self.first.taps)
        for block in self.layers:
            field = field | see(field, block.conv.taps)
        return field.flatten(0, 1)

    def outputs(self, tokens: Tensor, encoded: Encoded) -> Tensor:
        x = self.first(self.embedding(self.position_id_map(tokens)))
        x = x + self.row(self.label.on_map(encoded, x.shape[2]))
        for block in self.layers:
            x = block(x, encoded)
        return self.head(F.relu(self.hidden(F.relu(x)))).flatten(1, 2)

    @property
    def feature_modules(self) -> list[nn.Module]:
        return list(self.layers)

    def make_cache(self, encoded: Encoded, partition: Partition | None) -> Cache:
        return Cache(self, encoded)


class Cache:
    """The last rows of each convolution's input, and weights laid out for one-position steps.

    A step is bound by the number of operations, so biases and conditions are folded into the sums of `RowCache`, and
    results are written where the next operation reads them."""

    def __init__(self, model: PixelCNN, encoded: Encoded) -> None:
        self.width = model.config.positions.shape[1]
        self.rank = 0
        self.embedding = model.embedding
        self.first = RowCache(model.first, self.width, model.label.on_map(encoded, self.width), model.row.weight)
        self.layers = []
        for block in model.layers:
            cache = RowCache(block.conv, self.width, block.label.on_map(encoded, self.width), block.row.weight)
            narrow, widen = (pack(layer.weight, len(encoded)) for layer in (block.narrow, block.widen))
            self.layers.append((block.narrow.bias.detach(), narrow, cache, widen))
        self.head = ClosingLayers(model.hidden, model.head, len(encoded), torch.relu_)

    def step(self, token: Tensor | None) -> Tensor:
        column = self.rank % self.width
        if token is not None:
            self.first.cells[column - 1].copy_(self.embedding.embed_rows(token))
        if column == 0:
            for cache in (self.first, *(cache for _, _, cache, _ in self.layers)):
                cache.start_row()
        x = self.first.read(column)
        for bias, narrow, cache, widen in self.layers:
            torch.addmm(bias, x.relu(), narrow, out=cache.cells[column]).relu_()
            x = torch.addmm(x, cache.read(column).relu_(), widen)
        self.rank += 1
        return self.head.outputs(x)
