"""Gated PixelCNN: two stacks of causal convolutions that together see every earlier position.

van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders" (arXiv 1606.05328), section 2 and fig.
2: the vertical stack sees all rows above and needs no masks; the horizontal stack sees the current row to the left and,
through a 1x1 convolution, the vertical stack. Units are gated, y = tanh(a) * sigmoid(b), and the class is added inside
the gates of both stacks (eq. 4). The first layer excludes the predicted position and therefore has no residual
connection.

Channels are rows of the grid, as in `prior.pixelcnn`, which lists the differences from the paper. Each gate also adds a
learned bias per row (`row_embedding`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Prior
from .condition_encoder import ConditionEmbedding, Encoded
from .heads import IdEmbedding
from .layers import CausalConv2d, ClosingLayers, MapRows, RowBias, RowsConfig, bias_by_row, pack, see
from .orders import Partition


class GatedPixelCNNConfig(RowsConfig):
    kernels = ("first_kernel", "kernel")

    dim: int = Field(64, ge=1, le=8192, description="channels of each stack")
    depth: int = Field(10, ge=1, le=256, description="number of gated layers after the first")
    first_kernel: int = Field(7, ge=3, le=63, description="side of the first layer's convolutions, odd")
    kernel: int = Field(3, ge=3, le=63, description="side of the other layers' convolutions, odd")
    hidden: int = Field(32, ge=1, le=65536, description="channels before the last layer")


def gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a.tanh() * b.sigmoid()


class Layer(nn.Module):
    """One layer of both stacks, on maps `(B, H, W, C)`. Row i of the vertical map depends only on rows above i, so all
    layers except the first may read its row i."""

    def __init__(self, config: GatedPixelCNNConfig, inputs: int, size: int, *, first: bool) -> None:
        super().__init__()
        dim, reach, self.first = config.dim, size // 2, first
        self.vertical = CausalConv2d(inputs, 2 * dim, (-reach, -1 if first else 0), (-reach, reach))
        self.horizontal = CausalConv2d(inputs, 2 * dim, (0, 0), (-reach, -1 if first else 0))
        self.across = nn.Linear(2 * dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.vertical_label = ConditionEmbedding(config, 2 * dim)
        self.horizontal_label = ConditionEmbedding(config, 2 * dim)
        self.vertical_row, self.horizontal_row = RowBias(config, 2 * dim), RowBias(config, 2 * dim)
        nn.init.zeros_(self.vertical_label.weight)
        nn.init.zeros_(self.horizontal_label.weight)

    def forward(self, vertical: Tensor, horizontal: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Map both stacks to the vertical map before its gate and the horizontal map."""
        width = horizontal.shape[2]
        above = self.vertical(vertical) + self.vertical_row(self.vertical_label.on_map(encoded, width))
        left = self.horizontal(horizontal) + self.horizontal_row(self.horizontal_label.on_map(encoded, width))
        out = self.out(gate(left + self.across(above)))
        return above, out if self.first else horizontal + out


class GatedPixelCNN(Prior, name="gated_pixelcnn"):
    """A vertical and a horizontal stack, with row caches for sampling.

    With enough depth for its grid it sees every earlier token: see `receptive_field`."""

    Config = GatedPixelCNNConfig

    def __init__(self, config: GatedPixelCNNConfig) -> None:
        super().__init__(config)
        vocab_size, dim = config.grid.vocab_size, config.dim
        channels = min(dim, vocab_size)  # more channels than ids are redundant
        self.embedding = IdEmbedding(config.grid, self.output_head.ids_per_position, channels)
        first = Layer(config, channels, config.first_kernel, first=True)
        rest = [Layer(config, dim, config.kernel, first=False) for _ in range(config.depth)]
        self.layers: Any = nn.ModuleList([first, *rest])
        self.hidden = nn.Linear(dim, config.hidden)
        self.head = nn.Linear(config.hidden, self.output_head.size)

    @property
    def position_field(self) -> Tensor:
        height, width = self.config.positions.shape
        vertical = torch.eye(height * width, dtype=torch.bool, device="cpu").view(height, width, -1)
        horizontal = vertical
        for layer in self.layers:
            vertical = see(vertical, layer.vertical.taps)
            seen = vertical | see(horizontal, layer.horizontal.taps)
            horizontal = seen if layer.first else seen | horizontal
        return horizontal.flatten(0, 1)

    def outputs(self, tokens: Tensor, encoded: Encoded) -> Tensor:
        vertical = horizontal = self.embedding(self.position_id_map(tokens))
        for layer in self.layers:
            vertical = vertical if layer.first else gate(vertical)
            vertical, horizontal = layer(vertical, horizontal, encoded)
        return self.head(F.relu(self.hidden(F.relu(horizontal)))).flatten(1, 2)

    @property
    def feature_modules(self) -> list[nn.Module]:
        return list(self.layers)

    def arrange_features(self, output: Any) -> Tensor:
        return super().arrange_features(output[1])  # the horizontal map, which depends on the vertical one

    def make_cache(self, encoded: Encoded, partition: Partition | None) -> Cache:
        return Cache(self, encoded)


class LayerCache:
    """One layer's packed weights and the rows that it reads: several of the vertical map, and the current row of the
    horizontal map.

    The first layer's stacks share rows, because both read the embedding."""

    def __init__(self, layer: Layer, width: int, encoded: Encoded) -> None:
        vertical, horizontal, batch = layer.vertical, layer.horizontal, len(encoded)
        outputs, inputs = vertical.weight.shape[:2]
        like = layer.out.weight.new_zeros(batch, inputs)
        taps = len(horizontal.taps)
        count = vertical.rows[1] - vertical.rows[0] + 1
        self.vertical = MapRows(like, count, width, vertical.columns, taps)
        self.horizontal = self.vertical if layer.first else MapRows(like, 1, width, horizontal.columns, taps)
        above, left = layer.vertical_label.on_map(encoded, width), layer.horizontal_label.on_map(encoded, width)
        self.vertical_biases = bias_by_row(above, vertical.bias, layer.vertical_row.weight)
        self.biases = bias_by_row(left, horizontal.bias, layer.horizontal_row.weight)
        self.vertical_weight = pack(vertical.weight, width * batch)
        self.across = pack(layer.across.weight, width * batch)
        self.weight = pack(horizontal.weight, batch)
        self.out = pack(layer.out.weight, batch)
        self.sums_above = like.new_empty(width, batch, outputs)  # from the vertical stack, for each column
        self.above = self.sums_above.unbind(0)

    def start_row(self, before: Tensor | None) -> Tensor:
        """Return this row of the vertical map before its gate, `(W, B, 2 * dim)`, given the previous layer's row
        `before` (None in the first layer, which reads completed rows of the embedding)."""
        if before is not None:
            self.vertical.next_row()
            before[..., : before.shape[-1] // 2].tanh_()
            self.vertical.row.copy_(F.glu(before))  # glu: the first half times sigmoid of the second
        vertical = torch.mm(self.vertical.patches(), self.vertical_weight).view_as(self.sums_above)
        vertical += next(self.vertical_biases)
        torch.mm(vertical.flatten(0, 1), self.across, out=self.sums_above.flatten(0, 1))
        self.sums_above += next(self.biases)
        if before is None:
            self.vertical.next_row()
        return vertical


class Cache:
    """The rows that each layer reads, and weights laid out for one-position steps.

    The vertical stack never sees the current row, so it runs once per row, for all columns and layers. Its sums,
    including biases and conditions, initialise the horizontal stack, so a step takes four operations per layer."""

    def __init__(self, model: GatedPixelCNN, encoded: Encoded) -> None:
        rows, dim = len(encoded), model.config.dim
        self.width = model.config.positions.shape[1]
        self.rank = 0
        self.embedding, like = model.embedding, model.head.weight.detach()
        self.layers = [LayerCache(layer, self.width, encoded) for layer in model.layers]
        self.nothing, last = like.new_zeros(2, rows, dim)  # the first layer has no residual
        self.outputs = [layer.horizontal.cells for layer in self.layers[1:]] + [(last,) * self.width]
        self.gates = like.new_empty(rows, 2 * dim)
        self.tanhs = self.gates[:, :dim]
        self.head = ClosingLayers(model.hidden, model.head, rows, torch.relu_)

    def step(self, token: Tensor | None) -> Tensor:
        column = self.rank % self.width
        if token is not None:
            self.layers[0].horizontal.cells[column - 1].copy_(self.embedding.embed_rows(token))
        if column == 0:
            vertical = None
            for layer in self.layers:
                vertical = layer.start_row(vertical)
        x = self.nothing
        for layer, outputs in zip(self.layers, self.outputs, strict=True):
            torch.addmm(layer.above[column], layer.horizontal.windows[column], layer.weight, out=self.gates)
            self.tanhs.tanh_()
            x = torch.addmm(x, F.glu(self.gates), layer.out, out=outputs[column])
        self.rank += 1
        return self.head.outputs(x)
