"""The Frechet distance of two sets of rows, by their means and covariances: Heusel et al. 2017 (arXiv:1706.08500),
eq. 6.

A covariance S is kept as a factor F with S = F'F. Factors of parts are put together as they are, so that neither all
rows nor a square root of a covariance is needed: that turns a rounding error of 1e-16 into 1e-8 wherever a covariance
has not full rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 1 << 13  # that are held at a time


@dataclass(frozen=True)
class Moments:
    """The mean `(d,)` of `count` rows, and F `(k, d)` with F'F their covariance, which divides by count - 1."""

    count: int
    mean: Tensor
    factor: Tensor


def moments(rows: Tensor) -> Moments:
    """Of rows `(n, d)`, in float64."""
    rows = rows.double()
    mean = rows.mean(0)
    return Moments(len(rows), mean, torch.linalg.qr((rows - mean) / math.sqrt(max(1, len(rows) - 1))).R)


def moments_of(count: int, mean: Tensor, covariance: Tensor) -> Moments:
    """From a mean `(d,)` and a covariance `(d, d)` that others have taken, in float64."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return Moments(count, mean.double(), values.clamp(min=0).sqrt()[:, None] * vectors.t())


def joined(a: Moments, b: Moments) -> Moments:
    """Of the rows of both."""
    count, apart = a.count + b.count, b.mean - a.mean
    scatters = [part.factor * math.sqrt(part.count - 1) for part in (a, b)]
    between = apart * math.sqrt(a.count * b.count / count)
    factor = torch.linalg.qr(torch.cat([*scatters, between[None]]) / math.sqrt(count - 1)).R
    return Moments(count, a.mean + apart * (b.count / count), factor)


def moments_in_parts(parts: Iterable[Tensor]) -> Moments | None:
    """Of rows that come in parts `(n, d)`, of which a few are held at a time; None if none come."""
    held: list[Tensor] = []
    found: Moments | None = None
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= ROWS:
            found, held = _with(found, held), []
    return _with(found, held) if held else found


def _with(found: Moments | None, held: list[Tensor]) -> Moments:
    more = moments(torch.cat(held))
    return more if found is None else joined(found, more)


def distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)); the last trace is the sum of F_a F_b' singular values."""
    shared = torch.linalg.svdvals(a.factor @ b.factor.t()).sum()
    squares = (a.mean - b.mean).square().sum() + a.factor.square().sum() + b.factor.square().sum()
    return float(squares - 2 * shared)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Of rows `(n, d)` and `(m, d)`, in float64."""
    return distance(moments(a), moments(b))
