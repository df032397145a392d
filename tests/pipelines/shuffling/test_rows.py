"""Rows that are asked for: every way gives what a list indexed so gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.shuffling.rows import positions_of

HELD = list(range(5))


@pytest.mark.parametrize(
    ("rows", "positions"),
    [
        ([3, 0, 3], [3, 0, 3]),
        ([-1, 0, -5], [4, 0, 0]),
        (np.array([2, 4], np.uint16), [2, 4]),
        (torch.tensor([[1], [2]]), [1, 2]),
        ([], []),
        ([True, False, False, True, True], [0, 3, 4]),
        (torch.tensor([False] * 5), []),
        (slice(None), HELD),
        (slice(-2, None), HELD[-2:]),
        (slice(None, None, -2), HELD[::-2]),
        (slice(9, 20), []),
    ],
)
def test_positions_count_from_zero(rows, positions):
    found = positions_of(rows, 5)
    assert found.dtype == np.int64 and found.tolist() == positions


@pytest.mark.parametrize("rows", [[True], [0.5], torch.ones(2), ["a"]])
def test_other_numbers_than_whole_ones_are_refused(rows):
    with pytest.raises(IndexError, match="^rows should be whole numbers, or a bool for each of 5$"):
        positions_of(rows, 5)


@pytest.mark.parametrize(("rows", "told"), [([5], "5 to 5"), ([0, -6], "-1 to 0")])
def test_rows_that_are_not_there_are_refused(rows, told):
    with pytest.raises(IndexError, match=f"^rows go from {told}; there are 5$"):
        positions_of(rows, 5)
