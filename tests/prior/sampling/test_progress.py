"""Bars: what they are told, and when there is none."""

from __future__ import annotations

from typing import Any

import pytest
import tqdm
from prior.sampling.progress import progress_of_long, progress_over

from prior.sampling import progress


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each is told."""
    told: list[dict[str, Any]] = []

    class Bar(list):
        _instances: tuple[object, ...] = ()

        def __init__(self, steps: Any, **how: Any) -> None:
            super().__init__(steps)
            told.append(how)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    return told


OWN = {"desc": "sampling", "unit": "token", "leave": False, "disable": None}  # None: on a terminal alone


def test_a_bar_is_told_what_it_is_of_and_what_a_caller_says(bars):
    steps = [1, 2, 3]
    assert progress_over(steps, False) is steps and bars == []
    assert progress_over(steps, True) == steps and progress_over(steps, {}, unit="pass") == steps
    assert progress_over(steps, {"desc": "digits", "leave": True, "ncols": 3}) == steps
    assert bars == [OWN, {**OWN, "unit": "pass"}, {**OWN, "desc": "digits", "leave": True, "ncols": 3}]


def test_what_takes_long_has_a_bar_unless_another_is_there(bars, monkeypatch):
    one, two = [1], [1, 2]
    assert progress_of_long(two, False, "encoding") is two and progress_of_long(one, True, "encoding") is one
    assert bars == []
    assert progress_of_long(two, True, "encoding") == two == progress_of_long(two, {"delay": 0.5}, "encoding")
    parts = {**OWN, "desc": "encoding", "unit": "part"}
    assert bars == [{**parts, "delay": 2.0}, {**parts, "delay": 0.5}] and progress.LONG == 2.0
    monkeypatch.setattr(tqdm.tqdm, "_instances", (object(),))
    assert progress_of_long(two, True, "encoding") is two and len(bars) == 2
    monkeypatch.delattr(tqdm.tqdm, "_instances")
    assert progress_of_long(two, True, "encoding") == two and len(bars) == 3
