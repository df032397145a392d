"""Entropy penalties that keep codes in use (Jansen et al. 2020), for binary codes (Yu et al. 2023, section 3.1; Zhao et
al. 2024, section 4): `entropy`, E[H(p)], is small if each row's assignment is confident, and `diversity`, log K -
H(E[p]), is small if the rows together use all codes equally.

A row of logits a defines p(code) = prod_k sigmoid(+-a_k), with + where bit k of the code is 1. The bits of *one* row
are independent, so the entropy of its code is exactly the sum of its bits' entropies:

    E[H(p)] = E[sum_k h(sigmoid(a_k))],  h(q) = -q log q - (1 - q) log(1 - q).

The mean over rows is a mixture with dependent bits, so H(E[p]) needs E[p] of every code. It is computed for groups of
bits. In a group of g bits p(code) = p(low half) p(high half), so E[p] over n rows is one matrix product, (2^(g/2) x
n)(n x 2^(g/2)) / n, without an n x 2^g array. One group is exact; with several groups, by the subadditivity of entropy,

    H(E[p]) <= sum over groups of H(E[p of the group's bits]),

so `diversity`, bits log 2 minus that sum, is at most log K - H(E[p]). The gap is the groups' total correlation. Since n
confident rows use at most n codes, the diversity of a group with more than log2(n) bits cannot reach 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradients import straight_through
from .updates import mean_over_ranks, world_size


def bit_entropy(logits: Tensor) -> Tensor:
    """Return E[H(p)] of logits `(n, bits)`, a scalar in nats."""
    each = logits.sigmoid() * F.softplus(-logits) + (-logits).sigmoid() * F.softplus(logits)
    return each.sum(1).mean()


def bit_diversity(logits: Tensor, group: int, *, share: bool = False) -> Tensor:
    """Return log K - H(E[p]) of logits `(n, bits)`, a scalar in nats; exact if `bits <= group`, else a lower bound from
    groups of nearly equal size. share: see `diversity`."""
    groups = logits.tensor_split(math.ceil(logits.shape[1] / group), dim=1)
    return torch.stack([diversity(mean_probabilities(part), share=share) for part in groups]).sum()


def diversity(mean: Tensor, *, share: bool = False) -> Tensor:
    """Return log K - H(mean), a scalar >= 0 in nats, for `mean`, p averaged over this rank's rows, `(K,)`.

    With `share`, the mean is over the rows of all ranks, equally many on each, and every rank must call this. The
    gradient reaches only a rank's own rows, multiplied by the number of ranks; after DDP averages it, it equals the
    gradient of one process with all rows.
    """
    if share and world_size() > 1:
        mean = straight_through(mean, mean_over_ranks(mean.detach().clone()))
    tiny = torch.finfo(mean.dtype).tiny  # p log p has no finite slope at 0, which saturated bits reach
    return (mean * (mean * len(mean)).clamp(min=tiny).log()).sum().clamp(min=0)


def mean_probabilities(logits: Tensor) -> Tensor:
    """Return p(code) averaged over rows, `(2^g,)`, for logits `(n, g)`; bit k of a code's number belongs to logit k."""
    half = logits.shape[1] // 2
    low, high = joint(logits[:, :half]), joint(logits[:, half:])
    return (high.t() @ low).flatten() / logits.shape[0]


def joint(logits: Tensor) -> Tensor:
    """Return p of every code for every row, `(n, 2^g)`, given logits `(n, g)`."""
    p, zero, one = logits.new_ones(logits.shape[0], 1), (-logits).sigmoid(), logits.sigmoid()
    for bit in range(logits.shape[1]):
        p = torch.cat([p * zero[:, bit, None], p * one[:, bit, None]], 1)
    return p
