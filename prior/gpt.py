"""A causal transformer over a grid of ids, in one fixed order or trained for all orders.

GPT (Radford et al. 2018) as image priors use it (`prior.transformer`). The input at rank r is the token of rank r - 1
(the class at rank 0) plus an embedding of the position that it predicts. With `any_order`, training begins with random
orders, which gradually give way to the model's own (RAR, Yu et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import EPS, Block, Rotations, coordinates
from .base import Prior, to_device_async
from .condition_encoder import ConditionEmbedding, Encoded
from .heads import IdEmbedding
from .layers import pack
from .masks import AttentionWindow, make_windows
from .orders import Partition
from .transformer import OrderedConfig, reset


class GPTConfig(OrderedConfig):
    """Sizes of the transformer, its training orders and its attention window."""


class GPT(Prior, name="gpt"):
    """Masked self-attention over the tokens in `order`, with a key/value cache for sampling."""

    Config = GPTConfig

    cells: Tensor  # (axes, P): coordinates of the grid's cells, raster order

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        dim, shape = config.dim, config.positions.shape
        self.any_order = config.any_order
        self.token_embedding = IdEmbedding(config.grid, self.output_head.ids_per_position, dim)
        self.class_embedding = ConditionEmbedding(config, dim)
        self.start_embedding = nn.Parameter(torch.empty(1, dim))
        self.axis_embeddings = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in shape)
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Any = nn.ModuleList(Block(config, causal=True, window=w) for w in self.make_windows())
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, self.output_head.size, bias=False)
        self.register_buffer("cells", coordinates(shape).t().contiguous(), persistent=False)
        start = torch.full((1, len(shape)), -1, device="cpu")
        self.rotations = Rotations(config, torch.cat([coordinates(shape), start]))
        reset(self, self.layers)

    def make_windows(self) -> list[AttentionWindow | None]:
        """Make each layer's window. Rank r predicts cell order[r]; its key belongs to the preceding token."""
        if self.config.window is None:
            return [None] * self.config.depth
        shape = self.config.positions.shape
        when = torch.arange(len(self.position_order), device="cpu")[:, None]
        cells = coordinates(shape)[self.position_order]
        targets, sources = torch.cat([when, cells], 1), torch.cat([when - 1, cells.roll(1, 0)], 1)
        return make_windows(targets, sources, self.config.window, self.config.dilations, shape)

    @property
    def position_field(self) -> Tensor:
        """With windows: all positions reachable through a chain of windows, one per layer, and the token before each
        rank, at any distance."""
        windows = [block.window for block in self.layers]
        if not all(windows):
            return super().position_field
        ranks = torch.argsort(self.position_order)
        field = ranks == torch.arange(-1, len(ranks) - 1, device=ranks.device)[:, None]  # (rank, cell)
        for window in windows:
            field = field | window.seen(field)
        return field[ranks]

    def make_rotations(self, order: Tensor) -> Tensor:
        """Return the rotations of queries (by the next token's cell) and keys (by the last token's cell) at each rank:
        `([B,] P, 2, width / 2, 2)` for an order `([B,] P)`."""
        sources = torch.cat([order.new_full((*order.shape[:-1], 1), order.shape[-1]), order[..., :-1]], -1)
        return self.rotations.table[torch.stack([order, sources], -1)]

    def embed_positions(self, order: Tensor) -> Tensor:
        """Return `([B,] P, dim)` for an order `([B,] P)`: the sum of each target's embeddings along the axes."""
        return sum(table[at] for table, at in zip(self.axis_embeddings, self.cells[:, order], strict=True))

    def outputs(self, tokens: Tensor, encoded: Encoded, order: Tensor | None = None) -> Tensor:
        """See `Prior.outputs`. order: `(P,)` or `(B, P)`; None is the model's own."""
        order, ids = self.position_order if order is None else order, self.position_ids(tokens)
        previous = ids.gather(1, order[..., :-1, None].expand(len(tokens), -1, ids.shape[-1]))
        label = self.class_embedding.at_positions(encoded, order)
        inputs = torch.cat([self.start_embedding.expand(len(tokens), 1, -1), self.token_embedding(previous)], 1)
        x = self.dropout(inputs + label + self.embed_positions(order))
        rotations = self.make_rotations(order)
        for block in self.layers:
            x = block(x, rotations)
        raster = order.argsort(-1)[..., None].expand(x.shape)
        return self.head(self.norm(x.gather(1, raster)))

    @property
    def feature_modules(self) -> list[nn.Module]:
        return list(self.layers)

    def arrange_features(self, output: Any) -> Tensor:
        return output[:, self.position_order.argsort()]

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """With `any_order`, draw random orders or, for a growing share of images, the model's own (RAR, eq. 4)."""
        if not self.any_order:
            return {}
        share = self.config.random_share_at(progress)
        shuffled = to_device_async(torch.rand(len(tokens), len(self.grid)).argsort(1), tokens.device)
        random = to_device_async(torch.rand(len(tokens), 1) < share, tokens.device)
        return {"order": torch.where(random, shuffled, self.order)}

    def make_cache(self, encoded: Encoded, partition: Partition | None) -> Cache:
        return Cache(self, encoded, self.position_order if partition is None else partition.order)


class Cache:
    """Keys and values of the tokens so far, allocated once, and weights laid out for one-token steps.

    With few rows, a step is bound by the number of operations. Each norm's scale is therefore folded into the following
    matrix, and a head's gain and norm scale into the rotation, so a norm only divides by the vector's length.
    Contiguous `(in, out)` weights are fastest for fewer than four rows, `(out, in)` weights for more. With windows,
    only keys and values that later steps read are stored."""

    def __init__(self, model: GPT, encoded: Encoded, order: Tensor) -> None:
        heads, width = model.config.heads, model.config.dim // model.config.heads
        weight = model.token_embedding.weight
        self.precise = torch.float64 if weight.dtype == torch.float64 else torch.float32  # of norms and rotations
        self.qkv_shape, rows = (len(encoded), 3, heads, width), len(encoded)

        def pack_with(norm: nn.RMSNorm, layer: nn.Linear) -> Tensor:
            return pack(layer.weight * norm.weight * model.config.dim**0.5, rows)

        self.rank = 0
        self.start = model.start_embedding
        self.labels = model.class_embedding.at_positions(encoded, order).expand(-1, order.shape[-1], -1).unbind(1)
        self.token_embedding = model.token_embedding
        self.positions = model.embed_positions(order).movedim(-2, 0)
        rotations = torch.view_as_complex(model.make_rotations(order).to(self.precise)).unsqueeze(-2) * width**0.5
        self.rotations = rotations.movedim(-4, 0).contiguous()  # (P, [B,] 2, 1, width / 2)
        self.same_order = order.ndim == 1
        self.layers = []
        for block in model.layers:
            gains = torch.stack([block.gain, torch.ones_like(block.gain)]).to(self.precise)  # of queries and keys
            # A common order is folded in once. Per-image orders are folded in at each step, because their table would
            # be as large as a cache.
            gains = self.rotations * gains if self.same_order else gains
            stored = None if block.window is None else block.window.key_slots
            slots = (stored.slots, block.window.reads) if stored else None
            keys_values = weight.new_empty(len(encoded), 2, heads, stored.size if stored else order.shape[-1], width)
            weights = (
                pack_with(block.attention_norm, block.qkv),
                pack(block.project.weight, rows),
                pack_with(block.mlp_norm, block.gate_up),
                pack(block.down.weight, rows),
            )
            self.layers.append((gains, keys_values, slots, *weights))
        self.head = pack_with(model.norm, model.head)

    def unit(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.precise)
        return (x / length.clamp_min_(EPS)).to(x.dtype)

    def step(self, token: Tensor | None) -> Tensor:
        rank, batch = self.rank, self.qkv_shape[0]
        x = self.start if token is None else self.token_embedding.embed_rows(token)
        x = x + self.labels[rank] + self.positions[rank]
        for gains, keys_values, slots, qkv_weight, project, gate_up, down in self.layers:
            rotation = gains[rank] if self.same_order else self.rotations[rank] * gains
            qkv = torch.mm(self.unit(x), qkv_weight).view(self.qkv_shape).to(self.precise)
            queries_keys = qkv[:, :2]  # normalised and rotated in place
            lengths = torch.linalg.vector_norm(queries_keys, dim=-1, keepdim=True).clamp_min_(EPS)
            pairs = queries_keys.view(batch, 2, qkv.shape[2], -1, 2)
            torch.view_as_complex(pairs).mul_(rotation / lengths)
            keys_values.select(3, slots[0][rank] if slots else rank).copy_(qkv[:, 1:])
            seen = keys_values.index_select(3, slots[1][rank]) if slots else keys_values.narrow(3, 0, rank + 1)
            keys, values = seen.unbind(1)
            attended = F.scaled_dot_product_attention(qkv[:, 0].unsqueeze(2).to(x.dtype), keys, values)
            x = torch.addmm(x, attended.view(batch, -1), project)
            gate, up = torch.mm(self.unit(x), gate_up).chunk(2, 1)
            x = torch.addmm(x, F.silu(gate).mul_(up), down)
        self.rank += 1
        return torch.mm(self.unit(x), self.head)
