"""The ids of a position on their way in, and one after the other on their way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.base import TokenGrid

from .base import Head


class IdEmbedding(nn.Embedding):
    """The sum of a position's ids' embeddings, each level with a table of its own (Lee et al. 2022, RQ-Transformer)."""

    offsets: Tensor

    def __init__(self, grid: TokenGrid, together: int, dim: int) -> None:
        super().__init__(together * grid.vocab_size, dim)
        self.together = together
        offsets = torch.arange(together, device="cpu") * grid.vocab_size
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """`(..., dim)` of ids `(..., together)`."""
        return super().forward(ids[..., 0]) if self.together == 1 else super().forward(ids + self.offsets).sum(-2)

    def of_rows(self, ids: Tensor) -> Tensor:
        """`forward` of a row `(B,)`, or `(B, together)` where there are several, in fewer operations; no gradient."""
        table = self.weight.detach()
        if self.together == 1:
            return table.index_select(0, ids)
        return table.index_select(0, (ids + self.offsets).flatten()).unflatten(0, ids.shape).sum(1)


class PositionSteps:
    """Steps of single ids from a network that steps from position to position.

    cache: its `step` takes the last positions' ids and puts out the next one's numbers: `(B,)` ids, or `(B, together)`,
    to `(B, size)`; of a model that takes blocks `(B, n)`, or `(B, n, together)`, to `(B, m, size)`. It is called once
    for all ids of a position.
    """

    def __init__(self, head: Head, cache: Any, takes_blocks: bool) -> None:
        self.head, self.cache, self.takes_blocks = head, cache, takes_blocks
        self.ids: list[Tensor] = []  # of the positions at hand, `(B, n)` each
        self.outputs: Tensor | None = None

    def step(self, tokens: Tensor | None) -> Tensor:
        """Logits `(B, n, vocab_size)` of the next ids, given the last ones, `tokens` `(B, m)`."""
        self.ids += [] if tokens is None else [tokens]
        if self.outputs is None or len(self.ids) == self.head.together:
            self.outputs, self.ids = self.advance(), []
        known = torch.stack(self.ids, -1) if self.ids else self.outputs.new_zeros(*self.outputs.shape[:-1], 0).long()
        return self.head.next_logits(self.outputs, known)

    def advance(self) -> Tensor:
        """What the network puts out at the next positions, `(B, n, size)`."""
        last = None
        if self.ids:
            last = self.ids[0] if self.head.together == 1 else torch.stack(self.ids, -1)
        if self.takes_blocks:
            return self.cache.step(last)
        return self.cache.step(None if last is None else last[:, 0])[:, None]
