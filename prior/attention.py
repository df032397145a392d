"""A transformer block and rotary positions on a grid.

The design follows LlamaGen (Sun et al. 2024): RMSNorm, SwiGLU, no biases, rotary positions on grid coordinates, queries
and keys normalised per head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.layers import FusedLinear
from tokenizer.precision import Constants, at_least_float32

from .masks import AttentionWindow

if TYPE_CHECKING:
    from .transformer import TransformerConfig

EPS = 1e-12  # avoids 0 / 0


class ResidualBranches(nn.Module):
    """The layers of a transformer block, pre-normalised attention and SwiGLU; `inputs` are the attention's linear maps
    to queries, keys and values."""

    def __init__(self, config: TransformerConfig, **inputs: nn.Linear) -> None:
        super().__init__()
        dim, hidden = config.dim, config.hidden or -(-config.dim * 8 // 96) * 32
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim, eps=EPS), nn.RMSNorm(dim, eps=EPS)
        for name, layer in inputs.items():
            self.add_module(name, layer)
        self.gain = nn.Parameter(torch.full((config.heads, 1), 1.2))  # scale of the normalised queries
        self.project = nn.Linear(dim, dim, bias=False)
        self.gate_up = FusedLinear(dim, hidden, parts=2, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def add_branches(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what the heads attended to, `(B, N, heads, width)`, and then the SwiGLU, to the stream `(B, N, dim)`."""
        x = x + self.dropout(self.project(attended.flatten(2)))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


class Block(ResidualBranches):
    """A transformer block on a residual stream `(B, N, dim)`.

    causal: attend only to the position itself and earlier ones. window: attend only to nearby ones."""

    qkv: FusedLinear

    def __init__(self, config: TransformerConfig, *, causal: bool, window: AttentionWindow | None = None) -> None:
        super().__init__(config, qkv=FusedLinear(config.dim, config.dim, parts=3, bias=False))
        self.causal, self.window = causal, window

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        """Map `(B, N, dim)` to the same shape. rotations: of queries and keys, `([B,] N, 2, dim / heads / 2, 2)`."""
        q, k, v = self.queries_keys_values(self.attention_norm(x), rotations)
        return self.add_branches(x, self.attend(q, k, v, self.attention_dropout if self.training else 0.0))

    def queries_keys_values(self, x: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map the normalised stream to rotated queries and keys, and values, `(B, N, heads, width)` each."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(x).chunk(3, -1))
        rotations = rotations.unsqueeze(-4)  # ([B,] N, 1, 2, width / 2, 2): the same for all heads
        q = rotate(unit(q), rotations[..., 0, :, :] * self.gain.unsqueeze(-1)).to(v.dtype)
        return q, rotate(unit(k), rotations[..., 1, :, :]).to(v.dtype), v

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
    """Rotate each pair of `x` (B, N, heads, width) by scaled cos and sin `([B,] N, 1 or heads, width / 2, 2)`."""
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
    return torch.cartesian_prod(*(torch.arange(size, device="cpu") for size in shape)).reshape(-1, len(shape))
