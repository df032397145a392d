"""A codebook moved by running means of the vectors it is nearest to (van den Oord et al. 2017, appendix A.1).

Counts and sums are added up over all ranks, so every rank holds the same codebook to the bit. A code that is hardly
used is revived at a vector of the current step. The codebook moves once a step (`finish_step`), by all of its
micro-batches together.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .codebook import CodebookConfig, CountedCodebook, world_size
from .steps import Taken, moved_if


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


class EMA(CountedCodebook, name="ema"):
    """Codes are running means: codebook = sums / counts, with Laplace smoothing."""

    Config = EMAConfig
    sums: Tensor

    def __init__(self, config: EMAConfig) -> None:
        super().__init__(config)
        self.register_buffer("codebook", torch.randn(config.codes, config.dim))
        self.register_buffer("counts", torch.zeros(config.codes))
        self.register_buffer("sums", torch.zeros(config.codes, config.dim))
        self.added: Tensor | None = None

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
        self.sums.copy_(self.codebook * self.counts.unsqueeze(1))

    def collect(self, rows: Tensor, tokens: Tensor) -> None:
        """Also add up the rows of each code."""
        super().collect(rows, tokens)
        if self.added is None:
            self.added = torch.zeros_like(self.sums)
        self.added.index_add_(0, tokens, rows)

    def forget(self) -> None:
        """Also drop the sums."""
        super().forget()
        self.added = None

    def move(self, taken: Taken) -> None:
        """N <- decay N + (1 - decay) n;  m <- decay m + (1 - decay) sum z;  e = m / N."""
        assert self.used is not None and self.added is not None
        sums, counts = self.added, self.used
        if world_size() > 1:
            both = torch.cat([sums, counts.unsqueeze(1)], 1)
            dist.all_reduce(both)
            sums, counts = both[:, :-1], both[:, -1]
        weight = 1 - self.config.decay
        self.counts.lerp_(moved_if(taken, counts, self.counts), weight)  # towards itself: it stays, to the bit
        self.sums.lerp_(moved_if(taken, sums, self.sums), weight)
        total = self.counts.sum()
        smoothed = (self.counts + 1e-5) * (total / (total + self.vocab_size * 1e-5))
        self.codebook.copy_(moved_if(taken, self.sums / smoothed.unsqueeze(1), self.codebook))
        if self.candidates:
            self._revive()

    def _revive(self) -> None:
        """Put each dead code on a vector of the step, as if of mean use."""
        mean = self.counts.mean()
        dead, vectors = self.dead_codes()
        self.codebook[dead] = vectors
        self.counts[dead] = mean
        self.sums[dead] = vectors * mean
