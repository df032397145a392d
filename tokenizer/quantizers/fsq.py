"""Finite scalar quantization (Mentzer et al. 2023): round each channel to a few levels, without a codebook or a loss.

For an even number of levels L the bounded channel is shifted by half a level, and a shift inside the tanh maps z = 0 to
0. This code uses the exact inverse, atanh(offset / reach), where the paper's code (appendix A) uses tan, and a reach of
(L - 1) (1 + 1e-3) / 2, where the paper has (L - 1) (1 - 1e-3) / 2. Ids can therefore differ from the paper's near the
border of two levels. Ids decode to the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..config import ModelConfig
from .base import Quantized, Quantizer
from .gradients import straight_through


class FSQConfig(ModelConfig):
    levels: tuple[Annotated[int, Field(ge=3, le=256)], ...] = Field(
        (8, 8, 8), min_length=1, description="levels of each channel (paper: 5 or more); the product is the vocabulary"
    )

    def check(self) -> Iterator[str]:
        if math.prod(self.levels) > 1 << 18:
            yield f"levels: their product must be at most {1 << 18} (got {math.prod(self.levels)})"


class FSQ(Quantizer, name="fsq"):
    """Bounds each channel by a tanh and rounds it to one of its levels; the id is the mixed-radix number of these
    levels."""

    Config = FSQConfig
    sizes: Tensor
    radix: Tensor

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config)
        self.dim, self.vocab_size = len(config.levels), math.prod(config.levels)
        sizes = torch.tensor(config.levels, device="cpu")
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("radix", torch.cumprod(torch.cat([sizes.new_ones(1), sizes[:-1]]), 0), persistent=False)

    def _quantize(self, z: Tensor) -> Quantized:
        bounded = self._bound(z.movedim(1, -1))
        rounded = straight_through(bounded, bounded.round())
        half = self.sizes // 2
        digits = (rounded.detach().long() + half).clamp(min=0)  # NaN converts to the smallest integer
        tokens = (digits * self.radix).sum(-1)
        return Quantized((rounded / half).movedim(-1, 1), tokens, {})

    def _bound(self, z: Tensor) -> Tensor:
        """Map into (-L/2, L/2), shifted by half a level for even L, so that rounding gives exactly L values."""
        reach = (self.sizes - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.sizes % 2 == 0, 0.5, 0.0)
        return (z + torch.atanh(offset / reach)).tanh() * reach - offset

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        half = self.sizes // 2
        digits = tokens.unsqueeze(-1) // self.radix % self.sizes
        return ((digits - half).float() / half).movedim(-1, 1)
