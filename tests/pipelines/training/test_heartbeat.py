"""What is said of an error that comes up in a run. (Lost and late processes: `tests/project/test_faults.py`.)"""

from __future__ import annotations

import errno

import pytest

from pipelines.config import UserError
from pipelines.config.command import Interrupted, ProcessLost, RunError, exit_codes
from pipelines.training.heartbeat import Heartbeat, told_where


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
