"""A codebook that learns by gradients (van den Oord et al. 2017, equation 3).

The codebook loss |sg(z) - e|^2 pulls codes to vectors with weight 1; beta weights the commitment |z - sg(e)|^2 that
pulls vectors to codes. (Several public codebases apply beta to the wrong term.) A code that is not nearest to any
vector gets no gradient and would never move again, so rarely used codes are revived.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .codebook import CountedCodebook, CountedConfig
from .price import uses
from .updates import sum_over_ranks


class VQConfig(CountedConfig):
    """Settings of the codebook, and when a code counts as dead."""


class VQ(CountedCodebook, name="vq"):
    """A codebook of parameters."""

    Config = VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.codebook = nn.Parameter(
            torch.empty(config.codes, config.dim).uniform_(-1 / config.codes, 1 / config.codes)
        )
        self.register_buffer("counts", torch.zeros(config.codes))

    def update(self, rows: Tensor, tokens: Tensor, overpaying: Tensor | None = None) -> None:  # type: ignore[override]
        """Update usage counts, and move each dead code to a vector of the batch with the mean count."""
        invalid = torch.isfinite(rows).logical_not().any().float().unsqueeze(0)
        totals = sum_over_ranks(torch.cat([uses(tokens, self.vocab_size).float(), invalid]))
        used, finite = totals[:-1], totals[-1] == 0
        self.counts.lerp_(torch.where(finite, used, self.counts), 1 - self.config.decay)
        if self.revives(self.step) and bool(finite):
            dead, vectors = self.dead_codes(rows, overpaying)
            self.codebook[dead] = vectors
            self.counts[dead] = self.counts.mean()
        super().update()
