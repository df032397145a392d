"""SimVQ (Zhu et al. 2024, arXiv:2411.02038): codes are a learned linear map of a frozen table, e = W c + b.

Only the map learns, so a gradient to one code moves all codes. This prevents the collapse of free codebooks (`vq`),
where codes without gradients fall behind as the vectors move. The paper's table is random. Ours comes from k-means over
the first batch, and the map starts as the identity: most codes of a random table would start far from clustered vectors
and stay there, because all codes move together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .codebook import Codebook, CodebookConfig
from .price import PricedConfig


class SimVQConfig(PricedConfig, CodebookConfig):
    """Settings shared by all codebooks."""


class SimVQ(Codebook, name="simvq"):
    """`codebook` (codes, dim) is frozen after `start`; codes are rows of `table()`."""

    Config = SimVQConfig
    map: nn.Linear

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__(config)
        self.register_buffer("codebook", torch.randn(config.codes, config.dim) * config.dim**-0.5)
        self.map = nn.Linear(config.dim, config.dim)
        nn.init.eye_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def table(self) -> Tensor:
        """Return the mapped codes, (codes, dim), of length 1 with `normalize`; in float32 even under autocast."""
        with torch.autocast(self.codebook.device.type, enabled=False):
            return self.comparable(self.map(self.codebook))
