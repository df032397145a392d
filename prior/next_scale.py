"""A transformer that draws an image from coarse to fine: one map of ids per pass, smallest first.

VAR (Tian et al. 2024). The blocks are the scales of a tokenizer with a `multiscale` quantizer. The input of a scale is
the sum of all earlier scales, resized to it, so a position sees the coarser content at its location. By definition of
the model, tokens of one scale are independent given the coarser scales.

The prior learns its own embeddings of ids, which are resized and summed as the quantizer does with codes. Positions of
all scales have coordinates on one map, so rotary positions show which of them overlap."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tokenizer.base import Resize
from tokenizer.layers import FusedLinear

from .attention import EPS, Block, Rotations, coordinates
from .base import Prior
from .condition_encoder import ConditionEmbedding, Encoded
from .orders import Partition
from .transformer import TransformerConfig, reset

Modulation = tuple[Tensor, ...] | None  # scale, shift and gate of a branch, each (B, 1, dim)
Ranges = list[tuple[int, int]]


class NextScaleConfig(TransformerConfig):
    attention: Literal["full", "markov"] = Field(
        "full",
        description="full: a scale attends to itself and to coarser scales; markov: only to itself, so nothing is "
        "cached",
    )
    channels: int = Field(32, ge=1, le=4096, description="width of the ids' embeddings, which are summed over scales")
    adaln: bool = Field(
        False, description="let the class also scale and shift every layer (VAR); false: only add it to the input"
    )

    takes_blocks: ClassVar[bool] = True

    def check(self) -> Iterator[str]:
        if not self.grid.scales:
            shape = "x".join(map(str, self.grid.shape))
            yield f"grid: needs a tokenizer with quantizer.kind=multiscale (got tokens of {shape}, without scales)"
        elif self.order != "raster":
            yield f"order: must be raster, which runs from coarse to fine (got {self.order!r})"
        elif self.blocks is not None:
            yield f"blocks: must be null, because the blocks are the tokenizer's scales (got {list(self.blocks)})"
        else:
            yield from super().check()

    def partition(self) -> Partition:
        blocks = tuple(height * width for height, width in self.grid.scales)
        return Partition(torch.arange(len(self.grid), device="cpu"), blocks)


class NextScale(Prior, name="next_scale"):
    """Attention within a scale and to coarser scales."""

    Config = NextScaleConfig

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__(config)
        dim, scales = config.dim, config.grid.scales
        ends = [0, *accumulate(self.blocks)]
        self.ranges = list(zip(ends, ends[1:], strict=False))
        self.token_embedding = nn.Embedding(config.grid.vocab_size, config.channels)
        self.class_embedding = ConditionEmbedding(config, dim)
        self.start_embedding = nn.Parameter(torch.empty(1, dim))
        self.positions = nn.Parameter(torch.empty(len(config.grid), dim))
        self.resize = Resize(scales)
        self.lift = nn.Linear(config.channels, dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Any = nn.ModuleList(ScaleBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, config.grid.vocab_size, bias=False)
        # The centre of each position in coordinates of the largest scale.
        ratios = [torch.tensor(scales[-1], device="cpu") / torch.tensor(sides, device="cpu") for sides in scales]
        centres = [(coordinates(sides) + 0.5) * by - 0.5 for sides, by in zip(scales, ratios, strict=True)]
        self.rotations = Rotations(config, torch.cat(centres))
        reset(self, self.layers)
        for name, parameter in self.layers.named_parameters():
            if "modulate" in name:  # initially there is no modulation
                nn.init.zeros_(parameter)
        nn.init.normal_(self.lift.weight, std=config.channels**-0.5)  # the ids' embedding is already small

    def outputs(self, tokens: Tensor, encoded: Encoded) -> Tensor:
        label = self.class_embedding(encoded)
        canvas, inputs = None, []
        for k, ids in enumerate(self.resize.split(tokens.long())):
            inputs.append(self.scale_inputs(canvas, k, len(tokens)))
            canvas = self.add_scale(canvas, ids, k) if k + 1 < len(self.blocks) else None
        x = self.dropout(torch.cat(inputs, 1) + self.positions + self.class_embedding.at_positions(encoded))
        for layer in self.layers:
            x = layer(x, self.position_rotations, label, self.ranges)
        return self.head(self.norm(x))

    @property
    def position_rotations(self) -> Tensor:
        return self.rotations.table[:, None].expand(-1, 2, -1, -1)

    def scale_inputs(self, canvas: Tensor | None, k: int, count: int) -> Tensor:
        """Return the inputs `(B, h w, dim)` of scale `k`, given the sum of earlier scales."""
        if canvas is None:
            return self.start_embedding.expand(count, self.blocks[k], -1)
        return self.lift(self.resize.down(canvas, k).flatten(2).transpose(1, 2))

    def add_scale(self, canvas: Tensor | None, ids: Tensor, k: int) -> Tensor:
        """Return the sum `(B, channels, H, W)` with scale `k`, whose `ids` are `(B, h, w)`."""
        added = self.resize.up(self.token_embedding(ids).movedim(-1, 1), k)
        return added if canvas is None else canvas + added

    @property
    def feature_modules(self) -> list[nn.Module]:
        return list(self.layers)

    def make_cache(self, encoded: Encoded, partition: Partition | None) -> Cache:
        return Cache(self, encoded)


class ScaleBlock(Block):
    """A transformer block in which a scale attends to itself and coarser scales, or only to itself."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__(config, causal=False)
        self.markov = config.attention == "markov"
        self.modulate = FusedLinear(config.dim, config.dim, parts=6) if config.adaln else None

    def forward(  # type: ignore[override]
        self, x: Tensor, rotations: Tensor, label: Tensor, ranges: Ranges, cached: Tensor | None = None
    ) -> Tensor:
        """Map `(B, n, dim)` to the same shape. label: `(B, dim)`; ranges: begin and end of each scale of `x` among all
        tokens; cached: keys and values `(2, B, heads, N, width)` of the scales so far, into which those of `x` are
        written."""
        attention, mlp = None, None
        if self.modulate is not None:
            six = self.modulate(F.silu(label))[:, None].chunk(6, -1)
            attention, mlp = six[:3], six[3:]
        heads = self.queries_keys_values(scale_and_shift(self.attention_norm(x), attention), rotations)
        q, k, v = (each.transpose(1, 2) for each in heads)
        attended = self.attend_scales(q, k, v, ranges, cached)
        x = x + apply_gate(self.dropout(self.project(attended.transpose(1, 2).flatten(2))), attention)
        gate, up = self.gate_up(scale_and_shift(self.mlp_norm(x), mlp)).chunk(2, -1)
        return x + apply_gate(self.dropout(self.down(F.silu(gate) * up)), mlp)

    def attend_scales(self, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, cached: Tensor | None) -> Tensor:
        """Attend scale by scale, which needs no mask; tensors are `(B, heads, n, width)`."""
        first, last = ranges[0][0], ranges[-1][1]
        origin = first
        if cached is not None:
            cached[..., first:last, :] = torch.stack([k, v])
            (k, v), origin = cached, 0
        dropout, parts = self.attention_dropout if self.training else 0.0, []
        for begin, end in ranges:
            seen = slice((begin if self.markov else 0) - origin, end - origin)
            queries = q[:, :, begin - first : end - first]
            parts.append(F.scaled_dot_product_attention(queries, k[:, :, seen], v[:, :, seen], dropout_p=dropout))
        return torch.cat(parts, 2)


class Cache:
    """The sum of the scales so far and, unless markov, their keys and values."""

    def __init__(self, model: NextScale, encoded: Encoded) -> None:
        heads, weight = model.config.heads, model.head.weight
        shape = (2, len(encoded), heads, len(model.grid), model.config.dim // heads)
        self.model, self.k = model, 0
        self.canvas: Tensor | None = None
        self.label, self.rotations = model.class_embedding(encoded), model.position_rotations
        self.labels = model.class_embedding.at_positions(encoded).expand(-1, len(model.grid), -1)
        self.keys_values = [None if layer.markov else weight.new_empty(shape) for layer in model.layers]

    def step(self, tokens: Tensor | None) -> Tensor:
        """Return logits `(B, n, vocab_size)` of the next scale, given the last one's `tokens` `(B, m)`."""
        model, (begin, end) = self.model, self.model.ranges[self.k]
        if tokens is not None:
            ids = tokens.unflatten(1, model.grid.scales[self.k - 1])
            self.canvas = model.add_scale(self.canvas, ids, self.k - 1)
        inputs = model.scale_inputs(self.canvas, self.k, len(self.label))
        x = inputs + model.positions[begin:end] + self.labels[:, begin:end]
        for layer, cached in zip(model.layers, self.keys_values, strict=True):
            x = layer(x, self.rotations[begin:end], self.label, [(begin, end)], cached)
        self.k += 1
        return model.head(model.norm(x))


def scale_and_shift(x: Tensor, by: Modulation) -> Tensor:
    return x if by is None else x * (1 + by[0]) + by[1]


def apply_gate(branch: Tensor, by: Modulation) -> Tensor:
    return branch if by is None else (1 + by[2]) * branch
