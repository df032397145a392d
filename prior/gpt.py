"""The causal transformer over a grid of ids, in any fixed order, or in every order at once.

GPT (Radford et al. 2018) as image priors use it (`prior.transformer`). The input at rank r is the token of rank r - 1
(the class at rank 0) plus the embedding of the position to be predicted, so the model is told where it is going. With
`any_order` it is trained in random orders that give way to its own one (RAR, Yu et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Prior
from .drawing import FEW_ROWS, sent
from .heads import IdEmbedding
from .masks import Window, make_windows
from .orders import Partition
from .transformer import EPS, Block, OrderedConfig, Rotations, coordinates, deep_rounding, reset

TINY = 1e-20


class GPTConfig(OrderedConfig):
    """Sizes of the transformer, the orders it is trained in, and how far it sees."""


class GPT(Prior, name="gpt"):
    """Masked self-attention over the tokens in `order`, with a cache for sampling."""

    Config = GPTConfig

    cells: Tensor
    """Coordinates `(axes, N)` of the grid's cells, raster order."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        dim, shape = config.dim, config.positions.shape
        self.any_order = config.any_order
        self.rounding = deep_rounding(config.depth)
        self.token_embedding = IdEmbedding(config.grid, self.readout.together, dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)  # the last is the null class
        self.start_embedding = nn.Parameter(torch.empty(1, dim))
        self.axis_embeddings = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in shape)
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Any = nn.ModuleList(Block(config, causal=True, window=w) for w in self.make_windows())
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, self.readout.size, bias=False)
        self.register_buffer("cells", coordinates(shape).t().contiguous(), persistent=False)
        start = torch.full((1, len(shape)), -1, device="cpu")
        self.rotations = Rotations(config, torch.cat([coordinates(shape), start]))
        reset(self.parameters(), self.layers)

    def make_windows(self) -> list[Window | None]:
        """Of each layer. Rank r predicts the cell order[r], and holds the token before it, at rank 0 none."""
        if self.config.window is None:
            return [None] * self.config.depth
        shape = self.config.positions.shape
        when = torch.arange(len(self.position_order), device="cpu")[:, None]
        cells = coordinates(shape)[self.position_order]
        targets, sources = torch.cat([when, cells], 1), torch.cat([when - 1, cells.roll(1, 0)], 1)
        return make_windows(targets, sources, self.config.window, self.config.dilations, shape)

    @property
    def position_field(self) -> Tensor:
        """As in `Prior`. With a window: what is near, what is near that, and so on for each layer; besides these, each
        rank holds the token before it, however far away."""
        windows = [block.window for block in self.layers]
        if not all(windows):
            return super().position_field
        ranks = torch.argsort(self.position_order)
        field = ranks == torch.arange(-1, len(ranks) - 1, device=ranks.device)[:, None]  # (rank, cell)
        for window in windows:
            field = window.spread(field)
        return field[ranks]

    def turns(self, order: Tensor) -> Tensor:
        """Rotations per rank of queries (where the next token goes) and keys (where the last one stands):
        `([B,] N, 2, width / 2, 2)` for an order `([B,] N)`."""
        sources = torch.cat([order.new_full((*order.shape[:-1], 1), order.shape[-1]), order[..., :-1]], -1)
        return self.rotations.table[torch.stack([order, sources], -1)]

    def positions(self, order: Tensor) -> Tensor:
        """`([B,] N, dim)` for an order `([B,] N)`: the sum of each target's embedding along every axis."""
        return sum(table[at] for table, at in zip(self.axis_embeddings, self.cells[:, order], strict=True))

    def outputs(self, tokens: Tensor, labels: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """As in `Prior`. order: `(N,)` or `(B, N)`; None is the model's own."""
        labels = self.class_ids(labels, len(tokens))
        order, ids = self.position_order if order is None else order, self.ids_of(tokens)
        walked = ids.gather(1, order[..., :-1, None].expand(len(tokens), -1, ids.shape[-1]))
        label = self.class_embedding(labels)[:, None]
        inputs = torch.cat([self.start_embedding.expand_as(label), self.token_embedding(walked)], 1)
        x = self.dropout(inputs + label + self.positions(order))
        turns = self.turns(order)
        for block in self.layers:
            x = block(x, turns)
        raster = order.argsort(-1)[..., None].expand(x.shape)
        return self.head(self.norm(x.gather(1, raster)))

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks: their residual stream, `(B, N, dim)` in the order."""
        return list(self.layers)

    def arrange(self, output: Any) -> Tensor:
        """Raster order. What is at i knows of i's place, and of the tokens before it in the order."""
        return output[:, self.position_order.argsort()]

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """With `any_order`, an order per image: a random one, or in ever more images the model's own (RAR, eq. 4)."""
        if not self.any_order:
            return {}
        share = self.config.random_share_at(progress)
        shuffled = sent(torch.rand(len(tokens), len(self.grid)).argsort(1), tokens.device)
        random = sent(torch.rand(len(tokens), 1) < share, tokens.device)
        return {"order": torch.where(random, shuffled, self.order)}

    def make_cache(self, labels: Tensor, walk: Partition | None) -> Cache:
        """Keys and values of the tokens so far."""
        return Cache(self, labels, self.position_order if walk is None else walk.order)


class Cache:
    """What sampling remembers: keys and values, allocated once, and the weights laid out for one-token steps. With
    a window it keeps those alone that a later step sees.

    A step on few rows is bound by the number of operations, so norm scales are folded into the matrices that follow
    them, and a head's gain, and the scale of its norm, into its rotation. With few rows `(in, out)` contiguous weights
    are read fastest; from four rows on `(out, in)` ones are.
    """

    def __init__(self, model: GPT, labels: Tensor, order: Tensor) -> None:
        heads, width, weight = model.config.heads, model.config.dim // model.config.heads, model.token_embedding.weight
        self.exact = torch.float64 if weight.dtype == torch.float64 else torch.float32  # for norms and rotations
        self.split = (len(labels), 3, heads, width)

        def pack(matrix: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
            matrix = matrix if norm is None else matrix * norm.weight * model.config.dim**0.5
            return matrix.t().contiguous() if len(labels) < FEW_ROWS else matrix.t()

        self.rank = 0
        self.label, self.start = model.class_embedding(labels), model.start_embedding
        self.token_embedding, self.positions = model.token_embedding, model.positions(order).movedim(-2, 0)
        turns = torch.view_as_complex(model.turns(order).to(self.exact)).unsqueeze(-2) * width**0.5
        self.turns = turns.movedim(-4, 0).contiguous()  # (N, [B,] 2, 1, width / 2)
        self.layers = []
        for block in model.layers:
            gains = torch.stack([block.gain, torch.ones_like(block.gain)]).to(self.exact)  # of queries and keys
            memory = None if block.window is None else block.window.memory
            places = (memory.slots, block.window.reads) if memory else None
            cache = weight.new_empty(len(labels), 2, heads, memory.size if memory else order.shape[-1], width)
            weights = (
                pack(block.qkv.weight, block.attention_norm),
                pack(block.project.weight),
                pack(block.gate_up.weight, block.mlp_norm),
                pack(block.down.weight),
            )
            # An order for all is folded in once; an order per image at each step, or the table would fill a cache.
            self.layers.append((self.turns * gains if order.ndim == 1 else gains, cache, places, *weights))
        self.folded = order.ndim == 1
        self.head = pack(model.head.weight, model.norm)

    def direction(self, x: Tensor) -> Tensor:
        """`x` scaled to unit length along its last axis: its RMS norm but for a factor, which the weights hold."""
        return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.exact).clamp_min_(TINY)).to(x.dtype)

    def step(self, token: Tensor | None) -> Tensor:
        """What is put out at the next position, `(B, size)`, given the last one's ids, `(B,)` or `(B, together)`."""
        rank, split = self.rank, self.split
        x = self.start if token is None else self.token_embedding.of_rows(token)
        x = x + self.label + self.positions[rank]
        for gains, cache, places, qkv_weight, project, gate_up, down in self.layers:
            turn = gains[rank] if self.folded else self.turns[rank] * gains
            qkv = torch.mm(self.direction(x), qkv_weight).view(split).to(self.exact)
            both = qkv[:, :2]  # queries and keys, turned in place
            lengths = torch.linalg.vector_norm(both, dim=-1, keepdim=True).clamp_min_(TINY)
            torch.view_as_complex(both.view(split[0], 2, split[2], -1, 2)).mul_(turn / lengths)
            cache.select(3, places[0][rank] if places else rank).copy_(qkv[:, 1:])
            seen = cache.index_select(3, places[1][rank]) if places else cache.narrow(3, 0, rank + 1)
            keys, values = seen.unbind(1)
            attended = F.scaled_dot_product_attention(qkv[:, 0].unsqueeze(2).to(x.dtype), keys, values)
            x = torch.addmm(x, attended.view(split[0], -1), project)
            gate, up = torch.mm(self.direction(x), gate_up).chunk(2, 1)
            x = torch.addmm(x, F.silu(gate).mul_(up), down)
        self.rank += 1
        return torch.mm(self.direction(x), self.head)
