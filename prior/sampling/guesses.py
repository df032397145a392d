"""Several guesses of an image's tokens at once, where a pass over them takes no longer than over one.

A pass over a single image of a small model leaves most of a GPU idle. The rest of it tries what would be right if one
token of the guess were wrong: the guess that goes on longest is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AT_ONCE = 8
FREE = 2e10
"""FLOPs of a pass that take a GPU no longer than launching its kernels does (0.4 ms at 50 TFLOP/s)."""


def guesses_at_once(prior: Any, images: int) -> int:
    """How many guesses of each image go through the model together."""
    if prior.device.type != "cuda":
        return 1
    weights = sum(parameter.numel() for parameter in prior.parameters())
    return AT_ONCE if 2 * weights * len(prior.grid) * images * AT_ONCE <= FREE else 1


def alternatives(drawn: Tensor, scores: Tensor, free: Tensor, count: int) -> Tensor:
    """`count` guesses `(B, count, N)`: `drawn` (B, N) itself, and with one of the `free` tokens, bool (B, N), replaced
    by another id that scores high there, where this is the likeliest first mistake.

    scores: `(B, N, V)`, whose softmax stands for how likely each id turns out to be right.
    """
    highest = scores.topk(min(count, scores.shape[-1]), -1)
    shares = highest.values.softmax(-1)
    right = shares[..., 0].where(free, 1)
    first = (right.cumprod(1) / right)[..., None] * shares * free[..., None]
    first[..., 0] = 0
    best = first.flatten(1).topk(min(count - 1, first[0].numel()))
    ranks = best.indices // shares.shape[-1]
    ids = highest.indices.flatten(1).gather(1, best.indices)
    ids = torch.where(best.values > 0, ids, drawn.gather(1, ranks))
    guesses = drawn[:, None].repeat(1, 1 + ids.shape[1], 1)
    guesses[:, 1:].scatter_(2, ranks[..., None], ids[..., None])
    return guesses
