"""Ctrl-C, SIGTERM, a closed terminal or a dead launcher: a run saves itself and resumes to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from folders import half_written
from launch import ROOT, end, environment, metrics, states, tensors, tokenizer_arguments, two_processes
from one_process import one_process
from processes import kill, printed_in, start_file
from tiny_task import TinyTask, assert_same_run, stopped_at, train_tiny

from pipelines import generate
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
    "the last evaluation": (TinyTask, "evaluate", 4),
    "the evaluation": (TinyTask, "evaluate", 2),
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


def test_leftovers_of_killed_processes_are_deleted_and_nothing_else(tmp_path, whole):
    run = tmp_path / "run"
    with stopped_at(7):
        train_tiny(run, **EVERY)
    (run / "tokenizer").mkdir()
    names = ("metrics.jsonl", "config.json", "trackers.json", "bad_images.jsonl", "previews/shade-00000006.png")
    leftovers = [run / half_written(tmp_path / "other" / name).relative_to(tmp_path / "other") for name in names]
    leftovers += [
        run / "state" / name / "x" for name in (".tmp-step-00000009-0123abcd", ".del-step-123456789-0123abcd")
    ]
    leftovers += [run / f".{name}-tokenizer-0123abcd" / "config.json" for name in ("tmp", "del")]
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
    """`nohup` ignores SIGHUP."""
    stop, before = Stop(tmp_path), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handle_signals(stop, alone=True):
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_requested()
    signal.signal(signal.SIGHUP, before)


def test_the_command_line_ends_by_the_signal(monkeypatch, capsys):
    """A shell's loop continues after any exit code, but not after a command that died of SIGINT."""
    monkeypatch.setattr(sys, "argv", ["smalti", "pipeline=x"])
    monkeypatch.setattr(sys, "excepthook", print)
    with pytest.raises(KeyboardInterrupt):
        run_command(generate.GenerateConfig, Mock(side_effect=KeyboardInterrupt), verb="generate", description=None)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)  # prints nothing
    assert capsys.readouterr() == ("", "error: interrupted\n")


# Commands

LAUNCHER = """
import os
if os.fork():
    os.wait()
else:
    from pipelines import train_tokenizer
    train_tokenizer.main()
"""
STUCK = """
import time
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


@pytest.fixture
def start_script(tmp_path: Path) -> Any:
    """Start a script with arguments; returns its process and the file of its output. Kills all processes at the end."""
    started: list[ForkServerProcess] = []

    def start(script: str, argv: list[str]) -> tuple[ForkServerProcess, Path]:
        (tmp_path / "script.py").write_text(script)
        process = start_file(
            [str(tmp_path / "script.py"), *argv], tmp_path / "printed", ACCELERATE_MIXED_PRECISION="no"
        )
        started.append(process)
        return process, tmp_path / "printed"

    yield start
    for process in started:
        kill(process)


def wait_until(condition: Callable[[], bool], output: Path) -> None:
    until = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < until, printed_in(output)
        time.sleep(0.01)


def is_training(run: Path) -> bool:
    log = run / "metrics.jsonl"
    return log.exists() and log.read_text().count("\n") >= 3


def assert_saved_once(run: Path, printed: str) -> None:
    """Assert that the run was saved at the step that it names."""
    (state,) = states(run)
    step = int(state.name[5:])
    assert printed.count(f"{run}: stopped at step {step}; the same command continues\n") == 1 and step < 20000
    assert metrics(run)[-1]["step"] in (step - 1, step) and tensors(state) and not list(run.glob(".tmp-*"))


@pytest.mark.timeout(180)
def test_a_run_saves_once_and_ends_when_its_launcher_is_killed(tmp_path, start_script):
    """It notices that it is an orphan."""
    run = tmp_path / "run"
    launcher, output = start_script(LAUNCHER, tokenizer_arguments(run, train__steps=20000))
    wait_until(lambda: is_training(run), output)
    (worker,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    running = psutil.wait_procs([worker], timeout=40)[1]
    for process in running:
        process.kill()
    assert not running, printed_in(output)
    assert_saved_once(run, printed_in(output))


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_two_processes_save_once_and_end_with_their_launcher(tmp_path, number):
    """Ctrl-C reaches the whole process group, other signals only the launcher."""
    run, output = tmp_path / "run", tmp_path / "printed"
    argv = two_processes("train_tokenizer", tokenizer_arguments(run, train__steps=20000))
    with output.open("w") as file:
        job = subprocess.Popen(
            argv, cwd=ROOT, env=environment(), stdout=file, stderr=file, text=True, start_new_session=True
        )
    try:
        wait_until(lambda: is_training(run), output)
        workers = psutil.Process(job.pid).children(recursive=True)
        (os.killpg if number == signal.SIGINT else os.kill)(job.pid, number)
        job.wait(40)
        assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=40)[1], output.read_text()
    finally:
        end(job)
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert_saved_once(run, output.read_text())
    assert output.read_text().count(f"{run}: {FIRST}\n") == (number == signal.SIGINT)
    assert job.returncode or number == signal.SIGTERM


@pytest.mark.timeout(180)
def test_a_second_ctrl_c_ends_a_stuck_step_at_once(tmp_path, start_script):
    """The last line names what is saved."""
    run = tmp_path / "run"
    process, output = start_script(STUCK, tokenizer_arguments(run, train__steps=20000, train__save_every=4))
    for text, pause in (("stuck", 0.0), (FIRST, 1.2 * stopping.FORWARDED)):
        wait_until(lambda text=text: text in printed_in(output), output)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGINT)
    process.join(20)
    printed = printed_in(output)
    line = f"{run}: stopped at once; step 4 is saved; the same command continues from there\n"
    assert printed.count(line) == 1 and "stopped at step" not in printed
    assert process.exitcode == -signal.SIGINT and len(states(run)) == 1
