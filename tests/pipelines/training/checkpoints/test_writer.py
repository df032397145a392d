"""A thread writes resume states while training goes on: what it writes is of one step, and nobody forgets to wait."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest
from launch import assert_equal_tensors, exact, states, tensors, train_tokenizer

from pipelines.config import UserError
from pipelines.config.command import RunError
from pipelines.training import loop as training
from pipelines.training import tracking
from pipelines.training.checkpoints import states as checkpoint
from pipelines.training.checkpoints.rotation import step_of
from pipelines.training.checkpoints.writer import Writer
from tokenizer.files import verify_manifest

pytestmark = pytest.mark.usefixtures("one_process")

SAVES = {"train__save_every": 4, "train__evaluate_every": 4, "train__log_every": 7}


def said(state) -> dict:
    """What a state says, but for the clock."""
    document = json.loads((state / "state.json").read_text())
    del document["counters"]["minutes"]
    return document


def slow_writes(monkeypatch, steps: int) -> dict[str, list]:
    """A state is written until so many of the 12 steps more are taken, and a little longer. Returns, of each state,
    which step came last before it was complete."""
    write, take_step = checkpoint._save, training.take_step
    seen, moved = {"taken": [0], "complete": []}, threading.Condition()

    def writing(target, *rest):
        with moved:
            assert moved.wait_for(lambda: seen["taken"][-1] >= min(12, step_of(target) + steps), timeout=120)
        time.sleep(0.1)
        write(target, *rest)
        seen["complete"].append((step_of(target), seen["taken"][-1]))

    def stepping(run, *rest):
        take_step(run, *rest)
        with moved:
            seen["taken"].append(run.step)
            moved.notify_all()

    monkeypatch.setattr(checkpoint, "_save", writing)
    monkeypatch.setattr(training, "take_step", stepping)
    return seen


def test_training_goes_on_while_a_state_of_one_step_is_written(tmp_path, monkeypatch):
    expected = train_tokenizer(tmp_path / "expected", **SAVES)
    with monkeypatch.context() as patch:
        seen = slow_writes(patch, 3)
        run = train_tokenizer(tmp_path / "run", **SAVES)
    assert [step for step, _ in seen["complete"]] == [4, 8, 12]
    assert all(taken >= min(12, step + 3) for step, taken in seen["complete"])
    assert exact(run) == exact(expected)
    assert said(states(run)[0])["counters"]["window"]
    for state, other in zip(states(run), states(expected), strict=True):
        verify_manifest(state)
        assert said(state) == said(other)
        assert_equal_tensors(tensors(state), tensors(other))


def test_one_state_at_a_time(tmp_path, monkeypatch):
    """The next save waits for the one before, and has it written whole."""
    seen = slow_writes(monkeypatch, 4)
    run = train_tokenizer(tmp_path / "run", **SAVES)
    assert [taken for _, taken in seen["complete"]] == [8, 12, 12]
    assert [step_of(path) for path in states(run)] == [8, 12]


def test_an_error_waits_for_the_state_that_is_being_written(tmp_path, monkeypatch):
    slow_writes(monkeypatch, 1)
    take_step = training.take_step

    def failing(run, *rest):
        take_step(run, *rest)
        if run.step == 5:
            raise UserError("enough")

    monkeypatch.setattr(training, "take_step", failing)
    with pytest.raises(UserError, match="enough"):
        train_tokenizer(tmp_path / "run", **SAVES)
    (state,) = states(tmp_path / "run")
    assert state.name == "step-00000004"
    verify_manifest(state)


@pytest.mark.parametrize("failing", [8, 12])
def test_a_disk_that_fails_while_training_goes_on_is_told(tmp_path, monkeypatch, capsys, failing):
    """In a warning that names the step; it costs the run only if it was the last."""
    write = checkpoint.write_manifest

    def broken(folder, **facts):
        if facts["step"] == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(folder, **facts)

    monkeypatch.setattr(checkpoint, "write_manifest", broken)
    if failing == 12:
        with pytest.raises(UserError, match=r"the run is not saved: step 12: .*Input/output error"):
            train_tokenizer(tmp_path / "run", **SAVES)
    else:
        train_tokenizer(tmp_path / "run", **SAVES)
    told = capsys.readouterr()
    assert told.err.count(f"warning: not saved: step {failing}: ") == 1 and "older states are kept" in told.err
    assert (": done: 12 steps" in told.out) == (failing == 8)
    assert [path.name for path in states(tmp_path / "run")] == [
        f"step-{step:08d}" for step in sorted({4, 8, 12} - {failing})
    ]


def test_a_disk_that_is_gone_for_a_while_costs_no_more_than_what_was_to_be_written(tmp_path, monkeypatch, capsys):
    """Not even what is free can be asked: as of a server of files that is away."""
    save, usage = training.save, shutil.disk_usage

    def gone(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def save_late(run, *rest, **options):
        with monkeypatch.context() as patch:
            if run.step == 8:
                patch.setattr(shutil, "disk_usage", gone)
                patch.setattr(tracking, "save_picture", gone)
                run.tracker.images(8, {"lost": np.zeros((2, 2, 3), np.uint8)})
            save(run, *rest, **options)

    monkeypatch.setattr(training, "save", save_late)
    train_tokenizer(tmp_path / "run", **SAVES)
    told = capsys.readouterr()
    assert "lost-00000008.png is left out: [Errno 116] Stale file handle; the disk is gone" in told.err
    assert told.err.count("warning: not saved: step 8: ") == 1 and ": done: 12 steps" in told.out
    assert [step_of(path) for path in states(tmp_path / "run")] == [4, 12] and shutil.disk_usage is usage


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    """Its lines, and warnings of what is not written, are lost."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = checkpoint.write_manifest

    def broken(folder, **facts):
        if facts["step"] == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, **facts)

    monkeypatch.setattr(checkpoint, "write_manifest", broken)
    monkeypatch.setattr(sys, "stderr", Full())
    run = train_tokenizer(tmp_path / "run", **SAVES)
    assert [step_of(path) for path in states(run)] == [4, 12]


def test_a_bug_of_the_thread_ends_the_run(tmp_path, monkeypatch):
    def wrong(folder, **facts):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(checkpoint, "write_manifest", wrong)
    with pytest.raises(RunError, match=r"step [4-8] .*ZeroDivisionError: a bug"):
        train_tokenizer(tmp_path / "run", **SAVES)
    assert not states(tmp_path / "run")


def test_what_the_thread_raised_is_raised_once():
    writer, begun = Writer(), threading.Event()

    def write():
        begun.wait()
        raise KeyError("lost")

    writer.start(write)
    writer.check()  # it is still at work
    begun.set()
    with pytest.raises(KeyError, match="lost"):
        writer.wait()
    writer.wait()
    writer.close()


def test_all_is_written_in_turn_by_a_thread_that_a_traceback_names():
    writer, done, names = Writer(), [], set()
    for number in range(3):

        def write(number: int = number) -> None:
            time.sleep(0.01 * (3 - number))
            names.add(threading.current_thread().name)
            done.append(number)

        writer.start(write)
        assert done == list(range(number))  # the one before is written
    writer.close()
    assert done == [0, 1, 2] and names == {"writer_0"}
