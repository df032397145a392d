"""What is drawn for each row depends on seed, epoch and row alone.

Covers: pipelines/shuffling/draws.py.
"""

from __future__ import annotations

import numpy as np
import torch

from pipelines.shuffling.draws import OTHER, by_row, other_labels


def test_another_label_is_as_frequent_as_its_rows():
    """Of classes with 10, 0, 30 and 60 rows; a class without rows is never drawn."""
    counts = torch.tensor([10, 0, 30, 60])
    rows = np.arange(30_000)
    draws = by_row(rows, rows * 0, 5, OTHER)
    for own, shares in {0: [0, 0, 1 / 3, 2 / 3], 2: [1 / 7, 0, 0, 6 / 7], 3: [0.25, 0, 0.75, 0]}.items():
        found = other_labels(torch.full((len(rows),), own), counts, draws)
        assert np.allclose(torch.bincount(found, minlength=4) / len(rows), shares, atol=0.012)


def test_the_ends_of_the_interval_are_classes_too():
    counts, almost = torch.tensor([2, 3]), np.array([0.0, np.nextafter(1, 0)])
    for own in (0, 1):
        assert other_labels(torch.tensor([own, own]), counts, almost).tolist() == [1 - own] * 2
    assert other_labels(torch.tensor([1, 1]), torch.tensor([2, 3, 4]), almost).tolist() == [0, 2]
