"""What a prior gives to tokens: bits per token and log-probabilities, in batches that fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer import TokenGrid

from ..shuffling.epochs import spread
from ..tokens import TokenSplit

EVALUATED_ROWS = 2000  # at most, by training; `smalti evaluate` looks at all that are held out
LOGITS = 1 << 28  # numbers, 1 GiB of float32, that an evaluation makes at a time at most


def rows_at_a_time(grid: TokenGrid) -> int:
    """Rows of tokens to evaluate at a time: 256, or as many as have `LOGITS` logits."""
    return max(1, min(256, LOGITS // (len(grid) * grid.vocab_size)))


def bits_per_token(model: Any, split: TokenSplit, limit: int | None = None, num_orders: int = 1) -> float:
    """Mean -log2 p per token over `limit` rows, evenly spread; num_orders: as in `Prior.log_prob`."""
    nats = log_probs(model, split, spread(len(split), limit), num_orders)
    return -float(nats.mean()) / (math.log(2) * len(model.grid))


@torch.inference_mode()
def log_probs(model: Any, split: TokenSplit, rows: np.ndarray, num_orders: int = 1) -> Tensor:
    """log p `(len(rows),)` of the rows asked for, float64 nats on the CPU; num_orders: as in `Prior.log_prob`."""
    size, found = rows_at_a_time(model.grid), []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        tokens = split.rows(some).to(model.device)
        labels = None if split.labels is None else split.labels[torch.from_numpy(some)].to(model.device)
        found.append(model.log_prob(tokens, labels, num_orders=num_orders).cpu().double())
    return torch.cat(found)
