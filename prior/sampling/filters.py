"""Which ids may be chosen: the k likeliest, or the likeliest up to a mass; and how sure that is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenizer.base import in_finest


class Kept(NamedTuple):
    """bool `(..., V)`: the ids that a filter keeps; those that it keeps or might keep if rounding moved logits within
    a tolerance; and those that it keeps in any case."""

    kept: Tensor
    near: Tensor
    certain: Tensor


def keep_top_k(logits: Tensor, k: int, tolerance: Tensor) -> Kept:
    """The `k` likeliest of V > k ids, and all that are equal to the last of them. tolerance: `(..., 1)`.

        logits   5.0   3.0 | 2.9   1.0      k = 2: the boundary is between 3.0, the last, and 2.9, the first out

    With a tolerance of 0.2 the third is near, as 2.9 >= 3.0 - 0.2. Only the first is certain, as 5.0 > 2.9 + 0.2: the
    second could fall behind the third.
    """
    last, first_out = logits.topk(k + 1).values[..., -2:].split(1, -1)
    return Kept(logits >= last, logits >= last - tolerance, logits > first_out + tolerance)


def keep_top_p(logits: Tensor, p: float, tolerance: Tensor, among: Kept) -> Kept:
    """The likeliest ids `among` those kept so far until their mass reaches `p`, of equal ones the first.

        probabilities   0.5   0.3 | 0.2      p = 0.7
        mass before     0.0   0.5 | 0.8      an id is kept where the mass before it is below p

    A mass moves by no more than the tolerance, `(..., 1)`, and by the share of the ids that `top_k` itself might keep
    or not. With 0.25 of both together the third is near, as 0.8 < 0.7 + 0.25, and only the first is certain, as
    0.5 > 0.7 - 0.25. Besides, ids whose logits are within the tolerance may change places at either boundary.
    """
    ordered, ids = logits.masked_fill(~among.kept, -torch.inf).sort(dim=-1, descending=True, stable=True)
    precise = in_finest(ordered)
    probabilities = precise.softmax(-1)
    mass_before = (probabilities.cumsum(-1) - probabilities).masked_fill(ordered == -torch.inf, torch.inf)

    def below(limit: float | Tensor) -> Tensor:
        return torch.zeros_like(among.kept).scatter(-1, ids, mass_before < limit)

    shares = (in_finest(logits) - precise.logsumexp(-1, keepdim=True)).exp()
    slack = tolerance + (shares * (among.near & ~among.certain)).sum(-1, keepdim=True)
    likely = below(p + slack)
    sure = below(p - slack)
    lowest_likely = logits.masked_fill(~likely, torch.inf).amin(-1, keepdim=True)
    highest_unsure = logits.masked_fill(sure, -torch.inf).amax(-1, keepdim=True)
    near = logits >= lowest_likely - tolerance
    return Kept(below(p), near, sure & (logits > highest_unsure + tolerance))
