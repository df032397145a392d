"""The causal transformer over a grid of ids, in any fixed order.

GPT (Radford et al. 2018) as image priors use it (LlamaGen, Sun et al. 2024): RMSNorm, SwiGLU, no biases, rotary
positions on grid coordinates, queries and keys normalised per head. The input at rank r is the token of rank r - 1
(the class at rank 0) plus the embedding of the position to be predicted, so the model is told where it is going.
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

EPS = 1e-6
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

    def check(self) -> Iterator[str]:
        """Heads have to be of an even width, and the order has to exist."""
        yield from super().check()
        if self.dim % (2 * self.heads):
            yield f"heads: dim must be a multiple of 2 * heads (got dim {self.dim}, heads {self.heads})"
        elif len(self.grid) * self.dim // self.heads > MAX_ROTATIONS:
            yield f"heads: a grid of {len(self.grid)} tokens and heads of width {self.dim // self.heads} are too large"


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

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:  # (B, N, dim), (N, 2, dim / heads / 2, 2)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, heads, width)
        q = rotate(unit(q) * self.gain, rotations[:, 0]).to(v.dtype)
        k = rotate(unit(k), rotations[:, 1]).to(v.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


def unit(x: Tensor) -> Tensor:
    """`x` scaled to a root mean square of 1 along its last axis, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=EPS)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of `x` (B, N, heads, width) by its position's angle; rotation: (N, width / 2, 2), cos and sin."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation[:, None].unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class GPT(Prior, name="gpt"):
    """Masked self-attention over the tokens in `order`, with a cache for sampling."""

    Config = GPTConfig
    rotations: Tensor
    ranks: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        dim, hidden = config.dim, config.hidden or -(-config.dim * 8 // 96) * 32
        self.token_embedding = nn.Embedding(config.grid.vocab_size, dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)  # the last is the null class
        self.start_embedding = nn.Parameter(torch.empty(1, dim))
        self.axis_embeddings = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in config.grid.shape)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks: Any = nn.ModuleList(Block(config, hidden) for _ in range(config.depth))
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, config.grid.vocab_size, bias=False)
        self.register_buffer("rotations", self._rotations(), persistent=False)
        self.register_buffer("ranks", torch.argsort(self.order), persistent=False)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim == 2 and parameter.shape[1] > 1:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:  # branches start small, so that depth does not blow the residual stream up (GPT-2)
            for layer in (block.project, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * len(self.blocks)) ** 0.5)

    def _coordinates(self) -> Tensor:
        """Grid coordinates `(N, axes)` of the order's positions."""
        return torch.stack(torch.unravel_index(self.order, self.grid.shape), -1)

    def _rotations(self) -> Tensor:
        """cos and sin per rank for queries (where the next token goes) and keys (where the last one stands):
        `(N, 2, width / 2, 2)`, the pairs of a head shared out among the axes (2-D RoPE)."""
        targets = self._coordinates().float()
        sources = torch.cat([targets.new_full((1, targets.shape[1]), -1.0), targets[:-1]])
        pairs = self.config.dim // self.config.heads // 2
        axis = torch.arange(pairs, device="cpu") % targets.shape[1]
        step = torch.arange(pairs, device="cpu") // targets.shape[1]
        frequency = self.config.rope_base ** (-step / max(1, -(-pairs // targets.shape[1])))
        angles = torch.stack([targets, sources], 1)[..., axis] * frequency
        return torch.stack([angles.cos(), angles.sin()], -1)

    def _position_embedding(self) -> Tensor:
        """`(N, dim)` in the order: the sum of each target's embedding along every axis."""
        coordinates = torch.unravel_index(self.order, self.grid.shape)
        return sum(table[at] for table, at in zip(self.axis_embeddings, coordinates, strict=True))

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Teacher-forced logits `(B, N, vocab_size)`, raster order; `logits[:, i]` sees only tokens ranked before i."""
        if labels is None:
            labels = torch.full((len(tokens),), self.num_classes, device=tokens.device)
        walked = tokens.flatten(1)[:, self.order[:-1]].long()
        label = self.class_embedding(labels)[:, None]
        inputs = torch.cat([self.start_embedding.expand_as(label), self.token_embedding(walked)], 1)
        x = self.dropout(inputs + label + self._position_embedding())
        for block in self.blocks:
            x = block(x, self.rotations)
        return self.head(self.norm(x))[:, self.ranks]

    def start(self, num_images: int, labels: Tensor | None) -> Cache:
        """Allocate the cache once, and lay the weights out for one-token steps."""
        if labels is None:
            labels = torch.full((num_images,), self.num_classes, device=self.device)
        return Cache(self, labels)

    def next_logits(self, state: Cache, token: Tensor | None) -> Tensor:
        """One token through all blocks, attending to the cached keys and values of those before it."""
        return state.step(token)


class Cache:
    """What sampling remembers: keys and values, allocated once, and the weights laid out for one-token steps.

    Norm scales are folded into the matrices that follow them, a head's gain into its rotation. With few rows a step is
    bound by reading weights, and `(in, out)` contiguous ones read fastest; from four rows on `(out, in)` ones do.
    """

    def __init__(self, model: GPT, labels: Tensor) -> None:
        heads, width = model.config.heads, model.config.dim // model.config.heads
        size = (2, len(labels), heads, len(model.grid), width)
        weight = model.token_embedding.weight

        def pack(matrix: Tensor, scale: Tensor | None = None) -> Tensor:
            matrix = matrix if scale is None else matrix * scale
            return matrix.t().contiguous() if len(labels) < 4 else matrix.t()

        self.rank, self.dim = 0, model.config.dim
        self.label, self.start = model.class_embedding(labels), model.start_embedding
        self.token_embedding, self.positions = weight, model._position_embedding()
        turns = torch.view_as_complex(model.rotations.float())[:, :, None]  # (N, 2, 1, width / 2)
        self.layers = []
        for block in model.blocks:
            gains = torch.stack([block.gain, torch.ones_like(block.gain)]).float()  # of queries and keys
            self.layers.append((
                pack(block.qkv.weight, block.attention_norm.weight), turns * gains, weight.new_empty(size),
                pack(block.project.weight), pack(block.gate_up.weight, block.mlp_norm.weight), pack(block.down.weight),
            ))  # fmt: skip
        self.head = pack(model.head.weight, model.norm.weight)
        self.split = (3, heads, width)

    def step(self, token: Tensor | None) -> Tensor:
        """Logits `(B, vocab_size)` of the next position, given the last one's `token` `(B,)`."""
        rank, shape = self.rank, (self.dim,)
        x = self.start if token is None else F.embedding(token, self.token_embedding)
        x = x + self.label + self.positions[rank]
        for qkv_weight, turns, cache, project, gate_up, down in self.layers:
            qkv = torch.mm(F.rms_norm(x, shape, eps=EPS), qkv_weight).unflatten(1, self.split)
            pairs = F.rms_norm(qkv[:, :2].float(), (self.split[2],), eps=EPS).unflatten(-1, (-1, 2))
            turned = torch.view_as_real(torch.view_as_complex(pairs) * turns[rank]).flatten(-2).to(x.dtype)
            cache[0, :, :, rank] = turned[:, 1]
            cache[1, :, :, rank] = qkv[:, 2]
            keys, values = cache[:, :, :, : rank + 1]
            attended = F.scaled_dot_product_attention(turned[:, 0].unsqueeze(2), keys, values)
            x = torch.addmm(x, attended.flatten(1), project)
            gate, up = torch.mm(F.rms_norm(x, shape, eps=EPS), gate_up).chunk(2, 1)
            x = torch.addmm(x, F.silu(gate).mul_(up), down)
        self.rank += 1
        return torch.mm(F.rms_norm(x, shape, eps=EPS), self.head)
