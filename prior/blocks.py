"""The transformer that takes any ordered partition of the grid: several tokens per pass, exactly.

Tokens stay in raster order, and only masks depend on the partition. Queries, one for each position, hold no token: a
mask embedding and a place. They attend to the tokens of earlier blocks, so the tokens of a block do not see each other
(ARPG, Li et al. 2025; LPD, Zhang et al. 2025; RandAR, Pang et al. 2024). The order is the model's own, so that
parallel decoding is no approximation: p(a block | those before it) is a product over its tokens by definition.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Prior
from .orders import Partition, block_numbers, growing
from .transformer import EPS, Rotations, TransformerConfig, coordinates, deep_rounding, reset, rotate, unit


class BlocksConfig(TransformerConfig):
    """Sizes of the transformer, and the partitions it is trained in."""

    takes_blocks = True

    form: Literal["streams", "single"] = Field("single", description="trial")
    any_order: bool = Field(
        False, description="train in random partitions too, to score, sample and complete in every one"
    )
    random_share: float = Field(
        0.5, ge=0, le=1, description="with any_order: share of images in random partitions; the rest are in its own"
    )


class Layer(nn.Module):
    """Attention from queries `(B, n, dim)` to keys and values of other rows, and SwiGLU, each normalised before and
    added to the queries."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.hidden or -(-config.dim * 8 // 96) * 32
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim, eps=EPS), nn.RMSNorm(dim, eps=EPS)
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.gain = nn.Parameter(torch.full((config.heads, 1), 1.2))  # how sharp a head may attend
        self.project = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def keys_values(self, rows: Tensor, turns: Tensor) -> Tensor:
        """Of rows `(B, n, dim)` whose places are turned by `([B,] n, width / 2, 2)`: `(2, B, heads, n, width)`."""
        k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.kv(self.attention_norm(rows)).chunk(2, -1))
        return torch.stack([rotate(unit(k), turns.unsqueeze(-3)).to(v.dtype), v]).transpose(2, 3)

    def forward(self, x: Tensor, turns: Tensor, keys_values: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, n, dim)` to the same. mask: bool `([B, 1,] n, m)`, True may attend; None is all."""
        (keys, values), queries = keys_values, self.q(self.attention_norm(x)).unflatten(-1, (self.heads, -1))
        queries = rotate(unit(queries), turns.unsqueeze(-3) * self.gain.unsqueeze(-1)).to(x.dtype).transpose(1, 2)
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


class Blocks(Prior, name="blocks"):
    """The first half of the layers reads the tokens, each with those of its own and earlier blocks; the second half
    answers the queries from what has been read. A start row, which all see, holds the class."""

    Config = BlocksConfig
    coordinates: Tensor

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__(config)
        dim, shape = config.dim, config.grid.shape
        self.any_order = config.any_order
        self.rounding = deep_rounding(config.depth)
        self.token_embedding = nn.Embedding(config.grid.vocab_size, dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)  # the last is the null class
        self.start_embedding = nn.Parameter(torch.empty(1, dim))
        self.query_embedding = nn.Parameter(torch.empty(1, dim))
        self.axis_embeddings: Any = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in shape)
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Any = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, config.grid.vocab_size, bias=False)
        start = torch.full((1, len(shape)), -1, device="cpu")
        self.rotations = Rotations(config, torch.cat([start, coordinates(shape)]))
        self.content = config.depth // 2 if config.form == "streams" else 0
        self.register_buffer("coordinates", coordinates(shape).t().contiguous(), persistent=False)
        reset(self.parameters(), self.layers)

    @property
    def places(self) -> Tensor:
        """`(N, dim)`: the sum of each position's embedding along every axis."""
        axes = zip(self.axis_embeddings, self.coordinates, strict=True)
        return torch.stack([table[at] for table, at in axes]).sum(0)

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, order: Tensor | None = None, block_of: Tensor | None = None
    ) -> Tensor:
        """Teacher-forced logits `(B, N, vocab_size)`, raster order; `logits[:, i]` sees only tokens of earlier blocks:
        the model's own, those that it cuts an `order` into, or given by number, `block_of` each token; `(N,)` or
        `(B, N)`, both."""
        if block_of is None:
            block_of = self.block_of if order is None else block_numbers(order, self.blocks)
        label = self.class_embedding(self.class_ids(labels, len(tokens)))[:, None]
        ids, places, turns = self.token_embedding(tokens.flatten(1).long()), self.places, self.rotations.table
        numbers = F.pad(block_of, (1, 0), value=-2)  # the start row comes before all, known tokens (-1) included
        numbers = numbers if block_of.ndim == 1 else numbers[:, None]
        sees = numbers[..., None, :] < numbers[..., 1:, None]
        if self.config.form == "single":
            start = self.start_embedding + label
            x = self.dropout(self.query_embedding + places + label)
            for layer in self.layers:
                x = layer(x, turns[1:], layer.keys_values(torch.cat([start, x + ids], 1), turns), sees)
            return self.head(self.norm(x))
        reads = numbers[..., None, :] <= numbers[..., :, None]
        content = self.dropout(torch.cat([self.start_embedding + label, ids + places + label], 1))
        for layer in self.layers[: self.content]:
            content = layer(content, turns, layer.keys_values(content, turns), reads)
        x = self.dropout(self.query_embedding + places + label)
        for layer in self.layers[self.content :]:
            x = layer(x, turns[1:], layer.keys_values(content, turns), sees)
        return self.head(self.norm(x))

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The layers: of the first half the tokens' stream, of the second half the queries', `(B, N, dim)`."""
        return list(self.layers)

    def arrange(self, output: Any) -> Tensor:
        """Raster order, without the start row."""
        return output[:, -len(self.grid) :]

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """With `any_order`, a partition per image: its own, or a random order in a random number of growing blocks."""
        if not self.any_order:
            return {}
        count, size = len(tokens), len(self.grid)
        tables = torch.tensor([number for blocks in growing_counts(size) for number in blocks]).view(-1, size)
        chosen = torch.randint(len(tables), (count,))
        block_of = torch.empty(count, size, dtype=torch.long)
        block_of.scatter_(1, torch.rand(count, size).argsort(1), tables[chosen])
        own = torch.rand(count, 1) >= self.config.random_share
        return {"block_of": torch.where(own, self.block_of.cpu(), block_of).to(tokens.device)}

    def make_cache(self, labels: Tensor, walk: Partition | None) -> Cache:
        """Keys and values of the tokens so far."""
        return Cache(self, labels, *(walk or (self.order, self.blocks)))


def growing_counts(size: int) -> list[list[int]]:
    """The number of the block at each rank, for some numbers of growing blocks from 1 to `size`."""
    return [
        [block for block, count in enumerate(growing(size, number)) for _ in range(count)]
        for number in sorted({round(size ** (k / 16)) for k in range(17)})
    ]


class Cache:
    """What sampling remembers: keys and values of each layer, allocated once, and how many there are."""

    def __init__(self, model: Blocks, labels: Tensor, order: Tensor, blocks: tuple[int, ...]) -> None:
        heads, size = model.config.heads, len(model.grid) + 1
        self.model, self.single = model, model.config.form == "single"
        self.label = model.class_embedding(labels)[:, None]
        shape = (2, len(labels), heads, size, model.config.dim // heads)
        self.keys_values = [self.label.new_empty(shape) for _ in model.layers]
        cells = order.expand(1, -1) if order.ndim == 1 else order
        self.at = list(cells.split(blocks, 1))  # of each block, (1, n) or (B, n)
        self.block = self.length = 0
        self.inputs: list[Tensor] = []

    def step(self, tokens: Tensor | None) -> Tensor:
        """Logits `(B, n, vocab_size)` of the next block, given the last one's `tokens` `(B, m)`."""
        model, table = self.model, self.model.rotations.table
        places = model.places
        if tokens is None:
            rows = [model.start_embedding + self.label] * len(model.layers)
            turns = table[:1]
        else:
            last = self.at[self.block - 1]
            turns = table[last + 1]
            ids = model.token_embedding(tokens)
            rows = [x + ids for x in self.inputs] if self.single else [ids + places[last] + self.label]
        begin, end = self.length, self.length + rows[0].shape[1]
        content = rows[0]
        for index, layer in enumerate(model.layers):
            row = rows[index] if self.single else content
            self.keys_values[index][:, :, :, begin:end] = layer.keys_values(row, turns)
            if index < model.content:
                content = layer(content, turns, self.keys_values[index][:, :, :, :end])
        self.length = end
        at = self.at[self.block]
        self.block += 1
        x, turns = (model.query_embedding + places[at] + self.label), table[at + 1]
        self.inputs = []
        for index in range(model.content, len(model.layers)):
            self.inputs.append(x)
            x = model.layers[index](x, turns, self.keys_values[index][:, :, :, :end])
        return model.head(model.norm(x))
