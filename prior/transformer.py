"""The sizes and the initial weights of the transformers `gpt`, `masked`, `blocks` and `next_scale`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from .condition_encoder import ColumnProjection, ConditionEncoder
from .config import PriorConfig
from .masks import window_problem

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
        return self.dilation or (1,) * self.depth

    def random_share_at(self, progress: float) -> float:
        """Return the share of images in random orders at `progress`, the share of training (RAR, eq. 4)."""
        begin, end = self.anneal
        left = 1.0 if progress < begin else max(0.0, (end - progress) / max(end - begin, 1e-9))
        return self.random_share + (1 - self.random_share) * left


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
