"""A codebook in which each code is the running mean of its nearest vectors (van den Oord et al. 2017, appendix A.1).

Counts and sums are summed over ranks, so all ranks hold bitwise equal codebooks. Rarely used codes are revived at
vectors of the current batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .codebook import CountedCodebook, CountedConfig
from .price import uses
from .updates import sum_over_ranks

UNUSED = 1e-3  # a smaller running count is that of a code without vectors


class EMAConfig(CountedConfig):
    decay: float = Field(
        0.9, ge=0, lt=1, description="decay of the running means per training batch; long runs can use 0.99"
    )


class EMA(CountedCodebook, name="ema"):
    """A codebook of running means: codebook = sums / counts, with Laplace smoothing."""

    Config = EMAConfig
    sums: Tensor

    def __init__(self, config: EMAConfig) -> None:
        super().__init__(config)
        self.register_buffer("codebook", torch.randn(config.codes, config.dim))
        self.register_buffer("counts", torch.zeros(config.codes))
        self.register_buffer("sums", torch.zeros(config.codes, config.dim))

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"commitment": self.config.beta}

    def losses(self, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
        return {"commitment": F.mse_loss(rows, codes)}

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        super().start(rows)
        self.sums.copy_(self.codebook * self.counts.unsqueeze(1))

    @torch.no_grad()
    def move_to_means(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """See `CountedCodebook`. Counts stay, and sums follow the codes, so that training can continue from them."""
        counts = super().move_to_means(parts)
        self.sums.copy_(self.codebook * self.counts.unsqueeze(1))
        return counts

    def update(self, rows: Tensor, tokens: Tensor, overpaying: Tensor | None = None) -> None:  # type: ignore[override]
        """Update N <- decay N + (1 - decay) n;  m <- decay m + (1 - decay) sum z;  e = m / N. Non-finite batches are
        ignored."""
        sums = torch.zeros_like(self.sums).index_add_(0, tokens, rows)
        totals = sum_over_ranks(torch.cat([sums, uses(tokens, self.vocab_size).float().unsqueeze(1)], 1))
        finite, weight = torch.isfinite(totals).all(), 1 - self.config.decay
        self.counts.lerp_(torch.where(finite, totals[:, -1], self.counts), weight)  # lerp to itself: no change
        self.sums.lerp_(torch.where(finite, totals[:, :-1], self.sums), weight)
        total = self.counts.sum()
        smoothed = (self.counts + 1e-5) * (total / (total + self.vocab_size * 1e-5))
        # With a price, a code without vectors stays where it was: smoothing would move it to the origin.
        moves = finite if overpaying is None else finite & (self.counts > UNUSED).unsqueeze(1)
        self.codebook.copy_(torch.where(moves, self.sums / smoothed.unsqueeze(1), self.codebook))
        if self.revives(self.step) and bool(finite):
            dead, vectors = self.dead_codes(rows, overpaying)
            mean = self.counts.mean()
            self.codebook[dead], self.counts[dead], self.sums[dead] = vectors, mean, vectors * mean
        super().update()
