"""SimVQ (Zhu et al. 2024, arXiv:2411.02038): codes are a frozen table seen through one learned linear map, e = W c + b.

Only the map learns, so a gradient that one code receives moves all of them: none is left behind as the vectors move
on, which is how a codebook of free codes (`vq`) collapses. The paper's table is random. Ours comes from k-means over
the first batch, and the map starts as the identity: where vectors lie in clusters, most codes of a random table start
far from them all, and as they move together they stay there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codebook import Codebook, CodebookConfig


class SimVQConfig(CodebookConfig):
    """What every codebook is told."""


class SimVQ(Codebook, name="simvq"):
    """`codebook` (codes, dim) does not change once it has started; what is compared and looked up is `table()`."""

    Config = SimVQConfig
    map: nn.Linear

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__(config)
        self.register_buffer("codebook", torch.randn(config.codes, config.dim) * config.dim**-0.5)
        self.map = nn.Linear(config.dim, config.dim)
        nn.init.eye_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    @property
    def loss_weights(self) -> dict[str, float]:
        """1 for the codebook loss, beta for the commitment."""
        return {"codebook": 1.0, "commitment": self.config.beta}

    def table(self) -> Tensor:
        """The mapped codes, (codes, dim), of length 1 with `normalize`. Always in float32: `lookup` may be called
        under autocast."""
        with torch.autocast(self.codebook.device.type, enabled=False):
            return self.comparable(self.map(self.codebook))

    def losses(self, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Means over elements of |sg(z) - e|^2, which teaches the map, and |z - sg(e)|^2."""
        return {"codebook": F.mse_loss(codes, rows.detach()), "commitment": F.mse_loss(rows, codes.detach())}
