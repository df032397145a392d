"""Resizing by fixed matrices is what torch's own resizing does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokenizer.base import read_grid
from tokenizer.scales import Resize, scales_problem

SCALES = [((1, 1), (2, 2), (4, 4), (7, 7)), ((1, 1), (2, 3), (4, 6)), ((3, 5),), ((1, 4), (3, 4), (3, 4))]


@pytest.mark.parametrize("scales", SCALES)
def test_down_is_the_mean_over_areas_and_up_is_bicubic(scales):
    resize = Resize(scales)
    whole = torch.randn(2, 5, *scales[-1])
    for k, sides in enumerate(scales):
        small = torch.randn(2, 5, *sides)
        torch.testing.assert_close(resize.down(whole, k), F.interpolate(whole, size=sides, mode="area"))
        torch.testing.assert_close(resize.up(small, k), F.interpolate(small, size=scales[-1], mode="bicubic"))
    assert torch.equal(resize.up(whole, len(scales) - 1), whole) and torch.equal(resize.down(whole, -1), whole)
    assert resize.state_dict() == {}


def test_a_row_of_scales_is_cut_into_maps():
    tokens = torch.arange(2 * 31).reshape(2, 31)
    maps = list(Resize(((1, 1), (2, 3), (4, 6))).split(tokens))
    assert [tuple(part.shape) for part in maps] == [(2, 1, 1), (2, 2, 3), (2, 4, 6)]
    assert torch.equal(torch.cat([part.flatten(1) for part in maps], 1), tokens)
    assert maps[1][0].tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([[1, 1], [2, 2]], r"^scales: 1x1, 2x2 are 5 tokens on one axis \(got a grid of \[21\]\)$"),
        ([[1, 1], [4, 4], [2, 2]], r"^scales: .*1x1, 4x4, 2x2\)$"),
        ([[1, 1], [4, 5, 1]], "^scales: expected pairs of positive whole sizes"),
        ([[21, -1]], "^scales: expected pairs of positive whole sizes"),
        ([[True, 21]], "^scales: expected pairs of positive whole sizes"),
        ([21], "^scales: expected pairs"),
        (21, "^scales: expected a list"),
        ([[1, 1]] * 65, "at most 64 values"),
    ],
)
def test_wrong_scales_of_a_grid_are_named(scales, message):
    with pytest.raises(ValueError, match=message):
        read_grid({"shape": [21], "vocab_size": 8, "scales": scales})


def test_scales_may_repeat():
    assert scales_problem(((1, 1), (1, 1), (2, 2)), (6,)) is None
