"""Prefetching keeps the order, and makes only a few items ahead."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pipelines.prefetch import move_batch_async, pin_memory, prefetch
from prior.given import Given


def test_items_keep_their_order_and_are_made_once_by_one_thread():
    made, threads = [], set()

    def make(item):
        threads.add(threading.get_ident())
        made.append(item)
        time.sleep(0.002 * (item % 3 == 0))
        return item * item

    assert list(prefetch(make, range(20))) == [item * item for item in range(20)]
    assert made == list(range(20)) and len(threads) == 1 and threading.get_ident() not in threads
    assert list(prefetch(make, range(1))) == [0] and list(prefetch(make, ())) == []


def test_an_error_is_raised_at_its_item_and_closing_ends_the_thread():
    made, begun, free = [], threading.Event(), threading.Event()

    def make(item):
        made.append(item)
        if item == 1:
            begun.set()
            free.wait(10)
        if item == 3:
            raise KeyboardInterrupt
        return item

    stream = prefetch(make, range(9))
    assert next(stream) == 0 and begun.wait(10)
    threading.Timer(0.05, free.set).start()
    stream.close()
    assert made == [0, 1] and not [t for t in threading.enumerate() if t.name.startswith("ahead")]
    stream = prefetch(make, range(9))
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert list(stream) == [] and len(made) <= 2 + 6


def test_tensors_and_what_is_given_are_moved_to_the_device():
    given = Given({}, {"age": torch.zeros(3, 1)}, 3)
    batch = move_batch_async((torch.zeros(3, dtype=torch.uint8), given, "name"), torch.device("meta"))
    assert batch[0].device.type == "meta" and batch[0].dtype == torch.uint8 and batch[2] == "name"
    assert batch[1].rows["age"].device.type == "meta" and len(batch[1]) == 3
    if torch.cuda.is_available():
        assert pin_memory((torch.zeros(3), None))[0].is_pinned()
