"""Samples are drawn in small batches, kept as bytes, and found again by their number."""

from __future__ import annotations

import pytest
import torch

from pipelines.images import to_float, to_uint8
from pipelines.metrics import samples as module
from pipelines.metrics.samples import Samples
from pipelines.processes.group import ProcessGroup


def numbered(start: int, end: int) -> torch.Tensor:
    """Image k is k grey levels bright."""
    return to_float(torch.arange(start, end, dtype=torch.uint8)).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 3)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "AT_A_TIME", 10)
    monkeypatch.setattr(module, "DRAWN", 4)


def test_each_is_drawn_once_in_its_place():
    asked: list[tuple[int, int]] = []
    made = Samples(lambda start, end: (asked.append((start, end)), numbered(start, end))[1], 23)
    assert asked == [(0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20), (20, 23)]
    assert list(made.parts) == [0, 10, 20] and made.count == 23
    assert torch.equal(torch.cat([made.images(part) for part in made.parts]), numbered(0, 23))
    assert torch.equal(made.select([22, 0, 11]), torch.cat([numbered(k, k + 1) for k in (22, 0, 11)]))
    for count in (23, 20, 13, 3):
        rows = made.rows(lambda images: images[:, 0, :, 0], count)
        assert torch.equal(rows, numbered(0, count)[:, 0, :, 0])


def test_what_is_held_are_bytes_of_the_own_parts():
    """A second process of two keeps the second part alone; the others' are asked for."""

    class Second(ProcessGroup):
        def gather(self, act):
            return [act()]

    made = Samples(numbered, 23, Second(1, 2))
    (kept,) = made._mine.items()
    assert kept[0] == 10 and kept[1].dtype == torch.uint8 and len(kept[1]) == 10
    assert torch.equal(kept[1], to_uint8(numbered(10, 20)))


def test_the_clock_waits_for_the_last_image(monkeypatch):
    """On a GPU, a call returns before its work is done: it is when its result is fetched."""
    clock = [0.0]

    class Late(torch.Tensor):
        """Images that are ready, ten seconds later, on whatever asks for them on the CPU."""

        def cpu(self):
            clock[0] += 10.0
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    assert Samples(lambda start, end: numbered(start, end).as_subclass(Late), 4).seconds == 10.0
