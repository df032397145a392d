"""Samples are made in small batches, stored as 8-bit images, and selected by number."""

from __future__ import annotations

import pytest
import torch

from pipelines.metrics import samples as module
from pipelines.metrics.samples import EvaluatedSamples
from pipelines.processes.group import ProcessGroup
from tokenizer.spec import to_float, to_uint8


def numbered(start: int, end: int) -> torch.Tensor:
    """Image k is k grey levels bright."""
    return to_float(torch.arange(start, end, dtype=torch.uint8)).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 3)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "AT_A_TIME", 10)
    monkeypatch.setattr(module, "SAMPLED_AT_A_TIME", 4)


def test_each_sample_is_made_once_and_found_by_its_number():
    asked: list[tuple[int, int]] = []
    made = EvaluatedSamples(lambda start, end: (asked.append((start, end)), numbered(start, end))[1], 23)
    assert asked == [(0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20), (20, 23)]
    assert list(made.parts) == [0, 10, 20] and made.count == 23
    assert torch.equal(torch.cat([made.images(part) for part in made.parts]), numbered(0, 23))
    assert torch.equal(made.select([22, 0, 11]), torch.cat([numbered(k, k + 1) for k in (22, 0, 11)]))
    for count in (23, 20, 13, 3):
        rows = made.rows(lambda images: images[:, 0, :, 0], count)
        assert torch.equal(rows, numbered(0, count)[:, 0, :, 0])


def test_a_process_stores_only_its_own_parts():
    """The second process of two stores the second part as bytes."""

    class Second(ProcessGroup):
        def gather(self, act):
            return [act()]

    made = EvaluatedSamples(numbered, 23, Second(1, 2))
    ((part, images),) = made._mine.items()
    assert part == 10 and torch.equal(images, to_uint8(numbered(10, 20)))
