"""Each position's own frequencies, whatever the others are: the floor of every table, and the shortest prior.

Initialised in closed form from counts with add-one smoothing (Laplace), once per class and once over all classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Prior, PriorConfig


@dataclass(frozen=True, kw_only=True)
class MarginalConfig(PriorConfig):
    """Nothing to choose."""


class Marginal(Prior, name="marginal"):
    """Independent positions: p(tokens | label) = prod_i p_i(tokens[i] | label)."""

    Config = MarginalConfig

    def __init__(self, config: MarginalConfig) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.randn(config.num_classes + 1, len(config.grid), config.grid.vocab_size))

    @property
    def receptive_field(self) -> Tensor:
        """bool `(N, N)`, all False."""
        return torch.zeros(len(self.grid), len(self.grid), dtype=torch.bool, device=self.device)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `(B, N, vocab_size)`; the tokens are not looked at."""
        labels = self.class_ids(labels, len(tokens))
        return self.table[labels]

    @torch.no_grad()
    def initialize(self, tokens: Tensor, labels: Tensor | None) -> None:
        """Set the table to the smoothed log frequencies of `tokens` (n, *grid.shape), per class and overall."""
        rows = tokens.flatten(1).long().to(self.device)
        for label in range(self.num_classes + 1):
            mine = rows if label == self.num_classes or labels is None else rows[labels.to(rows.device) == label]
            counts = torch.zeros_like(self.table[0])
            counts.scatter_add_(1, mine.t(), torch.ones_like(mine.t(), dtype=counts.dtype))
            self.table[label] = ((counts + 1) / (len(mine) + self.grid.vocab_size)).log()

    def start(self, num_images: int, labels: Tensor | None, order: Tensor | None = None) -> list[Tensor]:
        """The remaining positions' logits, each `(B, vocab_size)`."""
        empty = torch.empty(num_images, 0, device=self.device)
        return list(self(empty, labels)[:, self.order].unbind(1))[::-1]

    def next_logits(self, state: list[Tensor], token: Tensor | None) -> Tensor:
        """The next position's logits."""
        return state.pop()
