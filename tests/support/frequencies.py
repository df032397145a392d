"""Whether ids were drawn with the probabilities that a model says, by one figure for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

SURE = 3.72  # deviations of a normal variable: one such figure in 10,000 is above the limit by chance
FEW = 5.0  # outcomes of which fewer are expected count as one


def as_frequent(drawn: Tensor, expected: Tensor) -> bool:
    """Whether outcomes `(n,)`, each a number below V, may well have the probabilities `expected` `(V,)`: Pearson's
    chi-squared against its upper tail, by the approximation of Wilson and Hilferty (1931).

    With a third of the draws it finds what a test of each outcome alone does where several are off, as they are when a
    temperature, an order or the noise is wrong.
    """
    expected = expected.detach().double() * len(drawn)
    found = torch.bincount(drawn, minlength=len(expected)).double()
    if found[expected == 0].any():
        return False
    rare = expected < FEW
    found, expected = (torch.cat([each[~rare], each[rare].sum()[None]]) for each in (found, expected))
    found, expected = found[expected > 0], expected[expected > 0]
    free = max(1, len(expected) - 1)
    limit = free * (1 - 2 / (9 * free) + SURE * (2 / (9 * free)) ** 0.5) ** 3
    return float(((found - expected).square() / expected).sum()) < limit
