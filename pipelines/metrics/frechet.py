"""The Frechet distance of two sets of rows, by their means and covariances: Heusel et al. 2017 (arXiv:1706.08500),
eq. 6. All in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..processes.group import ALONE, ProcessGroup

T = TypeVar("T")


class Moments(NamedTuple):
    """The mean `(d,)` of n rows, and their covariance `(d, d)`, normalised by n - 1."""

    mean: Tensor
    covariance: Tensor


def moments(rows: Tensor) -> Moments:
    """Return the moments of rows `(n, d)`."""
    rows = rows.double()
    mean = rows.mean(0)
    return Moments(mean, (rows - mean).t() @ (rows - mean) / max(1, len(rows) - 1))


def moments_of_parts(rows_of: Callable[[T], Tensor], parts: Sequence[T], group: ProcessGroup = ALONE) -> Moments:
    """Return the moments of the rows `(n, d)` of all parts, accumulated without storing the rows. The parts are shared
    among the processes."""

    def add_own() -> tuple[int, Tensor, Tensor]:
        count, total, products = 0, torch.zeros(1).double(), torch.zeros(1, 1).double()
        for part in group.mine(parts):
            rows = rows_of(part).cpu().double()
            count, total, products = count + len(rows), total + rows.sum(0), products + rows.t() @ rows
        return count, total, products

    count, total, products = (sum(each[1:], start=each[0]) for each in zip(*group.gather(add_own), strict=True))
    mean = total / count
    return Moments(mean, (products - count * torch.outer(mean, mean)) / max(1, count - 1))


def distance(a: Moments, b: Moments) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). The last trace is the sum of the singular values of
    S_a^(1/2) S_b^(1/2)."""
    roots = []
    for values, vectors in (torch.linalg.eigh(each.covariance) for each in (a, b)):
        roots.append((vectors * values.clamp(min=0).sqrt()) @ vectors.t())
    shared = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return `distance` of the moments of rows `(n, d)` and `(m, d)`."""
    return distance(moments(a), moments(b))
