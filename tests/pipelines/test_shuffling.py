"""Orders of rows and random numbers of each row: functions of (seed, epoch, row) alone."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.shuffling import (
    OTHER,
    draw_by_row,
    other_labels,
    permute,
    permute_blocks,
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


@settings(deadline=None)
@given(st.integers(1, 1000), st.sampled_from([None, 4, 16]), st.integers(0, 2**64), st.data())
def test_every_row_comes_once_and_any_position_can_be_computed_alone(rows, block, key, data):
    def order(positions):
        return permute(positions, rows, key) if block is None else permute_blocks(positions, rows, block, key)

    whole = order(np.arange(rows))
    assert np.array_equal(np.sort(whole), np.arange(rows))
    some = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=9)))
    assert np.array_equal(order(some), whole[some])


def test_all_orders_are_equally_likely():
    """Chi-square tests of the 24 orders of four rows, and of the position of row 0 among 1,000."""
    counts = np.zeros(4**4)
    for key in range(2400):
        counts[int(permute(np.arange(4), 4, key, 1) @ 4 ** np.arange(4))] += 1
    counts = counts[counts > 0]
    assert len(counts) == 24 and ((counts - 100) ** 2 / 100).sum() < 60  # 23 degrees of freedom, p = 0.00004
    first = np.array([permute(np.array([0]), 1000, key, 1)[0] for key in range(2000)])
    places = np.histogram(first, 20, (0, 1000))[0]
    assert ((places - 100) ** 2 / 100).sum() < 55  # 19 degrees of freedom


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 60), batch_size=st.integers(1, 20), seed=st.integers(0, 99), drawn=st.sampled_from([0, 99]))
def test_every_row_comes_once_per_epoch(monkeypatch, rows, batch_size, seed, drawn):
    """With a drawn permutation and with a computed one; a step does not depend on those before it."""
    monkeypatch.setattr("pipelines.shuffling.MAX_STORED", drawn)
    steps = range(-(-3 * rows // batch_size))
    parts = {step: samples_of(rows, batch_size, seed, step) for step in reversed(steps)}
    indices, epochs = (np.concatenate([parts[step][side] for step in steps]) for side in (0, 1))
    assert (np.diff(epochs) >= 0).all()
    orders = [indices[epochs == epoch] for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(rows)) for order in orders)
    assert rows < 10 or not np.array_equal(orders[0], orders[1])
    samples_of(rows, batch_size, seed + 1, 0)  # fills a cache of orders
    again = samples_of(rows, batch_size, seed, 0)
    assert all(np.array_equal(one, other) for one, other in zip(again, parts[0], strict=True))


def test_blocks_are_read_whole():
    """A window of block^2 rows reads whole blocks of its own, and mixes them."""
    found = permute_blocks(np.arange(16 * 16 * 10), 16 * 16 * 10, 16, 3)
    seen, orders = set(), set()
    for window in found.reshape(10, 256):
        blocks = np.unique(window // 16)
        assert len(blocks) == 16 and not seen & set(blocks)
        assert len(np.unique(window[:16] // 16)) > 5  # not one block after the other
        seen |= set(blocks)
        orders.add(tuple(window % 16))
    assert len(orders) == 10  # each window is mixed in its own way
    assert np.abs(np.diff(sorted(found[:256] // 16))).max() > 16  # the blocks are from all over


def test_the_order_of_small_sets_never_changes():
    """So that runs of earlier versions can be continued."""
    indices, _ = samples_of(50, 50, 7, 2)
    assert np.array_equal(indices, np.random.default_rng([7, 2]).permutation(50))


@settings(deadline=None)
@given(
    st.one_of(st.slices(5), st.lists(st.integers(-5, 4)), st.lists(st.booleans(), min_size=5, max_size=5).map(np.array))
)
def test_rows_are_indexed_as_in_numpy(rows):
    index = rows if isinstance(rows, slice) or len(rows) else slice(0)
    found = positions_of(rows, 5)
    assert found.dtype == np.int64 and np.array_equal(found, np.arange(5)[index])
    if not isinstance(rows, slice):
        assert np.array_equal(positions_of(torch.from_numpy(np.array(rows)), 5), found)


def test_another_label_is_as_frequent_as_its_rows():
    """For classes with 10, 0, 30 and 60 rows; a class without rows is never drawn."""
    counts = torch.tensor([10, 0, 30, 60])
    rows = np.arange(30_000)
    draws = draw_by_row(rows, rows * 0, 5, OTHER)
    for own, shares in {0: [0, 0, 1 / 3, 2 / 3], 2: [1 / 7, 0, 0, 6 / 7], 3: [0.25, 0, 0.75, 0]}.items():
        found = other_labels(torch.full((len(rows),), own), counts, draws)
        assert np.allclose(torch.bincount(found, minlength=4) / len(rows), shares, atol=0.012)


def test_the_ends_of_the_interval_draw_classes():
    counts, almost = torch.tensor([2, 3]), np.array([0.0, np.nextafter(1, 0)])
    for own in (0, 1):
        assert other_labels(torch.tensor([own, own]), counts, almost).tolist() == [1 - own] * 2
    assert other_labels(torch.tensor([1, 1]), torch.tensor([2, 3, 4]), almost).tolist() == [0, 2]
