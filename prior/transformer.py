"""The transformer shared by `gpt`, `masked`, `blocks` and `next_scale`: sizes, block and rotary positions.

The design follows LlamaGen (Sun et al. 2024): RMSNorm, SwiGLU, no biases, rotary positions on grid coordinates, queries
and keys normalised per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tokenizer.layers import FusedLinear
from tokenizer.precision import Constants, at_least_float32

from .base import PriorConfig
from .condition_encoder import ConditionEncoder
from .conditions import ColumnProjection
from .masks import Window, window_problem

EPS = 1e-12  # avoids 0 / 0
Reach = Annotated[int, Field(le=1 << 20)]
MAX_ROTATIONS = 1 << 24  # positions times head width, the size of the rotation table


class TransformerConfig(PriorConfig):
    """Sizes of the transformer."""

    takes_conditions = True

    dim: int = Field(128, ge=8, le=16384, description="width of the residual stream")
    depth: int = Field(4, ge=1, le=256, description="number of transformer blocks")
    heads: int = Field(4, ge=1, le=256, description="number of attention heads; 2 * heads must divide dim")
    hidden: int | None = Field(
        None, ge=8, le=65536, description="width of the SwiGLU layer; null: 8/3 dim, rounded up to a multiple of 32"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the embeddings and on each residual branch")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the attention weights")
    rope_base: float = Field(
        100.0,
        gt=1,
        description="base of the rotary wavelengths: 2 pi base^(k/K) cells for k from 0 to K - 1, with K frequencies "
        "per axis",
    )

    def check(self) -> Iterator[str]:
        """Check that heads have an even width and the rotation table is not too large."""
        yield from super().check()
        if self.dim % (2 * self.heads):
            yield f"heads: dim must be a multiple of 2 * heads (got dim {self.dim}, heads {self.heads})"
        elif (cells := len(self.positions)) * self.dim // self.heads > MAX_ROTATIONS:
            yield f"heads: a grid of {cells} positions is too large for heads of width {self.dim // self.heads}"


class OrderedConfig(TransformerConfig):
    """Sizes of the transformer, its training orders and its attention window."""

    takes_heads = takes_positions = True

    any_order: bool = Field(
        False, description="also train in random orders, to score, sample and complete in any order"
    )
    anneal: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.5, 0.75),
        description="with any_order: between these fractions of training, random orders fall from all to random_share",
    )
    random_share: float = Field(
        0.5, ge=0, le=1, description="with any_order: share of images in random orders after annealing"
    )
    window: tuple[Reach, ...] | None = Field(
        None,
        min_length=2,
        max_length=3,
        description="[rows, columns], of clips [frames, rows, columns]: in each layer, attention sees only earlier "
        "tokens within this distance of the predicted cell; null: all earlier tokens",
    )
    dilation: tuple[Annotated[Reach, Field(ge=1)], ...] | None = Field(
        None,
        description="dilation d of each layer's window: every d-th cell along each axis, d times as far; null: 1 for "
        "all layers",
    )

    def check(self) -> Iterator[str]:
        """Check the annealing interval, and that a window fits the grid and has a fixed order."""
        yield from super().check()
        if len(self.anneal) != 2 or self.anneal[0] > self.anneal[1]:
            yield f"anneal: expected two ascending shares (got {list(self.anneal)})"
        if self.any_order and self.head is not None and self.grid.ids_per_position > 1:
            yield f"any_order: cannot be combined with head {self.head.kind!r} of several ids at a position"
        if self.window is None:
            if self.dilation is not None:
                yield f"dilation: needs a window (got {list(self.dilation)})"
            return
        if self.dilation is not None and len(self.dilation) != self.depth:
            yield f"dilation: expected {self.depth} values, one per layer (got {list(self.dilation)})"
        if self.any_order:
            yield "window: cannot be combined with any_order"
        if problem := window_problem(self.window, self.dilations, self.positions.shape):
            yield f"window: {problem}"

    @property
    def dilations(self) -> tuple[int, ...]:
        """The dilation of each layer's window."""
        return self.dilation or (1,) * self.depth

    def random_share_at(self, progress: float) -> float:
        """Return the share of images in random orders at `progress`, the completed fraction of training (RAR, eq.
        4)."""
        begin, end = self.anneal
        left = 1.0 if progress < begin else max(0.0, (end - progress) / max(end - begin, 1e-9))
        return self.random_share + (1 - self.random_share) * left


class Block(nn.Module):
    """Pre-normalised attention and SwiGLU on a residual stream `(B, N, dim)`.

    causal: attend only to the position itself and earlier ones. window: attend only to nearby ones.
    """

    def __init__(self, config: TransformerConfig, *, causal: bool, window: Window | None = None) -> None:
        super().__init__()
        self.window = window
        dim, hidden = config.dim, config.hidden or -(-config.dim * 8 // 96) * 32
        self.causal, self.heads, self.attention_dropout = causal, config.heads, config.attention_dropout
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim, eps=EPS), nn.RMSNorm(dim, eps=EPS)
        self.qkv = FusedLinear(dim, dim, parts=3, bias=False)
        self.gain = nn.Parameter(torch.full((config.heads, 1), 1.2))  # scale of the normalised queries
        self.project = nn.Linear(dim, dim, bias=False)
        self.gate_up = FusedLinear(dim, hidden, parts=2, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        """Map `(B, N, dim)` to the same shape. rotations: of queries and keys, `([B,] N, 2, dim / heads / 2, 2)`."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(self.attention_norm(x)).chunk(3, -1))
        rotations = rotations.unsqueeze(-4)  # ([B,] N, 1, 2, width / 2, 2): the same for all heads
        q = rotate(unit(q), rotations[..., 0, :, :] * self.gain.unsqueeze(-1)).to(v.dtype)
        k = rotate(unit(k), rotations[..., 1, :, :]).to(v.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        x = x + self.dropout(self.project(self.attend(q, k, v, dropout).flatten(2)))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Attend; inputs and output are `(B, N, heads, width)`."""
        if self.window is not None:
            return self.window.attend(q, k, v, dropout)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=dropout).transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    """Scale `x` to a root mean square of 1 along its last axis, in float32 or float64."""
    return F.rms_norm(at_least_float32(x), x.shape[-1:], eps=EPS)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate and scale each pair of `x` (B, N, heads, width): `rotations` ([B,] N, 1 or heads, width / 2, 2) holds cos
    and sin times the scale."""
    pairs = x.unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():  # a complex product makes a single pass over memory
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations)).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), rotations.unbind(-1)  # the compiler does not support complex numbers
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Rotations(Constants):
    """Rotary positions (RoPE along each axis): cos and sin of each cell's angles, `(cells, width / 2, 2)`. The pairs of
    a head are divided among the axes. The table stays float32 or float64, whatever the type of the weights."""

    table: Tensor

    def __init__(self, config: TransformerConfig, cells: Tensor) -> None:
        """cells: coordinates `(cells, axes)`."""
        super().__init__()
        pairs, axes = config.dim // config.heads // 2, cells.shape[1]
        at = torch.arange(pairs, device="cpu")
        angles = cells.float()[:, at % axes] * config.rope_base ** (-(at // axes) / max(1, -(-pairs // axes)))
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()], -1), persistent=False)


def coordinates(shape: tuple[int, ...]) -> Tensor:
    """Return the coordinates `(N, axes)` of a grid's cells, raster order."""
    return torch.cartesian_prod(*(torch.arange(size, device="cpu") for size in shape)).reshape(-1, len(shape))


def reset(model: nn.Module, blocks: Any) -> None:
    """Initialize weights with standard deviation 0.02, and smaller at the end of each branch, so that the residual
    stream does not grow with depth (GPT-2). Encoded columns keep their own initialization."""
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.shape[1] > 1:
            nn.init.normal_(parameter, std=0.02)
    for block in blocks:
        for layer in (block.project, block.down):
            nn.init.normal_(layer.weight, std=0.02 / (2 * len(blocks)) ** 0.5)
    for module in model.modules():
        if isinstance(module, (ConditionEncoder, ColumnProjection)):
            module.reset_parameters()
