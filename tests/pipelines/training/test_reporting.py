"""What the bar of a run shows, from the first seconds on, without waiting for a GPU."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from pipelines.training import reporting
from pipelines.training.reporting import tick
from pipelines.training.schedule import TrainConfig


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def run(minutes: float | None = 1.0) -> Any:
    return SimpleNamespace(config=TrainConfig(steps=None if minutes else 9, minutes=minutes), minutes=0.25, window={})


def bar_of(steps: int | None, **options: Any) -> tuple[Any, Terminal]:
    out = Terminal()
    options = {"mininterval": reporting.SHOWN_EVERY, "miniters": 1, "ncols": 120, **options}
    return tqdm(total=steps, unit="step", file=out, **options), out


def test_loss_and_time_left_before_the_first_line_of_the_log() -> None:
    training, (bar, out) = run(), bar_of(None)
    training.window = {"loss": [3.0, 2], "l1": [9.0, 2]}
    bar.last_print_t -= 1  # a second has gone by
    tick(bar, training)
    assert "1step" in out.getvalue() and "loss 1.5000, 0.8 of 1 min left" in out.getvalue()


def test_of_several_players_the_first() -> None:
    training, (bar, out) = run(None), bar_of(9)
    training.window = {"model/loss": [1.0, 4], "critic/loss": [8.0, 1]}
    bar.last_print_t -= 1
    tick(bar, training)
    assert "1/9" in out.getvalue() and "loss 0.2500]" in out.getvalue()


def test_what_is_not_known_yet_leaves_what_was_shown() -> None:
    training, (bar, _) = run(), bar_of(None)
    for window in ({"loss": [1.0, 1]}, {}, {"loss": [0.0, 0]}):
        training.window = window
        bar.last_print_t -= 1
        tick(bar, training)
        assert bar.postfix == "loss 1.0000, 0.8 of 1 min left"


@pytest.mark.parametrize("disable", [False, True])
def test_a_step_costs_next_to_nothing(disable: bool) -> None:
    """Two thousand steps in less than half a second are shown twice at most; and no term is looked at in between."""

    class Once(dict[str, Any]):
        looks = 0

        def items(self) -> Any:
            Once.looks += 1
            return super().items()

    training, (bar, out) = run(), bar_of(None, disable=disable)
    training.window = Once(loss=[1.0, 1])
    began = time.monotonic()
    for _ in range(2000):
        tick(bar, training)
    assert time.monotonic() - began < 0.5
    assert Once.looks <= 1 and out.getvalue().count("\r") <= 2
    assert disable or bar.n == 2000
