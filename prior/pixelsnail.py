"""Causal convolutions with causal attention in every block, over a grid of ids in raster order.

PixelSNAIL (Chen et al. 2018, arXiv 1712.09763, fig. 3): convolutions resolve the neighbourhood but have a short reach,
while attention reaches every earlier token but with little precision; each block has both. Gated residual convolutions
compute features of each position. Keys and values are computed from a token, its features and its coordinates; queries
from features and coordinates. A gated 1x1 layer combines the attention's output with the features.

Features at a position depend only on earlier tokens, because the first convolution (type A) excludes the position's
own. A token's key is therefore visible only to later positions: key slot t holds token t - 1, and slot 0 a learned
"nothing", so that causal attention (slots <= t) always has a slot.

The idea is the paper's, but the layers are simpler than in the authors' code (github.com/neocxi/pixelsnail-public).
There, keys, values and queries each come from a gated residual network of 1x1 convolutions; activations are concat_elu
and layers have weight normalisation; shifted convolutions in two streams (the rows above; above and to the left)
replace masks; the output is a mixture of discretised logistics. Here keys, values and queries are linear maps,
activations are elu, nothing is normalised, one stream of masked k x k convolutions covers both, and the output is a
softmax over ids. Published figures do not apply to this model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Prior
from .condition_encoder import ConditionEmbedding, Encoded
from .heads import IdEmbedding
from .layers import FEW_ROWS, ClosingLayers, MaskedConv, RasterConfig, RowCache, pack
from .orders import Partition


class PixelSNAILConfig(RasterConfig):
    kernels = ("kernel",)

    dim: int = Field(64, ge=1, le=8192, description="channels of the features")
    depth: int = Field(4, ge=1, le=256, description="number of blocks")
    residual: int = Field(2, ge=1, le=64, description="gated residual convolutions in a block")
    kernel: int = Field(3, ge=3, le=63, description="side of the convolutions, odd")
    heads: int = Field(1, ge=1, le=256, description="attention heads")
    key: int = Field(4, ge=1, le=8192, description="channels of a head's queries and keys")
    value: int = Field(32, ge=1, le=8192, description="channels of a head's values; at least `key`")
    hidden: int = Field(64, ge=1, le=65536, description="channels before the last layer")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside each gated residual branch")

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.key > self.value:
            yield f"key: must be at most value (got key {self.key}, value {self.value})"


class Residual(nn.Module):
    """Two causal convolutions and a gate with a class bias, on maps `(B, H, W, dim)`."""

    def __init__(self, config: PixelSNAILConfig) -> None:
        super().__init__()
        self.first = MaskedConv(config.dim, config.dim, config.kernel, sees_itself=True)
        self.second = MaskedConv(config.dim, 2 * config.dim, config.kernel, sees_itself=True)
        self.label = ConditionEmbedding(config, 2 * config.dim)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.zeros_(self.label.weight)

    def forward(self, x: Tensor, encoded: Encoded) -> Tensor:
        inner = self.dropout(F.elu(self.first(F.elu(x))))
        return x + F.glu(self.second(inner) + self.label.on_map(encoded, x.shape[2]))


class Attention(nn.Module):
    """Causal attention to the earlier tokens, `(B, N, heads * value)`.

    The fused kernel needs keys as wide as values. A slot holds key and value side by side, and queries are padded with
    zeros, so the value's first channels can serve as padding of the key."""

    def __init__(self, config: PixelSNAILConfig, embedded: int) -> None:
        super().__init__()
        self.heads, self.key, self.value = config.heads, config.key, config.value
        slot = config.heads * (config.key + config.value)
        self.query = nn.Linear(config.dim, config.heads * config.key, bias=False)
        self.query_at = nn.Linear(2, config.heads * config.key)
        self.slot = nn.Linear(embedded + config.dim, slot, bias=False)
        self.slot_at = nn.Linear(2, slot)
        self.nothing = nn.Parameter(torch.zeros(slot))
        self.scale = (config.value / config.key) ** 0.5  # attention divides by the root of the padded width

    def forward(self, embedded: Tensor, x: Tensor, background: Tensor) -> Tensor:  # (B, N, E), (B, N, dim), (N, 2)
        q = (self.query(x) + self.query_at(background)).unflatten(-1, (self.heads, self.key)) * self.scale
        slots = self.slot(torch.cat([embedded[:, :-1], x[:, :-1]], -1)) + self.slot_at(background[:-1])
        slots = torch.cat([self.nothing.expand(len(x), 1, -1), slots], 1)
        slots = slots.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, key + value)
        q = F.pad(q, (0, self.value - self.key)).transpose(1, 2)
        k, v = slots[..., : self.value], slots[..., self.key :]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Residual convolutions, attention, and the gated 1x1 layer that joins them, on maps `(B, H, W, dim)`."""

    def __init__(self, config: PixelSNAILConfig, embedded: int) -> None:
        super().__init__()
        self.residuals: Any = nn.ModuleList(Residual(config) for _ in range(config.residual))
        self.attention = Attention(config, embedded)
        self.join = nn.Linear(config.dim + config.heads * config.value, config.dim)
        self.gate = nn.Linear(config.dim, 2 * config.dim)
        self.label = ConditionEmbedding(config, 2 * config.dim)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.zeros_(self.label.weight)

    def forward(self, embedded: Tensor, x: Tensor, background: Tensor, encoded: Encoded) -> Tensor:
        for residual in self.residuals:
            x = residual(x, encoded)
        attended = self.attention(embedded.flatten(1, 2), x.flatten(1, 2), background).unflatten(1, x.shape[1:3])
        joined = self.dropout(F.elu(self.join(F.elu(torch.cat([x, attended], -1)))))
        return x + F.glu(self.gate(joined) + self.label.on_map(encoded, x.shape[2]))


class PixelSNAIL(Prior, name="pixelsnail"):
    """Blocks of masked convolutions and attention, with row caches and a cache of keys and values for sampling."""

    Config = PixelSNAILConfig
    background: Tensor

    def __init__(self, config: PixelSNAILConfig) -> None:
        super().__init__(config)
        vocab_size, (height, width) = config.grid.vocab_size, config.positions.shape
        channels = min(config.dim, vocab_size)  # more channels than ids are redundant
        self.embedding = IdEmbedding(config.grid, self.output_head.ids_per_position, channels)
        self.first = MaskedConv(channels, config.dim, config.kernel, sees_itself=False)
        self.layers: Any = nn.ModuleList(Block(config, channels) for _ in range(config.depth))
        self.hidden = nn.Linear(config.dim, config.hidden)
        self.head = nn.Linear(config.hidden, self.output_head.size)
        rows, columns = torch.arange(height) / height - 0.5, torch.arange(width) / width - 0.5
        self.register_buffer("background", torch.cartesian_prod(rows, columns), persistent=False)  # (N, 2)

    def outputs(self, tokens: Tensor, encoded: Encoded) -> Tensor:
        embedded = self.embedding(self.position_id_map(tokens))
        x = self.first(embedded)
        for block in self.layers:
            x = block(embedded, x, self.background, encoded)
        return self.head(F.elu(self.hidden(F.elu(x)))).flatten(1, 2)

    @property
    def feature_modules(self) -> list[nn.Module]:
        return list(self.layers)

    def make_cache(self, encoded: Encoded, partition: Partition | None) -> Cache:
        return Cache(self, encoded)


class ResidualCache:
    """Evaluates a `Residual` one position at a time."""

    def __init__(self, residual: Residual, width: int, encoded: Encoded) -> None:
        label = residual.label.on_map(encoded, width)
        self.first = RowCache(residual.first, width, label.new_zeros(len(label), len(residual.first.bias)))
        self.second = RowCache(residual.second, width, label)

    def step(self, x: Tensor, column: int, out: Tensor | None) -> Tensor:
        self.first.cells[column].copy_(F.elu(x))
        F.elu_(self.first.read(column, out=self.second.cells[column]))
        return torch.add(x, F.glu(self.second.read(column)), out=out)


class BlockCache:
    """Evaluates a `Block` one position at a time, given its slots; biases include coordinates and labels."""

    def __init__(self, block: Block, model: PixelSNAIL, encoded: Encoded, features: Tensor) -> None:
        """features: `(B, dim)`, a buffer that receives this position's features for the next position."""
        config, rows, attention = model.config, len(encoded), block.attention
        width = model.config.positions.shape[1]
        self.residuals = [ResidualCache(residual, width, encoded) for residual in block.residuals]
        self.targets = [*[None] * (config.residual - 1), features]
        self.padded = features.new_zeros(rows, config.heads, 1, config.value)
        self.queries = self.padded[:, :, 0, : config.key]
        self.query_at = attention.query_at(model.background) * attention.scale  # (N, heads * key)
        self.query = pack(attention.query.weight * attention.scale, rows)
        self.join = block.join.bias.detach(), pack(block.join.weight, rows)
        biases = (block.gate.bias + block.label.at_positions(encoded)).expand(-1, len(self.query_at), -1)
        self.gate = biases.unbind(1), pack(block.gate.weight, rows)

    def step(self, x: Tensor, rank: int, column: int, keys: Tensor, values: Tensor) -> Tensor:
        for residual, target in zip(self.residuals, self.targets, strict=True):
            x = residual.step(x, column, target)
        self.queries.copy_(torch.addmm(self.query_at[rank], x, self.query).view_as(self.queries))
        attended = F.scaled_dot_product_attention(self.padded, keys, values).flatten(1)
        bias, join = self.join
        joined = F.elu_(torch.addmm(bias, F.elu_(torch.cat([x, attended], 1)), join))
        biases, gate = self.gate
        return x + F.glu(torch.addmm(biases[rank], joined, gate))


class Cache:
    """The last rows that each convolution reads, and the slots of each block's attention.

    The slot of position t depends on the token and the features of position t - 1, which are known in all blocks at
    step t, so one product computes the slots of all blocks. A step is bound by the number of operations, so products
    are written where the next operation reads them."""

    def __init__(self, model: PixelSNAIL, encoded: Encoded) -> None:
        config, rows = model.config, len(encoded)
        self.width = model.config.positions.shape[1]
        self.rank = 0
        self.embedding, like = model.embedding, model.head.weight.detach()
        embedded = self.embedding.embedding_dim
        self.sources = like.new_zeros(config.depth, rows, embedded + config.dim)
        self.tokens, features = self.sources.split([embedded, config.dim], 2)
        self._make_slots(config, [block.attention for block in model.layers], model.background)
        self.first = RowCache(model.first, self.width, torch.zeros_like(features[0]))
        self.layers = [BlockCache(block, model, encoded, features[at]) for at, block in enumerate(model.layers)]
        residuals = [residual for block in self.layers for residual in block.residuals]
        self.row_caches = [self.first, *(cache for each in residuals for cache in (each.first, each.second))]
        self.head = ClosingLayers(model.hidden, model.head, rows, F.elu_)

    def _make_slots(self, config: PixelSNAILConfig, attentions: list[Attention], background: Tensor) -> None:
        depth, rows = self.sources.shape[:2]
        self.slot_at = torch.stack([a.slot_at(background) for a in attentions], 1)[:, :, None]  # (N, depth, 1, slot)
        weights = torch.stack([a.slot.weight.detach() for a in attentions])
        self.slot = weights.mT.contiguous() if rows < FEW_ROWS else weights.mT
        self.slots = self.sources.new_zeros(depth, rows, config.heads, len(background), config.key + config.value)
        self.slots[:, :, :, 0] = torch.stack([a.nothing for a in attentions]).view(depth, 1, config.heads, -1)
        self.keys, self.values = self.slots[..., : config.value], self.slots[..., config.key :]

    def step(self, token: Tensor | None) -> Tensor:
        rank, column = self.rank, self.rank % self.width
        if token is not None:
            self.tokens.copy_(self.embedding.embed_rows(token))
            self.first.cells[column - 1].copy_(self.tokens[0])
            slot, made = self.slots.select(3, rank), torch.baddbmm(self.slot_at[rank - 1], self.sources, self.slot)
            slot.copy_(made.view_as(slot))
        if column == 0:
            for cache in self.row_caches:
                cache.start_row()
        keys, values = (part.narrow(3, 0, rank + 1).unbind(0) for part in (self.keys, self.values))
        x = self.first.read(column)
        for block, k, v in zip(self.layers, keys, values, strict=True):
            x = block.step(x, rank, column, k, v)
        self.rank += 1
        return self.head.outputs(x)
