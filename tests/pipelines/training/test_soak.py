"""A run holds on to nothing: threads, handles and memory are at its end what they were; and growth would be seen.

The long ones: `python -m benchmarks.trust.soak`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import output_of, start, train_tokenizer
from trust.soaking import Soak, at_rest, grown, held, repeat, slope, watching_steps

ROOT = Path(__file__).parents[3]
OFTEN = {"train__steps": 24, "train__save_every": 3, "train__preview_every": 6, "train__batch_size": 4}


def test_a_run_ends_with_the_threads_and_handles_that_it_began_with(tmp_path, one_process):
    """And has no more of them, nor of states, after its eighth save than after its third."""
    train_tokenizer(tmp_path / "first", **{**OFTEN, "train__steps": 3})  # what is made once in a process
    before, soak = at_rest(), Soak(None, "run", 6, tmp_path / "run")
    with watching_steps(soak):
        train_tokenizer(tmp_path / "run", **OFTEN)
    end = time.monotonic() + 20  # a thread of the run, or of an earlier test, may be about to end
    while any(now > then for now, then in zip(at_rest(), before, strict=True)) and time.monotonic() < end:
        time.sleep(0.2)
    threads, handles = at_rest()
    assert threads <= before[0], [thread.name for thread in threading.enumerate()]
    assert handles <= before[1], [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert len(soak.rows) == 4 and soak.rows[-1]["states"] == 2 and soak.rows[-1]["files"] > 10
    assert [
        line for line in grown(soak.rows, 1000) if line.split()[0] in ("threads", "handles", "children", "states")
    ] == []


def keeps_tensors(kept: list[Any], number: int) -> None:
    kept.append(torch.zeros(1 << 16))


def keeps_objects(kept: list[Any], number: int) -> None:
    kept.append([{"step": [number]} for _ in range(20)])


def remembers_seeds(kept: list[Any], number: int) -> None:
    kept.append({number: {"seed": number, "drawn": [torch.zeros(3) for _ in range(20)]}})


def leaves_files_open(kept: list[Any], number: int) -> None:
    kept.append(Path(__file__).open())  # noqa: SIM115 (that is the mistake)


def leaves_threads(kept: list[Any], number: int) -> None:
    thread = threading.Thread(target=kept[0].wait, daemon=True)
    thread.start()


def gets_slower(kept: list[Any], number: int) -> None:
    sum(range(4000 * number))


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (keeps_tensors, {"memory_mb"}),
        (keeps_objects, {"objects"}),
        (remembers_seeds, {"objects"}),
        (leaves_files_open, {"handles"}),
        (leaves_threads, {"threads"}),
        (gets_slower, {"a"}),
        (lambda kept, number: torch.zeros(1 << 16).sum(), set()),
    ],
    ids=["tensors", "objects", "a cache", "files", "threads", "time", "nothing"],
)
def test_what_grows_is_found(work: Callable[[list[Any], int], None], told: set[str], monkeypatch):
    """Handles and threads whatever the limit on memory is; time where it is not that of nothing."""
    kept: list[Any] = [threading.Event()]
    soak = Soak(None, "planted", 8)
    repeat(soak, lambda number: work(kept, number), rounds=64)
    first = {line.split()[0] for line in grown(soak.rows, 1000)}
    kept[0].set()
    for each in kept[1:]:
        getattr(each, "close", int)()
    assert told <= first and (first <= told | {"objects", "memory_mb", "a"} if told else first <= {"a"})


def test_growth_is_told_by_the_median_of_all_pairs():
    rows = [{"step": step, "threads": 0.01 * step + (500 if step == 70 else 0)} for step in range(0, 100, 10)]
    assert slope(rows, "threads", 1000) == pytest.approx(10)
    assert held()["memory_mb"] > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [["what=run", "steps=1200", "every=40", "only=tokenizer,prior"], ["what=pipeline", "minutes=4"]],
    ids=["run", "pipeline"],
)
def test_nothing_grows_in_a_while(argv, tmp_path):
    """The campaign, shorter; it ends with 1 where something is not as promised."""
    command = [sys.executable, "-m", "benchmarks.trust.soak", *argv, f"out={tmp_path}"]
    printed = output_of(start(command), 3000, code=None)
    assert "NOT AS PROMISED" not in printed and "|" in printed, printed[-3000:]
