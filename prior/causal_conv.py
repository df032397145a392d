"""Dilated causal convolutions over a grid of ids, along any fixed order.

WaveNet (van den Oord et al. 2016): gated residual blocks, tanh(a) * sigmoid(b) of a convolution whose dilation doubles
from block to block, and skip connections from every block to a two-layer head. The input at rank r is the token of rank
r - 1 (a start vector at rank 0) plus an embedding of the predicted position, because ranks alone do not reveal the
position on the grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .attention import coordinates
from .base import Prior
from .condition_encoder import ConditionEmbedding, Encoded
from .config import PriorConfig
from .heads import IdEmbedding
from .layers import ClosingLayers, pack
from .orders import Partition


class CausalConvConfig(PriorConfig):
    takes_heads = takes_positions = takes_conditions = True

    dim: int = Field(64, ge=1, le=16384, description="channels of the residual stream and of a block's gated output")
    depth: int = Field(8, ge=1, le=256, description="number of gated residual blocks")
    kernel: int = Field(2, ge=2, le=16, description="taps of a convolution, including the current rank")
    max_dilation: int = Field(
        128, ge=1, le=4096, description="dilations are 1, 2, 4, ... up to this power of 2, then 1 again"
    )
    skip: int = Field(64, ge=1, le=16384, description="channels of the skip connections and of the head")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on each block's gated output")

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.max_dilation & (self.max_dilation - 1):
            yield f"max_dilation: must be a power of two (got {self.max_dilation})"

    @property
    def dilations(self) -> list[int]:
        return [1 << block % self.max_dilation.bit_length() for block in range(self.depth)]


class Block(nn.Module):
    """A gated dilated convolution. Returns its contributions to the residual stream, `(B, dim, N)` (empty in the last
    block, whose stream is not read), and to the skip connections, `(B, skip, N)`."""

    def __init__(self, config: CausalConvConfig, dilation: int, last: bool) -> None:
        super().__init__()
        self.past, self.sizes = (config.kernel - 1) * dilation, (0 if last else config.dim, config.skip)
        self.gated = nn.Conv1d(config.dim, 2 * config.dim, config.kernel, dilation=dilation)
        self.out = nn.Conv1d(config.dim, sum(self.sizes), 1, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, label: Tensor) -> tuple[Tensor, ...]:  # (B, dim, N), (B, 2 dim, 1 or N)
        content, gate = (self.gated(F.pad(x, (self.past, 0))) + label).chunk(2, 1)
        return self.out(self.dropout(content.tanh() * gate.sigmoid())).split(self.sizes, 1)


class CausalConv(Prior, name="causal_conv"):
    """WaveNet over the tokens in `order`: rank r sees the `reach` ranks before it."""

    Config = CausalConvConfig
    ranks: Tensor
    cells: Tensor  # (axes, N): coordinates of the grid's cells, in decoding order

    def __init__(self, config: CausalConvConfig) -> None:
        super().__init__(config)
        dim, depth = config.dim, config.depth
        self.token_embedding = IdEmbedding(config.grid, self.output_head.ids_per_position, dim)
        self.start_embedding = nn.Parameter(torch.empty(1, dim))
        self.axis_embeddings = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in config.positions.shape)
        self.class_embedding = ConditionEmbedding(config, depth * 2 * dim)
        blocks = [Block(config, dilation, at == depth - 1) for at, dilation in enumerate(config.dilations)]
        self.layers: Any = nn.ModuleList(blocks)
        self.reach = 1 + sum(block.past for block in blocks)
        self.skip_bias = nn.Parameter(torch.zeros(config.skip))
        self.hidden = nn.Linear(config.skip, config.skip)
        self.head = nn.Linear(config.skip, self.output_head.size)
        self.register_buffer("ranks", torch.argsort(self.position_order), persistent=False)
        cells = coordinates(config.positions.shape)[self.position_order]
        self.register_buffer("cells", cells.t().contiguous(), persistent=False)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for table in (self.token_embedding.weight, self.start_embedding, *self.axis_embeddings):
            nn.init.normal_(table, std=0.5)
        nn.init.zeros_(self.class_embedding.weight)

    @property
    def position_field(self) -> Tensor:
        behind = self.ranks[:, None] - self.ranks
        return (behind > 0) & (behind <= self.reach)

    def positions(self) -> Tensor:
        return sum(table[at] for table, at in zip(self.axis_embeddings, self.cells, strict=True))

    def outputs(self, tokens: Tensor, encoded: Encoded) -> Tensor:
        previous = self.position_ids(tokens)[:, self.position_order[:-1]]
        start = self.start_embedding.expand(len(tokens), 1, -1)
        x = (torch.cat([start, self.token_embedding(previous)], 1) + self.positions()).transpose(1, 2)  # (B, dim, N)
        label_terms = self.class_embedding.at_positions(encoded, self.position_order).mT.chunk(len(self.layers), 1)
        skips = self.skip_bias[:, None]
        for block, label_term in zip(self.layers[:-1], label_terms[:-1], strict=True):
            residual, skip = block(x, label_term)
            x, skips = x + residual, skips + skip
        skips = skips + self.layers[-1](x, label_terms[-1])[1]
        hidden = self.hidden(skips.transpose(1, 2)[:, self.ranks].relu())
        return self.head(hidden.relu())

    @property
    def feature_modules(self) -> list[nn.Module]:
        return [block.dropout for block in self.layers]

    def arrange_features(self, output: Any) -> Tensor:
        return output.transpose(1, 2)[:, self.ranks]

    def make_cache(self, encoded: Encoded, partition: Partition | None) -> Buffers:
        return Buffers(self, encoded)


class Layer(NamedTuple):
    """One block of `Buffers`: its inputs, outputs and weights."""

    inputs: Tensor  # (1 + N, B, dim), time first
    earlier: tuple[int, ...]  # offsets of earlier taps, farthest first
    taps: Tensor  # (kernel * dim, 2 dim)
    biases: tuple[Tensor, ...]  # (B, 2 dim) at each rank
    gates: Tensor  # (B, dim)
    residual: Tensor | None  # (dim, dim), None in the last block
    outputs: Tensor | None  # the next block's inputs


class Buffers:
    """Each block's inputs so far, time first, after a row of zeros for ranks before the first; and weights laid out for
    one-token steps.

    With few rows, a step is bound by the number of operations, so products are written where the next operation reads
    them: the residual stream into the next block's inputs, and the gated outputs side by side, so that all skip
    connections are one product. Since sigmoid(b) = (1 + tanh(b / 2)) / 2, a gate is a single tanh over both halves,
    with the factors folded into the weights."""

    def __init__(self, model: CausalConv, encoded: Encoded) -> None:
        config, rows, weight = model.config, len(encoded), model.token_embedding.weight.detach()
        self.rank = 0
        self.token_embedding, self.positions = model.token_embedding, model.positions().detach()
        self.start = model.start_embedding.detach().expand(rows, -1)
        self.pre = weight.new_empty(rows, 2 * config.dim)
        self.content, self.gate = self.pre.chunk(2, 1)
        self.gates = weight.new_empty(rows, config.depth * config.dim)
        inputs = weight.new_zeros(config.depth, 1 + len(model.ranks), rows, config.dim)
        label_terms = model.class_embedding.at_positions(encoded, model.position_order).detach()
        self.layers = self._layers(model, inputs, label_terms)
        self.inputs = inputs[0]
        skips = torch.cat([block.out.weight[-config.skip :, :, 0] / 2 for block in model.layers], 1)
        self.skips, self.skip_bias = pack(skips, rows), model.skip_bias.detach()
        self.head = ClosingLayers(model.hidden, model.head, rows, torch.relu_)

    def _layers(self, model: CausalConv, inputs: Tensor, label_terms: Tensor) -> list[Layer]:
        dim, rows, layers = model.config.dim, len(label_terms), []
        halved = torch.cat([torch.ones_like(self.content[0]), torch.full_like(self.content[0], 0.5)])
        gates, terms = self.gates.split(dim, 1), label_terms.split(2 * dim, 2)
        for at, (block, dilation) in enumerate(zip(model.layers, model.config.dilations, strict=True)):
            taps = block.gated.weight.transpose(1, 2).flatten(1) * halved[:, None]  # tap by tap
            biases = ((block.gated.bias.detach() + terms[at]) * halved).expand(-1, len(model.ranks), -1).unbind(1)
            last = at == len(model.layers) - 1
            residual = None if last else pack(block.out.weight[:dim, :, 0] / 2, rows)
            outputs = None if last else inputs[at + 1]
            earlier = tuple(range(block.past, 0, -dilation))
            layers.append(Layer(inputs[at], earlier, pack(taps, rows), biases, gates[at], residual, outputs))
        return layers

    def step(self, token: Tensor | None) -> Tensor:
        at = 1 + self.rank
        x = self.start if token is None else self.token_embedding.embed_rows(token)
        x = torch.add(x, self.positions[self.rank], out=self.inputs[at])
        for inputs, earlier, taps, biases, gates, residual, outputs in self.layers:
            window = torch.cat([*(inputs[max(0, at - back)] for back in earlier), x], 1)
            torch.addmm(biases[self.rank], window, taps, out=self.pre).tanh_()
            torch.addcmul(self.content, self.content, self.gate, out=gates)
            if residual is not None and outputs is not None:
                x = torch.addmm(x, gates, residual, out=outputs[at])
        self.rank += 1
        return self.head.outputs(torch.addmm(self.skip_bias, self.gates, self.skips))
