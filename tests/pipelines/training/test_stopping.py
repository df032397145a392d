"""Ctrl-C, SIGTERM, a closed terminal or a dead launcher: a run saves itself and resumes to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from folders import half_written
from launch import (
    ROOT,
    end,
    environment,
    metrics,
    one_launched,
    states,
    tensors,
    tokenizer_arguments,
    two_processes,
    verb,
    wait_for,
)
from one_process import one_process
from processes import kill, printed_in, start_file
from tiny_task import TinyTask, assert_same_run, train_tiny

from pipelines import encode, generate
from pipelines import train_tokenizer as train_tokenizer_verb
from pipelines.config import run_command
from pipelines.config.errors import Interrupted
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training import stopping, trainer
from pipelines.training.stopping import Stop, handle_signals
from pipelines.training.trainer import Trainer

EVERY = {"steps": 12, "log_every": 2, "evaluate_every": 4, "preview_every": 6, "save_every": 5}
FIRST = "Ctrl-C: saving, then stopping; press Ctrl-C again to stop at once"


@pytest.fixture(autouse=True)
def signals_as_before(one_process):
    """Check that each test restores the signal handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    with one_process():
        return train_tiny(tmp_path_factory.mktemp("whole") / "run", **EVERY)


@contextmanager
def interrupted() -> Iterator[None]:
    """Expect the run in this block to end after Ctrl-C, saved. (Any other Ctrl-C ends the tests.)"""
    with pytest.raises(KeyboardInterrupt) as caught:
        yield
    assert caught.type is Interrupted


def on_call(monkeypatch: Any, owner: Any, name: str, turn: int = 1, number: int = signal.SIGINT) -> None:
    """Send the signal during the `turn`-th call."""
    call, calls = getattr(owner, name), iter(range(1, 1000))

    def called(*arguments: Any, **named: Any) -> Any:
        if next(calls) == turn:
            os.kill(os.getpid(), number)
        return call(*arguments, **named)

    monkeypatch.setattr(owner, name, called)


PHASES = {
    "the first step": (Trainer, "take_step", 1),
    "a step": (Trainer, "take_step", 7),
    "a step before an evaluation": (Trainer, "take_step", 4),
    "the last evaluation": (TinyTask, "evaluate", 4),
    "the evaluation": (TinyTask, "evaluate", 2),
    "the preview": (TinyTask, "preview", 2),
    "the snapshot": (TinyTask, "save", 2),
    "the checkpoint": (trainer, "write_checkpoint", 1),  # in the writing thread
}


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_saves_and_the_same_command_continues_to_the_bit(tmp_path, whole, monkeypatch, capsys, phase):
    run = tmp_path / "run"
    with monkeypatch.context() as patch, interrupted():
        on_call(patch, *PHASES[phase])
        train_tiny(run, **EVERY)
    step = int(states(run)[-1].name[5:])
    printed = capsys.readouterr().out
    if phase == "the last evaluation":  # nothing is left to do, but the command ends as an interrupted one
        assert ": done: 12 steps" in printed
        assert_same_run(run, whole)
        return
    assert step < 12 and max([0, *(line["step"] for line in metrics(run))]) <= step
    assert printed.endswith(f"{run}: stopped at step {step}; the same command continues\n")
    train_tiny(run, **EVERY)
    assert f"continuing from step {step};" in capsys.readouterr().out or step == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_save_and_end_the_command_with_success(tmp_path, whole, monkeypatch, capsys, number):
    before = signal.signal(number, lambda *_: pytest.fail("the run does not handle the signal"))
    with monkeypatch.context() as patch:
        on_call(patch, Trainer, "take_step", 7, number)
        train_tiny(tmp_path / "run", **EVERY)  # raises nothing
    signal.signal(number, before)
    assert "stopped at step 7" in capsys.readouterr().out
    train_tiny(tmp_path / "run", **EVERY)
    assert_same_run(tmp_path / "run", whole)


def test_leftovers_of_killed_processes_are_deleted_and_nothing_else(tmp_path, whole, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_call(patch, Trainer, "take_step", 7, signal.SIGTERM)
        train_tiny(run, **EVERY)
    (run / "tokenizer").mkdir()
    targets = ("metrics.jsonl", "config.json", "trackers.json", "bad_images.jsonl", "previews/shade-00000006.png")
    leftovers = [run / half_written(tmp_path / "other" / name).relative_to(tmp_path / "other") for name in targets]
    folders = ("state/.tmp-step-00000009-0123abcd", "state/.del-step-123456789-0123abcd", ".tmp-tokenizer-0123abcd")
    leftovers += [run / name / "config.json" for name in (*folders, ".del-tokenizer-0123abcd")]
    others = [run / ".tmp-notes-0123abcd", run / "state" / ".tmp-step-00000009-mine"]
    for path in (*leftovers, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    train_tiny(run, **EVERY)
    assert not [path for path in leftovers if path.exists()]
    for path in others:
        path.unlink()
    (run / "tokenizer").rmdir()
    assert_same_run(run, whole)


def test_ctrl_c_before_training_ends_at_once_and_says_what_is_saved(tmp_path, monkeypatch, capsys):
    on_call(monkeypatch, TokenizerTask, "new_tokenizer", 1)
    with pytest.raises(SystemExit) as caught:
        train_tokenizer_verb.main(tokenizer_arguments(tmp_path / "run"))
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["error: interrupted; nothing was saved yet"]


# The signals


def test_a_second_sigint_ends_the_process_unless_it_is_the_first_one_forwarded(tmp_path, monkeypatch):
    stop, ended, clock = Stop(tmp_path), [], iter([10.0, 10.4, 10.6])
    monkeypatch.setattr(stop, "stop_now", lambda: ended.append(True))
    monkeypatch.setattr("pipelines.training.stopping.time.monotonic", lambda: next(clock))
    with handle_signals(stop, alone=True):
        for expected in ([], [], [True]):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.is_requested() and ended == expected


@pytest.mark.parametrize("launcher", ["", "torchrun"])
def test_sigterm_after_ctrl_c_is_a_second_ctrl_c_under_torchrun(tmp_path, monkeypatch, launcher):
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop, ended = Stop(tmp_path), []
    monkeypatch.setattr(stop, "stop_now", lambda: ended.append(True))
    with handle_signals(stop, alone=False):
        for number, expected in ((signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, bool(launcher))):
            os.kill(os.getpid(), number)
            assert bool(ended) == expected


def test_ignored_signals_stay_ignored(tmp_path):
    """`nohup` ignores SIGHUP, and a shell ignores SIGINT for background jobs."""
    stop, before = Stop(tmp_path), {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGHUP)}
    try:
        with handle_signals(stop, alone=True):
            for number in before:
                os.kill(os.getpid(), number)
            assert not stop.is_requested()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_requested()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_other_verbs_report_ctrl_c_in_a_line(tmp_path, monkeypatch, capsys):
    interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(encode, "build_accelerator", interrupt)
    monkeypatch.setattr(generate, "join_group", interrupt)
    for command, argv in ((encode, ["tokenizer=x", f"out={tmp_path}/tokens"]), (generate, ["pipeline=x"])):
        with pytest.raises(SystemExit) as caught:
            command.main(argv)
        assert caught.value.code == 130
        assert capsys.readouterr() == ("", "error: interrupted; the same command continues\n")


def test_the_command_line_ends_by_the_signal(monkeypatch, capsys):
    """A shell's loop continues after any exit code, but not after a command that died of SIGINT."""

    def interrupted(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["smalti", "pipeline=x"])
    monkeypatch.setattr(sys, "excepthook", print)
    with pytest.raises(KeyboardInterrupt):
        run_command(generate.GenerateConfig, interrupted, verb="generate", description=None)
    assert capsys.readouterr().err == "error: interrupted\n"
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr() == ("", "")


# Commands

LAUNCHERS = {
    "a launcher": lambda argv: ["bash", "-c", 'ACCELERATE_MIXED_PRECISION=no "$@" & wait', "", *verb(*argv)],
    "accelerate, 1 process": lambda argv: one_launched(*argv),
    "accelerate, 2 processes": lambda argv: two_processes(*argv),
}


@pytest.fixture
def start_command(tmp_path):
    """Return a function that starts a command in its own process group, as a shell does, and returns it and the file of
    its output; kill all of them at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(argv: list[str]) -> tuple[subprocess.Popen[str], Path]:
        path = tmp_path / f"printed-{len(started)}"
        with path.open("w") as file:
            process = subprocess.Popen(
                argv, cwd=ROOT, env=environment(), stdout=file, stderr=file, text=True, start_new_session=True
            )
        started.append(process)
        return process, path

    yield start
    for process in started:
        end(process)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("a launcher", signal.SIGKILL),
        *(
            pytest.param(f"accelerate, {processes}", number, marks=pytest.mark.slow)
            for processes, number in (
                ("1 process", signal.SIGTERM),
                ("1 process", signal.SIGINT),
                ("2 processes", signal.SIGTERM),
                ("2 processes", signal.SIGINT),
                ("2 processes", signal.SIGKILL),
            )
        ),
    ],
)
def test_a_run_saves_once_and_ends_with_its_launcher(tmp_path, start_command, launcher, number):
    """Ctrl-C reaches the whole process group, other signals only the launcher. A killed launcher cannot stop its
    processes; they notice that it is gone."""
    run = tmp_path / "run"
    argv = tokenizer_arguments(run, train__steps=20000)
    job, output = start_command(LAUNCHERS[launcher](("train_tokenizer", argv)))
    log = run / "metrics.jsonl"
    assert wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3, job, 90), output.read_text()
    workers = psutil.Process(job.pid).children(recursive=True)
    assert len(workers) == (2 if "2" in launcher else 1)
    (os.killpg if number == signal.SIGINT else os.kill)(job.pid, number)
    job.wait(40)
    assert not psutil.wait_procs(workers, timeout=40)[1], output.read_text()  # they may outlive the launcher
    printed, (state,) = output.read_text(), states(run)
    step = int(state.name[5:])
    assert printed.count(f"{run}: stopped at step {step}; the same command continues\n") == 1 and step < 20000
    assert printed.count(f"{run}: {FIRST}\n") == (number == signal.SIGINT)
    assert metrics(run)[-1]["step"] in (step - 1, step) and tensors(state) and not list(run.glob(".tmp-*"))
    assert job.returncode or number == signal.SIGTERM


STUCK = """
import sys, time
from pipelines import train_tokenizer
from pipelines.training.trainer import Trainer
take_step = Trainer.take_step
def stuck(trainer, *rest):
    while trainer.step == 6:
        print("stuck", flush=True)
        time.sleep(3600)
    take_step(trainer, *rest)
Trainer.take_step = stuck
train_tokenizer.main()
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("saved", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_a_second_ctrl_c_ends_a_stuck_step_at_once(tmp_path, saved):
    """The last line names what is saved."""
    run, script, output = tmp_path / "run", tmp_path / "stuck.py", tmp_path / "printed"
    script.write_text(STUCK)
    argv = tokenizer_arguments(run, train__steps=20000, train__save_every=saved or 1000)
    process = start_file([str(script), *argv], output)
    try:
        for text, pause in (("stuck", 0.0), (FIRST, 1.2 * stopping.FORWARDED)):
            until = time.monotonic() + 90
            while text not in printed_in(output):
                assert time.monotonic() < until, printed_in(output)
                time.sleep(0.01)
            time.sleep(pause)
            os.kill(process.pid, signal.SIGINT)
        process.join(20)
    finally:
        kill(process)
    expected = "step 4 is saved; the same command continues from there" if saved else "nothing was saved yet"
    printed = printed_in(output)
    assert printed.count(f"{run}: stopped at once; {expected}\n") == 1 and "stopped at step" not in printed
    assert process.exitcode == -signal.SIGINT and len(states(run)) == bool(saved)
