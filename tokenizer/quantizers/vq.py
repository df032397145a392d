"""A codebook moved by gradients (van den Oord et al. 2017, equation 3).

The codebook loss |sg(z) - e|^2 pulls codes to vectors with weight 1; beta weighs the commitment |z - sg(e)|^2 that
pulls vectors to codes. (Several public codebases have beta on the wrong one of the two.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codebook import Codebook, CodebookConfig


class VQ(Codebook, name="vq"):
    """Codes are parameters."""

    class Config(CodebookConfig):
        """Nothing beyond a codebook."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        self.codebook = nn.Parameter(
            torch.empty(config.codes, config.dim).uniform_(-1 / config.codes, 1 / config.codes)
        )

    @property
    def loss_weights(self) -> dict[str, float]:
        """1 for the codebook loss, beta for the commitment."""
        return {"codebook": 1.0, "commitment": self.config.beta}

    def losses(self, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Means over elements of |sg(z) - e|^2 and |z - sg(e)|^2."""
        return {"codebook": F.mse_loss(codes, rows.detach()), "commitment": F.mse_loss(rows, codes.detach())}
