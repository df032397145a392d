"""What is said of an error that comes up in a run. (Lost and late processes: `test_resume.py`.)"""

from __future__ import annotations

import errno
import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace

import pytest

from pipelines.config import UserError
from pipelines.config.command import Interrupted, ProcessLost, RunError, exit_codes
from pipelines.training.heartbeat import Heartbeat, Sign, told_where


@pytest.fixture
def heartbeat(tmp_path) -> Heartbeat:
    """Of a process that is alone, at a step of a run."""
    heartbeat = Heartbeat(tmp_path, 0, 1, 10.0)
    heartbeat.beat(12, "train")
    return heartbeat


def test_a_bug_keeps_its_traceback_and_the_last_line_says_where(heartbeat, capsys):
    with pytest.raises(SystemExit) as ended, exit_codes(), told_where(heartbeat):
        raise ZeroDivisionError("one by nothing")
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.count("Traceback") == 1 and "RunError" not in printed
    assert 'raise ZeroDivisionError("one by nothing")' in printed
    assert printed.splitlines()[-1] == "error on process 0: step 12 (train): ZeroDivisionError: one by nothing"


def test_a_caller_is_told_where_a_bug_came_up(heartbeat):
    with pytest.raises(RunError, match=r"step 12 \(train\): ZeroDivisionError: no") as caught, told_where(heartbeat):
        raise ZeroDivisionError("no")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_that_another_process_told_of_is_a_lost_process(heartbeat, capsys):
    """It failed in its part of shared work; here it is no bug, and one line says so."""
    with pytest.raises(SystemExit) as ended, exit_codes(), told_where(heartbeat):
        raise ProcessLost("process 1 failed: ZeroDivisionError: no")
    assert ended.value.code == 1
    told = "error on process 0: step 12 (train): process 1 failed: ZeroDivisionError: no\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("lives", [True, False])
def test_a_process_whose_clock_is_behind_is_not_silent(tmp_path, monkeypatch, lives):
    """Clocks of two machines need not agree: what counts is that its sign changes."""
    monkeypatch.setattr("pipelines.training.heartbeat.PERIOD", 0.1)
    heartbeat, ended = Heartbeat(tmp_path, 0, 2, 60.0), threading.Event()
    other = Sign(1, 1, "elsewhere", 12, "train", time.time() - 1000, time.time() - 1000)

    def write() -> None:
        done = tmp_path / "other"
        while True:
            done.write_text(json.dumps(asdict(replace(other, alive=time.time() - 1000) if lives else other)))
            done.replace(heartbeat.folder / "1")
            if ended.wait(0.02):
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        until = time.monotonic() + 5
        while not heartbeat.others() and time.monotonic() < until:
            time.sleep(0.01)
        told = heartbeat.explain(RuntimeError("gloo: connection closed"), 0.2)
    finally:
        ended.set()
        writer.join()
        heartbeat.close()
    assert told is None if lives else told and "process 1 (elsewhere) is silent at step 12 (train)" in told


def test_a_process_that_waits_for_a_late_one_ends_also_where_it_cannot_say_so(heartbeat, monkeypatch):
    """Its terminal is gone, or its log is on a full disk: it would wait for ever."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left")

    def end(code):
        ended.append(code)
        heartbeat._closed.set()

    ended: list[int] = []
    monkeypatch.setattr("builtins.print", full)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr(heartbeat, "timeout", 0.1)
    monkeypatch.setattr(heartbeat, "_late", lambda: "process 1 is gone")
    with suppress(OSError):
        heartbeat._watch()
    assert ended == [1]


@pytest.mark.parametrize("slept", [True, False])
def test_a_process_that_this_one_has_not_waited_for_is_not_late(tmp_path, monkeypatch, slept):
    """After a machine has slept, or its clock was set, all came to where they are long ago; what counts is how long
    this one has waited."""
    heartbeat = Heartbeat(tmp_path, 0, 1, 60.0)
    heartbeat.beat(12, "train")
    monkeypatch.setattr(heartbeat, "world", 2)
    monkeypatch.setattr("pipelines.training.heartbeat.PERIOD", 0.0)
    heartbeat.folder.mkdir()
    now, steady = time.time() + 3600, time.monotonic() + (0 if slept else 3600)
    other = Sign(1, 1, "elsewhere", 12, "validate", now - 3600, now)
    (heartbeat.folder / "1").write_text(json.dumps(asdict(other)))
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "monotonic", lambda: steady)
    late = heartbeat._late()
    monkeypatch.undo()
    expected = "process 1 (elsewhere) has been at step 12 (validate) for 3600 s; train.timeout=60 allows no more"
    assert late == (None if slept else expected)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("train.lr: too much"), 2, "error: train.lr: too much"),
        (OSError(errno.ENOSPC, "No space left", "run/state"), 1, "error: run/state: No space left"),
        (Interrupted(), 130, ""),
    ],
)
def test_what_is_no_bug_stays_what_it_is(heartbeat, capsys, error, code, line):
    with pytest.raises(SystemExit) as ended, exit_codes(), told_where(heartbeat):
        raise error
    assert ended.value.code == code and ended.value.__cause__ is error
    assert capsys.readouterr().err.strip() == line
