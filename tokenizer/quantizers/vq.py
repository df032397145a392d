"""A codebook moved by gradients (van den Oord et al. 2017, equation 3).

The codebook loss |sg(z) - e|^2 pulls codes to vectors with weight 1; beta weighs the commitment |z - sg(e)|^2 that
pulls vectors to codes. (Several public codebases have beta on the wrong one of the two.) A code that is nobody's
nearest gets no gradient and would stay where it is for ever, so codes that are hardly used are revived.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .codebook import CodebookConfig, CountedCodebook, world_size
from .steps import Taken, moved_if


class VQConfig(CodebookConfig):
    """When a code counts as dead."""

    decay: float = Field(0.9, ge=0, lt=1, description="decay of the running counts of use, per training step")
    revive_below: float = Field(
        0.05, ge=0, lt=1, description="a code used less than this share of the mean use is revived"
    )
    revive_every: int = Field(10, ge=1, description="training steps between looking for dead codes")


class VQ(CountedCodebook, name="vq"):
    """Codes are parameters."""

    Config = VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.codebook = nn.Parameter(
            torch.empty(config.codes, config.dim).uniform_(-1 / config.codes, 1 / config.codes)
        )
        self.register_buffer("counts", torch.zeros(config.codes))

    @property
    def loss_weights(self) -> dict[str, float]:
        """1 for the codebook loss, beta for the commitment."""
        return {"codebook": 1.0, "commitment": self.config.beta}

    def losses(self, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Means over elements of |sg(z) - e|^2 and |z - sg(e)|^2."""
        return {"codebook": F.mse_loss(codes, rows.detach()), "commitment": F.mse_loss(rows, codes.detach())}

    def move(self, taken: Taken) -> None:
        """Put each dead code on a vector of the step, as if of mean use."""
        assert self.used is not None
        if world_size() > 1:
            dist.all_reduce(self.used)
        self.counts.lerp_(moved_if(taken, self.used, self.counts), 1 - self.config.decay)
        if self.candidates:
            dead, vectors = self.dead_codes()
            self.codebook[dead] = vectors
            self.counts[dead] = self.counts.mean()
