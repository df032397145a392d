"""Orders of rows and what is drawn for each: each row once per epoch, and functions of (seed, epoch, row) alone."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from pipelines.shuffling import (
    OTHER,
    by_row,
    other_labels,
    permuted,
    permuted_blocks,
    positions_of,
    samples_of,
    uniforms,
)


def test_draws_are_uniform_and_independent():
    draws = np.concatenate([uniforms(0, epoch, np.arange(2000)) for epoch in range(10)])
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in draws.T])
    assert np.abs(counts - 1000).max() < 6 * np.sqrt(950)  # six standard deviations
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.05
    assert np.abs(np.corrcoef(draws.reshape(10, 2000, 5)[:, :, 0]) - np.eye(10)).max() < 0.15


ROWS = [1, 2, 3, 5, 10, 97, 1000]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("block", [None, 4, 16])
def test_every_row_comes_once(rows, block):
    for key in range(3):
        positions = np.arange(rows)
        found = permuted(positions, rows, key) if block is None else permuted_blocks(positions, rows, block, key)
        assert np.array_equal(np.sort(found), positions)


def test_a_few_are_those_of_all():
    whole, blocks = permuted(np.arange(1000), 1000, 5, 2), permuted_blocks(np.arange(1000), 1000, 8, 5, 2)
    some = np.array([999, 0, 17, 17, 500])
    assert np.array_equal(permuted(some, 1000, 5, 2), whole[some])
    assert np.array_equal(permuted_blocks(some, 1000, 8, 5, 2), blocks[some])


def test_all_orders_are_equally_likely():
    """All 24 orders of four rows, over keys: chi-square of 23 degrees of freedom, and of where row 0 of 1,000 goes."""
    counts = np.zeros(4**4)
    for key in range(2400):
        counts[int(permuted(np.arange(4), 4, key, 1) @ 4 ** np.arange(4))] += 1
    counts = counts[counts > 0]
    assert len(counts) == 24 and ((counts - 100) ** 2 / 100).sum() < 60  # 0.004 % of fair ones are above
    first = np.array([permuted(np.array([0]), 1000, key, 1)[0] for key in range(2000)])
    places = np.histogram(first, 20, (0, 1000))[0]
    assert ((places - 100) ** 2 / 100).sum() < 55  # 19 degrees of freedom


def test_neighbours_part():
    found = permuted(np.arange(100_000), 100_000, 7)
    jumps = np.abs(np.diff(found))
    assert jumps.mean() / 100_000 == pytest.approx(1 / 3, abs=0.005) and (jumps == 1).sum() < 12  # 2 are expected
    assert abs(np.corrcoef(np.arange(100_000), found)[0, 1]) < 0.015


def test_blocks_keep_the_disk_to_few_places():
    """A window of block^2 rows touches its own blocks alone, whole, and mixes all of them."""
    found = permuted_blocks(np.arange(16 * 16 * 10), 16 * 16 * 10, 16, 3)
    seen, orders = set(), set()
    for window in found.reshape(10, 256):
        blocks = np.unique(window // 16)
        assert len(blocks) == 16 and not seen & set(blocks)
        assert len(np.unique(window[:16] // 16)) > 5  # not one block after the other
        seen |= set(blocks)
        orders.add(tuple(window % 16))
    assert len(orders) == 10  # each window is mixed in its own way
    assert np.abs(np.diff(sorted(found[:256] // 16))).max() > 16  # the blocks are from all over


@pytest.mark.parametrize("drawn", [0, 1 << 20])
def test_both_orders_give_each_row_once_per_epoch(monkeypatch, drawn):
    monkeypatch.setattr("pipelines.shuffling.DRAWN", drawn)
    parts = [samples_of(50, 16, 3, step) for step in range(25)]
    indices, epochs = (np.concatenate(side) for side in zip(*parts, strict=True))
    orders = [indices[epochs == epoch] for epoch in range(8)]
    assert all(np.array_equal(np.sort(order), np.arange(50)) for order in orders)
    assert not any(np.array_equal(one, other) for one, other in zip(orders, orders[1:], strict=False))


def test_order_of_small_sets_is_the_one_it_always_was():
    """A run that an earlier version began goes on in the same order."""
    indices, _ = samples_of(50, 50, 7, 2)
    assert np.array_equal(indices, np.random.default_rng([7, 2]).permutation(50))


def test_order_of_a_large_set_is_not_held():
    rows = 12_811_670
    tracemalloc.start()
    for step in range(rows // 256 - 2, rows // 256 + 2):  # into the second epoch
        indices, _ = samples_of(rows, 256, 0, step)
        assert indices.min() >= 0 and indices.max() < rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 3), (7, 7), (5, 16), (64, 16)])
def test_every_row_comes_once_per_epoch(rows, batch_size):
    steps = 4 * rows // math.gcd(rows, batch_size)
    drawn = [samples_of(rows, batch_size, 3, step) for step in range(steps)]
    indices, epochs = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    for epoch in range(epochs[-1] + 1):
        assert sorted(indices[epochs == epoch]) == list(range(rows))
    assert (np.diff(epochs) >= 0).all()
    first, second = indices[epochs == 0], indices[epochs == 1]
    assert rows < 6 or (first != second).any()


def test_the_order_is_a_pure_function():
    wanted = {step: samples_of(50, 16, 1, step) for step in range(40)}
    for step in np.random.default_rng(0).permutation(40):  # out of order, and with caches of other runs between
        samples_of(50, 16, 2, int(step))
        assert all((a == b).all() for a, b in zip(samples_of(50, 16, 1, int(step)), wanted[step], strict=True))
    assert any((wanted[step][0] != samples_of(50, 16, 2, step)[0]).any() for step in range(4))


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
