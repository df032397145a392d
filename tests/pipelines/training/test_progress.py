"""Several processes go by one clock, and hardly ever look at it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipelines.training.progress import ASKED_EVERY, agreed_progress
from pipelines.training.schedule import TrainConfig


def run_by_the_clock(monkeypatch, minutes: float, each: float, processes: int = 2) -> tuple[list[int], float]:
    """Steps of `each` minutes until all agree that it is the end: at which steps the clock of another process was asked
    for, and the minutes by then."""
    asked: list[int] = []
    run = SimpleNamespace(
        config=TrainConfig(steps=None, minutes=minutes),
        task=SimpleNamespace(players=["model"]),
        accelerator=SimpleNamespace(num_processes=processes, device=torch.device("cpu")),
        step=0,
        minutes=0.0,
        clock=None,
    )
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: asked.append(run.step))
    seen = [agreed_progress(run)]
    while agreed_progress(run) < 1:
        run.step, run.minutes = run.step + 1, run.minutes + each
        seen.append(agreed_progress(run))
        assert run.step < 10_000 and seen[-1] >= seen[-2]
    return asked, run.minutes


def test_where_steps_are_short_it_is_asked_for_every_16th(monkeypatch):
    asked, minutes = run_by_the_clock(monkeypatch, 1.0, 0.0005)
    assert ASKED_EVERY == 16 and 2000 / 16 <= len(asked) <= 2000 / 16 + 4
    assert 1.0 <= minutes <= 1.01


@pytest.mark.parametrize("each", [0.003, 0.02, 0.3, 2.0])
def test_where_they_are_long_a_run_is_hardly_too_long(monkeypatch, each):
    asked, minutes = run_by_the_clock(monkeypatch, 1.0, each)
    assert 1.0 <= minutes <= 1.0 + max(0.01, each) + 1e-9
    assert len(asked) == len(set(asked))


def test_one_process_goes_by_its_own(monkeypatch):
    asked, minutes = run_by_the_clock(monkeypatch, 1.0, 0.3, processes=1)
    assert not asked and minutes == pytest.approx(1.2)


def test_steps_are_counted_in_every_step():
    run = SimpleNamespace(config=TrainConfig(steps=8), task=SimpleNamespace(players=["model"]), step=2, clock=None)
    assert agreed_progress(run) == 0.25
