"""Known tokens come first: the order that is left, and its blocks."""

import pytest
import torch

from prior.orders import after_known, known_first


def test_known_tokens_come_first_each_part_in_its_order():
    walk = torch.tensor([3, 1, 4, 0, 2])
    keep = torch.tensor([[True, False, True, False, False], [False] * 5])
    assert known_first(walk, keep).tolist() == [[0, 2, 3, 1, 4], [3, 1, 4, 0, 2]]
    assert known_first(walk.expand(2, -1), keep).equal(known_first(walk, keep))


@pytest.mark.parametrize(
    ("known", "left"), [(0, (1, 2, 4)), (1, (1, 2, 4)), (2, (2, 1, 4)), (3, (3, 4)), (5, (5, 2)), (7, (7,))]
)
def test_what_is_left_keeps_its_cuts(known, left):
    assert after_known((1, 2, 4), known) == left
