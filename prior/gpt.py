"""The causal transformer over a grid of ids, in any fixed order, or in every order at once.

GPT (Radford et al. 2018) as image priors use it (LlamaGen, Sun et al. 2024): RMSNorm, SwiGLU, no biases, rotary
positions on grid coordinates, queries and keys normalised per head. The input at rank r is the token of rank r - 1
(the class at rank 0) plus the embedding of the position to be predicted, so the model is told where it is going. With
`any_order` it is trained in random orders that give way to its own one (RAR, Yu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.pretrained import setting

from .base import Prior, PriorConfig

EPS = 1e-12  # only keeps zero from being divided by zero
TINY = 1e-20
MAX_ROTATIONS = 1 << 24  # tokens times head width: the table of rotary positions is built before weights are read


@dataclass(frozen=True, kw_only=True)
class GPTConfig(PriorConfig):
    """Sizes of the transformer."""

    dim: int = setting(128, "width of the residual stream", ge=8, le=16384)
    depth: int = setting(4, "number of transformer blocks", ge=1, le=256)
    heads: int = setting(4, "attention heads; they divide dim", ge=1, le=256)
    hidden: int | None = setting(None, "width of the SwiGLU layer; default 8/3 dim, rounded up to 32", ge=8, le=65536)
    dropout: float = setting(0.0, "dropout on the embeddings and on each residual branch", ge=0, lt=1)
    attention_dropout: float = setting(0.0, "dropout on the attention weights", ge=0, lt=1)
    rope_base: float = setting(100.0, "longest wavelength of the rotary positions, in units of 2 pi cells", gt=1)
    any_order: bool = setting(False, "train in random orders too, to score, sample and complete in every order")
    anneal: tuple[float, ...] = setting((0.5, 0.75), "with any_order: from all random to random_share, between these "
                                        "shares of training", ge=0, le=1)  # fmt: skip
    random_share: float = setting(0.5, "with any_order: share of images in random orders after annealing", ge=0, le=1)

    def check(self) -> Iterator[str]:
        """Heads have to be of an even width, and the order has to exist."""
        yield from super().check()
        if self.dim % (2 * self.heads):
            yield f"heads: dim must be a multiple of 2 * heads (got dim {self.dim}, heads {self.heads})"
        elif len(self.grid) * self.dim // self.heads > MAX_ROTATIONS:
            yield f"heads: a grid of {len(self.grid)} tokens and heads of width {self.dim // self.heads} are too large"
        if len(self.anneal) != 2 or self.anneal[0] > self.anneal[1]:
            yield f"anneal: expected two ascending shares (got {list(self.anneal)})"


class Block(nn.Module):
    """Attention and SwiGLU, each normalised before and added to the residual stream `(B, N, dim)`."""

    def __init__(self, config: GPTConfig, hidden: int) -> None:
        super().__init__()
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.attention_norm = nn.RMSNorm(config.dim, eps=EPS)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.gain = nn.Parameter(torch.full((config.heads, 1), 1.2))  # how sharp a head may attend
        self.project = nn.Linear(config.dim, config.dim, bias=False)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=EPS)
        self.gate_up = nn.Linear(config.dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:  # (B, N, dim), (..., N, 2, dim / heads / 2, 2)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, heads, width)
        q = rotate(unit(q) * self.gain, rotations[..., 0, :, :]).to(v.dtype)
        k = rotate(unit(k), rotations[..., 1, :, :]).to(v.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


def unit(x: Tensor) -> Tensor:
    """`x` scaled to a root mean square of 1 along its last axis, at least in float32."""
    return F.rms_norm(x if x.dtype == torch.float64 else x.float(), x.shape[-1:], eps=EPS)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of `x` (B, N, heads, width) by its position's angle, of which `rotation` ([B,] N, width / 2, 2)
    holds cos and sin."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unsqueeze(-3).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class GPT(Prior, name="gpt"):
    """Masked self-attention over the tokens in `order`, with a cache for sampling."""

    Config = GPTConfig
    rotations: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        dim, hidden = config.dim, config.hidden or -(-config.dim * 8 // 96) * 32
        self.any_order = config.any_order
        self.token_embedding = nn.Embedding(config.grid.vocab_size, dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)  # the last is the null class
        self.start_embedding = nn.Parameter(torch.empty(1, dim))
        self.axis_embeddings = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in config.grid.shape)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks: Any = nn.ModuleList(Block(config, hidden) for _ in range(config.depth))
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, config.grid.vocab_size, bias=False)
        self.register_buffer("rotations", self._rotations(), persistent=False)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim == 2 and parameter.shape[1] > 1:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:  # branches start small, so that depth does not blow the residual stream up (GPT-2)
            for layer in (block.project, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * len(self.blocks)) ** 0.5)

    def _rotations(self) -> Tensor:
        """cos and sin per raster position, and at the end those of the start: `(N + 1, width / 2, 2)`, the pairs of a
        head shared out among the axes (2-D RoPE)."""
        cells = torch.cartesian_prod(*(torch.arange(size, device="cpu") for size in self.grid.shape))
        cells = torch.cat([cells.reshape(len(self.grid), -1).float(), cells.new_full((1, len(self.grid.shape)), -1.0)])
        pairs, axes = self.config.dim // self.config.heads // 2, len(self.grid.shape)
        axis, step = torch.arange(pairs, device="cpu") % axes, torch.arange(pairs, device="cpu") // axes
        angles = cells[:, axis] * self.config.rope_base ** (-step / max(1, -(-pairs // axes)))
        return torch.stack([angles.cos(), angles.sin()], -1)

    def turns(self, order: Tensor) -> Tensor:
        """Rotations per rank of queries (where the next token goes) and keys (where the last one stands):
        `([B,] N, 2, width / 2, 2)` for an order `([B,] N)`."""
        sources = torch.cat([order.new_full((*order.shape[:-1], 1), len(self.grid)), order[..., :-1]], -1)
        return self.rotations[torch.stack([order, sources], -1)]

    def positions(self, order: Tensor) -> Tensor:
        """`([B,] N, dim)` for an order `([B,] N)`: the sum of each target's embedding along every axis."""
        coordinates = torch.unravel_index(order, self.grid.shape)
        return sum(table[at] for table, at in zip(self.axis_embeddings, coordinates, strict=True))

    def forward(self, tokens: Tensor, labels: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """Teacher-forced logits `(B, N, vocab_size)`, raster order; `logits[:, i]` sees only tokens ranked before i.

        order: `(N,)` or `(B, N)`; None is the model's own.
        """
        if labels is None:
            labels = torch.full((len(tokens),), self.num_classes, device=tokens.device)
        order = self.order if order is None else order
        walked = tokens.flatten(1).long().gather(1, order[..., :-1].expand(len(tokens), -1))
        label = self.class_embedding(labels)[:, None]
        inputs = torch.cat([self.start_embedding.expand_as(label), self.token_embedding(walked)], 1)
        x = self.dropout(inputs + label + self.positions(order))
        turns = self.turns(order)
        for block in self.blocks:
            x = block(x, turns)
        raster = order.argsort(-1)[..., None].expand(x.shape)
        return self.head(self.norm(x.gather(1, raster)))

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """With `any_order`, an order per image: a random one, or in ever more images the model's own (RAR, eq. 4)."""
        if not self.any_order:
            return {}
        begin, end = self.config.anneal
        left = 1.0 if progress < begin else max(0.0, (end - progress) / max(end - begin, 1e-9))
        share = self.config.random_share + (1 - self.config.random_share) * left
        shuffled = torch.rand(len(tokens), len(self.grid)).argsort(1).to(tokens.device)
        return {"order": torch.where(torch.rand(len(tokens), 1).to(tokens.device) < share, shuffled, self.order)}

    def start(self, num_images: int, labels: Tensor | None, order: Tensor | None = None) -> Cache:
        """Allocate the cache once, and lay the weights out for one-token steps."""
        if labels is None:
            labels = torch.full((num_images,), self.num_classes, device=self.device)
        return Cache(self, labels, self.order if order is None else order)

    def next_logits(self, state: Cache, token: Tensor | None) -> Tensor:
        """One token through all blocks, attending to the cached keys and values of those before it."""
        return state.step(token)


class Cache:
    """What sampling remembers: keys and values, allocated once, and the weights laid out for one-token steps.

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
            return matrix.t().contiguous() if len(labels) < 4 else matrix.t()

        self.rank = 0
        self.label, self.start = model.class_embedding(labels), model.start_embedding
        self.token_embedding, self.positions = weight, model.positions(order).movedim(-2, 0)  # (N, [B,] dim)
        turns = torch.view_as_complex(model.turns(order).to(self.exact)).unsqueeze(-2) * width**0.5
        self.turns = turns.movedim(-4, 0).contiguous()  # (N, [B,] 2, 1, width / 2)
        self.layers = []
        for block in model.blocks:
            gains = torch.stack([block.gain, torch.ones_like(block.gain)]).to(self.exact)  # of queries and keys
            cache = weight.new_empty(len(labels), 2, heads, len(model.grid), width)
            weights = (pack(block.qkv.weight, block.attention_norm), pack(block.project.weight),
                       pack(block.gate_up.weight, block.mlp_norm), pack(block.down.weight))  # fmt: skip
            # An order for all is folded in once; an order per image at each step, or the table would fill a cache.
            self.layers.append((self.turns * gains if order.ndim == 1 else gains, cache, *weights))
        self.folded = order.ndim == 1
        self.head = pack(model.head.weight, model.norm)

    def direction(self, x: Tensor) -> Tensor:
        """`x` scaled to unit length along its last axis: its RMS norm but for a factor, which the weights hold."""
        return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.exact).clamp_min_(TINY)).to(x.dtype)

    def step(self, token: Tensor | None) -> Tensor:
        """Logits `(B, vocab_size)` of the next position, given the last one's `token` `(B,)`."""
        rank, split = self.rank, self.split
        x = self.start if token is None else self.token_embedding.index_select(0, token)
        x = x + self.label + self.positions[rank]
        for gains, cache, qkv_weight, project, gate_up, down in self.layers:
            turn = gains[rank] if self.folded else self.turns[rank] * gains
            qkv = torch.mm(self.direction(x), qkv_weight).view(split).to(self.exact)
            both = qkv[:, :2]  # queries and keys, turned in place
            lengths = torch.linalg.vector_norm(both, dim=-1, keepdim=True).clamp_min_(TINY)
            torch.view_as_complex(both.view(split[0], 2, split[2], -1, 2)).mul_(turn / lengths)
            cache.select(3, rank).copy_(qkv[:, 1:])
            keys, values = cache.narrow(3, 0, rank + 1).unbind(1)
            attended = F.scaled_dot_product_attention(qkv[:, 0].unsqueeze(2).to(x.dtype), keys, values)
            x = torch.addmm(x, attended.view(split[0], -1), project)
            gate, up = torch.mm(self.direction(x), gate_up).chunk(2, 1)
            x = torch.addmm(x, F.silu(gate).mul_(up), down)
        self.rank += 1
        return torch.mm(self.direction(x), self.head)
