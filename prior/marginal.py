"""Frequencies of ids at each position, independent of all other positions: the baseline in every table, and the
simplest prior.

Initialised in closed form from counts with add-one smoothing (Laplace), once per class and once over all classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Prior
from .columns import LABEL
from .condition_encoder import Encoded
from .config import PriorConfig
from .given import Given
from .options import Order

CHUNK = 1 << 14  # rows counted at a time
ONE_BY_ONE = 1 << 24  # beyond this, adding 1 to a float32 has no effect


class MarginalConfig(PriorConfig):
    takes_blocks = True


class Marginal(Prior, name="marginal"):
    """Independent positions: p(tokens | label) = prod_i p_i(tokens[i] | label)."""

    Config = MarginalConfig

    def __init__(self, config: MarginalConfig) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.randn(config.num_classes + 1, len(config.grid), config.grid.vocab_size))

    @property
    def position_field(self) -> Tensor:
        return torch.zeros(len(self.grid), len(self.grid), dtype=torch.bool, device=self.device)

    def outputs(self, tokens: Tensor, encoded: Encoded) -> Tensor:
        return self.table[encoded.labels]

    @torch.no_grad()
    def initialize(self, tokens: Tensor, given: Given) -> None:
        """Set the table to the smoothed log frequencies of `tokens` (n, *grid.shape), for each class and overall.

        tokens: a tensor, or an on-disk array whose slices are tensors."""
        labels = given.rows.get(LABEL) if self.num_classes else None
        counts, size = self.table.zero_(), self.table[0].numel()  # in place, because the table may be gigabytes large
        before: Tensor | None = None
        places = torch.arange(len(self.grid), device=self.device) * self.grid.vocab_size
        for start in range(0, len(tokens), CHUNK):
            if start and start % ONE_BY_ONE == 0:
                before = counts.clone() if before is None else before.add_(counts)
                counts.zero_()
            rows = tokens[start : start + CHUNK].flatten(1).long().to(self.device) + places
            ones = torch.ones_like(rows, dtype=counts.dtype).flatten()
            counts[-1].view(-1).scatter_add_(0, rows.flatten(), ones)
            if labels is not None:
                ids = labels[start : start + CHUNK].to(self.device)
                rows = rows[ids >= 0] + ids[ids >= 0, None] * size
                counts.view(-1).scatter_add_(0, rows.flatten(), ones[: rows.numel()])
        if before is not None:
            counts.add_(before)
        if labels is None:
            counts[:-1] = counts[-1]
        totals = counts.sum(-1, keepdim=True) + self.grid.vocab_size
        counts.add_(1).div_(totals).log_()

    def start(self, encoded: Encoded, order: Order = None, *, cache: bool = True) -> Any:
        """Return the blocks' logits, each `(B, n, vocab_size)`, the last block first."""
        if not cache:
            return super().start(encoded, order, cache=False)
        empty = torch.empty(len(encoded), 0, device=self.device)
        return list(self(empty, encoded)[:, self.order].split(self.blocks, 1))[::-1]

    def next_logits(self, state: Any, tokens: Tensor | None) -> Tensor:
        return state.pop() if isinstance(state, list) else super().next_logits(state, tokens)
