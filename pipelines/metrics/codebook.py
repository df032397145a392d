"""Codebook usage during training.

A codebook collapses when fewer and fewer codes are nearest to any vector: an unused code gets no gradient and no mean
to follow, so it stays unused (Kaiser et al. 2018, section 3; Dhariwal et al. 2020, Jukebox, section 3.2). The number of
dead codes and the perplexity show it long before the reconstructions do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.base import codebook_usage
from tokenizer.quantizers.price import count_tokens
from tokenizer.quantizers.updates import sum_over_ranks

from .charts import Pixels, draw_usage, page

DECAY = 0.99  # of the counts at each batch: an average over about 100 batches
DEAD = 0.05  # a code used less than this share of the mean is dead


class CodebookUse(nn.Module):
    """Counts of tokens over all ranks, in a buffer that is equal on all ranks and saved with the run's state.

    uses: `(parts, vocab_size)`, how often each id occurred in each part (a level or a scale), decayed by 0.99 at each
    batch. Counts start at 1, so that no code is dead before it has had time to occur.
    """

    uses: Tensor

    def __init__(self, vocab_size: int, parts: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = parts
        self.register_buffer("uses", torch.ones(len(parts), vocab_size))  # float32: some devices have no doubles

    @torch.no_grad()
    def count(self, tokens: Tensor) -> Tensor:
        """Count the `tokens` (B, *grid) of this rank's batch; every rank must call it. Return how often each id occurs
        in the global batch, `(parts, vocab_size)` int64."""
        counts = sum_over_ranks(count_tokens(tokens, self.parts, self.uses.shape[1]))
        self.uses.mul_(DECAY).add_(counts.to(self.uses.device))
        return counts

    def dead(self) -> Tensor:
        """Return which codes are dead, bool `(parts, vocab_size)`."""
        return self.uses < DEAD * self.uses.mean(1, keepdim=True)

    def picture(self, tokenizer: Any) -> Pixels:
        counts, dead = self.uses.cpu().double(), int(self.dead().sum())
        perplexity = sum(float(codebook_usage(part)["perplexity"]) for part in counts) / len(counts)
        label = "uses in about 100 batches"
        chart = partial(draw_usage, uses=counts.numpy(), names=part_names(tokenizer), label=label)
        figures = f"perplexity {perplexity:.1f}, {dead:,} of {counts.numel():,} codes dead"
        return page(["Codebook", figures], [chart], {})


def part_names(tokenizer: Any) -> list[str]:
    """Return the names of the parts of a tokenizer's tokens: level 1, level 2, ...; or 1x1, 2x2, ..."""
    scales = tokenizer.grid.scales
    return [f"{height}x{width}" for height, width in scales] or [f"level {n + 1}" for n in range(tokenizer.levels)]
