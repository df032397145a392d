"""Entropy penalties that keep codes in use (Jansen et al. 2020), for codes made of bits (Yu et al. 2023, section 3.1;
Zhao et al. 2024, section 4): `entropy`, E[H(p)], small if each row's assignment is confident, and `diversity`, log K -
H(E[p]), small if the rows together use all codes equally.

A row of logits a says p(code) = prod_k sigmoid(+-a_k), + where bit k of the code is 1. The bits of *one* row are
independent, so the entropy of its code is the sum of its bits', exactly:

    E[H(p)] = E[sum_k h(sigmoid(a_k))],  h(q) = -q log q - (1 - q) log(1 - q).

The mean over rows is a mixture, whose bits are dependent: H(E[p]) needs E[p] of every code. It is computed for groups
of bits. In a group of g bits p(code) = p(low half) p(high half), so E[p] over n rows is one matrix product, (2^(g/2) x
n)(n x 2^(g/2)) / n, and n x 2^g numbers never exist. One group is exact; with more, as entropy is subadditive,

    H(E[p]) <= sum over groups of H(E[p of the group's bits]),

so `diversity`, bits log 2 minus that sum, is at most log K - H(E[p]). The gap is the mutual information of the groups:
it is 0 if each group by itself uses all of its codes. Since n confident rows fill at most n codes, the diversity of a
group with more than log2(n) bits cannot become 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradients import straight_through
from .updates import mean_over_ranks, world_size


def bit_entropy(logits: Tensor) -> Tensor:
    """E[H(p)] in nats, a scalar, of logits `(n, bits)`."""
    each = logits.sigmoid() * F.softplus(-logits) + (-logits).sigmoid() * F.softplus(logits)
    return each.sum(1).mean()


def bit_diversity(logits: Tensor, group: int, *, share: bool = False) -> Tensor:
    """log K - H(E[p]) in nats, a scalar, of logits `(n, bits)`; exact if `bits <= group`, else a lower bound from
    groups of nearly equal sizes. share: see `diversity`."""
    groups = logits.tensor_split(math.ceil(logits.shape[1] / group), dim=1)
    return torch.stack([diversity(mean_probabilities(part), share=share) for part in groups]).sum()


def diversity(mean: Tensor, *, share: bool = False) -> Tensor:
    """log K - H(mean) in nats, a scalar >= 0, of the mean p over this rank's rows, `(K,)`.

    With `share`, the mean is over the rows of all ranks, equally many on each; every rank has to call. The gradient
    reaches a rank's own rows only, multiplied by the number of ranks. Averaged over ranks, as DDP does, it is the
    gradient of one process with all rows.
    """
    if share and world_size() > 1:
        mean = straight_through(mean, mean_over_ranks(mean.detach().clone()))
    tiny = torch.finfo(mean.dtype).tiny  # p log p has no slope at 0, where saturated bits are
    return (mean * (mean * len(mean)).clamp(min=tiny).log()).sum().clamp(min=0)


def mean_probabilities(logits: Tensor) -> Tensor:
    """The mean over rows of p(code), `(2^g,)`, of logits `(n, g)`; bit k of a code's number belongs to logit k."""
    half = logits.shape[1] // 2
    low, high = joint(logits[:, :half]), joint(logits[:, half:])
    return (high.t() @ low).flatten() / logits.shape[0]


def joint(logits: Tensor) -> Tensor:
    """p of every code of every row, `(n, 2^g)`, of logits `(n, g)`."""
    p, zero, one = logits.new_ones(logits.shape[0], 1), (-logits).sigmoid(), logits.sigmoid()
    for bit in range(logits.shape[1]):
        p = torch.cat([p * zero[:, bit, None], p * one[:, bit, None]], 1)
    return p
