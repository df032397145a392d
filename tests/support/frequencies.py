"""A test of whether samples follow given probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

SURE = 3.72  # standard deviations: false alarms occur once in 10,000 tests
FEW = 5.0  # outcomes with a smaller expected count are pooled


def as_frequent(drawn: Tensor, expected: Tensor) -> bool:
    """Whether outcomes `(n,)` in [0, V) are consistent with probabilities `expected` `(V,)`: Pearson's chi-squared
    test, with the tail approximated by Wilson and Hilferty (1931).

    A wrong temperature, order or noise shifts several outcomes; this test finds it with a third of the samples that
    separate tests of each outcome need.
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
