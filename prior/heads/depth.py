"""The ids of a position from coarse to fine, without longer sequences: a small network beside the large one.

RQ-Transformer (Lee et al. 2022, arXiv:2203.01941, section 3.2.2): the large network sees a position as the sum of its
ids' embeddings and runs once for all of its ids; a small one draws them one after the other. As in the paper, its input
at a level is what the large network puts out, plus the sum of the embeddings of the ids drawn already. In the paper it
attends to its inputs at the levels before, too; here it does not: the sum holds the same ids, and a step needs no
memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tokenizer.base import TokenGrid
from tokenizer.config import ModelConfig

from .base import Head

EPS = 1e-12


class DepthConfig(ModelConfig):
    """Sizes of the small network."""

    dim: int = Field(128, ge=1, le=16384, description="its width")
    layers: int = Field(2, ge=1, le=64, description="number of its gated layers")
    hidden: int | None = Field(None, ge=1, le=65536, description="width inside a layer; null: twice dim")


class Layer(nn.Module):
    """SwiGLU, normalised before and added to the stream `(..., dim)`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.gate_up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns `(..., dim)`."""
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Depth(Head, name="depth"):
    """One network for all levels, which is told the level, and shares its last layer among them."""

    Config = DepthConfig

    def __init__(self, config: DepthConfig, grid: TokenGrid) -> None:
        super().__init__(config, grid)
        self.size = dim = config.dim
        self.id_embeddings: Any = nn.ParameterList(
            torch.empty(grid.vocab_size, dim).normal_(std=0.1) for _ in range(self.together - 1)
        )
        self.level_embedding = nn.Parameter(torch.empty(self.together, dim).normal_(std=0.1))
        self.layers: Any = nn.ModuleList(Layer(dim, config.hidden or 2 * dim) for _ in range(config.layers))
        self.norm, self.head = nn.RMSNorm(dim, eps=EPS), nn.Linear(dim, grid.vocab_size, bias=False)

    @classmethod
    def problem(cls, config: DepthConfig, grid: TokenGrid) -> str | None:
        """A position has several ids."""
        if grid.together > 1:
            return None
        return (
            "depth is for grids of several ids at a position (rvq, klvae, posthoc, lfq and bsq of several levels, "
            "pixels in colour), and this grid has one"
        )

    def logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """All levels at once."""
        before = [torch.zeros_like(outputs)]
        for table, level in zip(self.id_embeddings, ids.unbind(-1), strict=False):
            before.append(before[-1] + F.embedding(level, table))
        return self.read(outputs.unsqueeze(-2) + torch.stack(before, -2) + self.level_embedding)

    def next_logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """The next level alone."""
        before = torch.zeros_like(outputs)
        for table, level in zip(self.id_embeddings, ids.unbind(-1), strict=False):
            before = before + F.embedding(level, table)
        return self.read(outputs + before + self.level_embedding[ids.shape[-1]])

    def read(self, x: Tensor) -> Tensor:
        """Logits `(..., vocab_size)` of the sum of all inputs, `(..., dim)`."""
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
