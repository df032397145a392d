"""The order of images in shards: every one once an epoch, shuffled, with few blocks open at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from givens.streams import streams_of

from pipelines.images.shards.order import ShardOrder, drawn_by_blocks
from pipelines.training.schedule import TrainConfig
from pipelines.training.task import Task


def random_order(rng: np.random.Generator) -> ShardOrder:
    starts = np.cumsum([0, *rng.integers(1, 12, rng.integers(1, 40))])
    return ShardOrder(starts, int(rng.integers(1, starts[-1] + 3)))


@pytest.mark.parametrize("seed", range(20))
def test_every_image_comes_once_per_epoch_whatever_is_resumed(seed):
    """Steps are asked for at random, by orders that know nothing of each other's."""
    rng = np.random.default_rng(seed)
    order = random_order(rng)
    size = int(rng.integers(1, 2 * order.rows))
    steps = -(-3 * order.rows // size)
    found = {}
    for step in rng.permutation(steps).tolist():
        fresh = order if rng.random() < 0.7 else ShardOrder(order.starts, order.window)
        found[step] = fresh.samples(size, seed, step)
    indices, epochs = (np.concatenate([found[step][part] for step in range(steps)]) for part in (0, 1))
    for epoch in range(3):
        assert sorted(indices[epochs == epoch]) == list(range(order.rows))
    assert all(set(np.diff(np.sort(np.unique(found[step][1])))) <= {1} for step in range(steps))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_shares_the_same_batches(processes):
    order = ShardOrder(np.arange(0, 101, 5), 20)
    task: Any = Task()
    task.rows, task.samples, task.batch = 100, order.samples, lambda indices, epochs, seed: (indices, epochs)
    config = TrainConfig(batch_size=24, seed=3)
    streams = streams_of(task, config, 9, processes)
    for step in range(9, 30):
        together = [np.concatenate(parts) for parts in zip(*(next(stream)[0] for stream in streams), strict=True)]
        assert all((a == b).all() for a, b in zip(together, order.samples(24, 3, step), strict=True))


def test_the_order_is_a_shuffle_and_differs_by_epoch_and_seed():
    order = ShardOrder(np.arange(0, 4001, 20), 400)
    epoch = [
        np.concatenate([order.samples(100, seed, step)[0] for step in range(first, first + 40)])
        for seed, first in ((0, 0), (0, 40), (1, 0))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(np.corrcoef(epoch[one], epoch[other])[0, 1]) < 0.1
    one_block = ShardOrder(np.array([0, 4000]), 400)  # where delays are all that shuffles
    first, second = (np.concatenate([one_block.samples(100, 0, step)[0] for step in range(k, k + 40)]) for k in (0, 40))
    assert (first != second).mean() > 0.9 and (first != np.arange(4000)).mean() > 0.9
    for images in epoch:
        assert np.abs(np.corrcoef(images, np.arange(4000))[0, 1]) < 0.15
        of_a_block = [len(set(batch // 20)) for batch in images.reshape(40, 100)]
        assert np.mean(of_a_block) > 14  # of the 20 that stand in a window, though a block holds 20 images


def test_blocks_are_read_once_and_few_at_a_time():
    """Within an epoch a block is open only while a window passes; eight processes share the reading."""
    order = ShardOrder(np.arange(0, 100_001, 100), 2000)
    blocks = np.concatenate([order.samples(250, 0, step)[0] for step in range(400)]).reshape(400, 250) // 100
    begun, ended = {}, {}
    for step, some in enumerate(blocks):
        for block in some:
            begun.setdefault(block, step)
            ended[block] = step
    open_at = [sum(begun[block] <= step <= ended[block] for block in begun) for step in range(400)]
    assert len(begun) == 1000 and max(open_at) <= 2000 / 100 + 4
    new = np.bincount(list(begun.values()), minlength=400)[20:380]
    assert new.max() <= 8  # of 2.5 on average: nothing is read in bursts
    shares = [len(set(blocks[:, 31 * k : 31 * k + 31].flatten())) for k in range(8)]
    assert sum(shares) < 3 * 1000  # and not 8


def test_blocks_come_whole_in_an_order_of_their_own():
    blocks = np.cumsum([0, 3, 1, 200, 40, 7])
    order = drawn_by_blocks(blocks)
    assert sorted(order) == list(range(251)) and order.tolist() != list(range(251))
    places = np.argsort(order)
    assert all((np.diff(places[begin:end]) == 1).all() for begin, end in pairwise(blocks))
