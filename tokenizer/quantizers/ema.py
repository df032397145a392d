"""A codebook moved by running means of the vectors it is nearest to (van den Oord et al. 2017, appendix A.1).

Counts and sums are added up over all ranks, so every rank holds the same codebook to the bit. A code that is hardly
used is revived at a vector of the current batch. The codebook moves at every forward
pass in training, so with gradient accumulation at every micro-batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .codebook import Codebook, CodebookConfig, dead_codes, world_size


class EMAConfig(CodebookConfig):
    """How fast the codebook moves, and when a code counts as dead."""

    decay: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="decay of the running counts and sums, per training step; a code that is no longer "
        "used is found dead after some 3 / (1 - decay) steps, and long runs may wait (0.99)",
    )
    revive_below: float = Field(
        0.05, ge=0, lt=1, description="a code used less than this share of the mean use is revived"
    )
    revive_every: int = Field(10, ge=1, description="training steps between looking for dead codes")


class EMA(Codebook, name="ema"):
    """Codes are running means: codebook = sums / counts, with Laplace smoothing."""

    Config = EMAConfig
    counts: Tensor
    sums: Tensor

    def __init__(self, config: EMAConfig) -> None:
        super().__init__(config)
        self.register_buffer("codebook", torch.randn(config.codes, config.dim))
        self.register_buffer("counts", torch.zeros(config.codes))
        self.register_buffer("sums", torch.zeros(config.codes, config.dim))

    @property
    def loss_weights(self) -> dict[str, float]:
        """beta weighs the commitment; the codebook needs no loss."""
        return {"commitment": self.config.beta}

    def losses(self, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Commitment: |z - sg(e)|^2, mean over elements."""
        return {"commitment": F.mse_loss(rows, codes)}

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """k-means, after which every code counts as used equally often."""
        super().start(rows)
        self.counts.fill_(len(rows) * world_size() / self.vocab_size)
        self.sums.copy_(self.codebook * self.counts.unsqueeze(1))

    @torch.no_grad()
    def move(self, rows: Tensor, tokens: Tensor, step: int) -> None:
        """N <- decay N + (1 - decay) n;  m <- decay m + (1 - decay) sum z;  e = m / N."""
        sums = torch.zeros_like(self.sums).index_add_(0, tokens, rows)
        counts = torch.bincount(tokens, minlength=self.vocab_size).float()
        if world_size() > 1:
            both = torch.cat([sums, counts.unsqueeze(1)], 1)
            dist.all_reduce(both)
            sums, counts = both[:, :-1], both[:, -1]
        weight = 1 - self.config.decay
        self.counts.lerp_(counts, weight)
        self.sums.lerp_(sums, weight)
        total = self.counts.sum()
        smoothed = (self.counts + 1e-5) * (total / (total + self.vocab_size * 1e-5))
        torch.div(self.sums, smoothed.unsqueeze(1), out=self.codebook)
        if (step + 1) % self.config.revive_every == 0:
            self._revive(rows, step)

    def _revive(self, rows: Tensor, step: int) -> None:
        """Put each dead code on a vector of the batch, as if of mean use."""
        mean = self.counts.mean()
        dead, vectors = dead_codes(self.counts, self.config.revive_below, rows, self.config.seed, step)
        self.codebook[dead] = vectors
        self.counts[dead] = mean
        self.sums[dead] = vectors * mean
