"""Ctrl-C, a closed terminal, launchers: a run that is told to end saves itself, and nothing is lost or done twice."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_wandb import FakeWandb
from launch import (
    ROOT,
    assert_equal_tensors,
    end,
    environment,
    exact,
    metrics,
    one_launched,
    states,
    tensors,
    tokenizer_arguments,
    train_stage,
    two_processes,
    verb,
    wait_for,
)
from one_process import one_process

from pipelines import encode, generate
from pipelines.config import run_command
from pipelines.config.command import Interrupted
from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training import loop as training
from pipelines.training import stopping
from pipelines.training.checkpoints import states as checkpoint
from pipelines.training.stopping import Stop, heeded, what_is_saved
from pipelines.training.tracking import Tracker
from tokenizer.files import verify_manifest

EVERY = {"train__log_every": 2, "train__evaluate_every": 4, "train__preview_every": 6, "train__save_every": 5}
FIRST = "Ctrl-C: ending as soon as all is saved; Ctrl-C again ends at once"
TASKS: dict[str, Any] = {"train_tokenizer": TokenizerTask, "train_prior": PriorTask}


@pytest.fixture(autouse=True)
def signals_as_before(one_process):
    """Each test leaves signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.fixture(scope="module")
def train(tokens) -> Any:
    """Train a stage in this process: `train(stage, folder)`."""

    def call(stage: str, out: Path, **more: Any) -> Path:
        return train_stage(stage, out, tokens, **{**EVERY, **more})

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train) -> dict[str, Path]:
    """Runs that nobody interrupts."""
    with one_process():
        return {stage: train(stage, tmp_path_factory.mktemp("whole") / stage) for stage in TASKS}


@contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C ends what is in here, saved. (Any other Ctrl-C would end the tests.)"""
    with pytest.raises(KeyboardInterrupt) as caught:
        yield
    assert caught.type is Interrupted


def on_call(monkeypatch: Any, owner: Any, name: str, turn: int = 1, number: int = signal.SIGINT) -> None:
    """The signal, in the midst of the `turn`-th call."""
    call, calls = getattr(owner, name), iter(range(1, 1000))

    def called(*arguments: Any, **named: Any) -> Any:
        if next(calls) == turn:
            os.kill(os.getpid(), number)
        return call(*arguments, **named)

    monkeypatch.setattr(owner, name, called)


def assert_the_same(run: Path, expected: Path) -> None:
    """All that no clock is in: figures, weights, averages, moments, the snapshot, pictures; and nothing half done."""
    assert exact(run) == exact(expected)
    assert_equal_tensors(tensors(states(run)[-1]), tensors(states(expected)[-1]))
    for name in ("tokenizer", "pipeline"):
        if (expected / name).exists():
            assert_equal_tensors(tensors(run / name), tensors(expected / name))
    pictures = [{path.name: path.read_bytes() for path in (at / "previews").iterdir()} for at in (run, expected)]
    assert pictures[0] == pictures[1]
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in expected.iterdir())


PHASES = {
    "the first step": (training, "take_step", 1),
    "a step": (training, "take_step", 7),
    "a step after which much is due": (training, "take_step", 4),
    "the evaluation": ("task", "evaluate", 2),
    "the preview": ("task", "preview", 2),
    "the snapshot": ("task", "save", 2),
    "the state": (checkpoint, "write_manifest", 1),  # by a thread, for which the next save waits
}


@pytest.mark.parametrize(
    ("phase", "stage"),
    [
        pytest.param(phase, stage, marks=() if stage == "train_tokenizer" or phase == "a step" else pytest.mark.slow)
        for phase in PHASES
        for stage in TASKS
    ],
)
def test_ctrl_c_saves_and_the_same_command_continues_to_the_bit(
    tmp_path, train, whole, monkeypatch, capsys, stage, phase
):
    run, (owner, name, turn) = tmp_path / "run", PHASES[phase]
    with monkeypatch.context() as patch:
        on_call(patch, TASKS[stage] if owner == "task" else owner, name, turn)
        with interrupted():
            train(stage, run)
    for state in states(run):
        verify_manifest(state)
    printed, last = capsys.readouterr().out, max([0, *(line["step"] for line in metrics(run))])
    step = int(states(run)[-1].name[5:])
    assert step < 12 and last <= step
    assert printed.endswith(f"{run}: told to end at step {step}; the same command continues\n")
    train(stage, run)
    assert f"continuing from step {step};" in capsys.readouterr().out
    assert_the_same(run, whole[stage])


@pytest.mark.parametrize("when", ["evaluate", "close"])
def test_ctrl_c_at_the_end_lets_the_run_finish(tmp_path, train, whole, monkeypatch, capsys, when):
    """The command ends as one that was interrupted, or a loop in a shell would go on; nothing is left to be done."""
    on_call(monkeypatch, *((TokenizerTask, "evaluate", 3) if when == "evaluate" else (Tracker, "close", 1)))
    with interrupted():
        train("train_tokenizer", tmp_path / "run")
    assert ": done: 12 steps" in capsys.readouterr().out
    assert_the_same(tmp_path / "run", whole["train_tokenizer"])


@pytest.mark.parametrize("before", [0, 5])
def test_ctrl_c_before_training_ends_at_once(tmp_path, train, whole, monkeypatch, capsys, before):
    """While images are looked at or models built: nothing was done, so nothing is saved; and one line says so."""
    run = tmp_path / "run"
    if before:
        with monkeypatch.context() as patch, interrupted():
            on_call(patch, training, "take_step", before)
            train("train_tokenizer", run)
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        on_call(patch, TokenizerTask, "samples", 1)
        from pipelines import train_tokenizer as stage

        stage.main(tokenizer_arguments(run, **EVERY))
    assert caught.value.code == 130
    kept = f"step {before} is saved, the same command continues from there" if before else "nothing was saved yet"
    assert capsys.readouterr().err.splitlines() == [f"error: interrupted; {kept}"]
    train("train_tokenizer", run)
    assert_the_same(run, whole["train_tokenizer"])


def test_sighup_saves_as_sigterm_does(tmp_path, train, whole, monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, lambda *_: pytest.fail("nobody heeds it"))
    with monkeypatch.context() as patch:
        on_call(patch, training, "take_step", 7, signal.SIGHUP)
        train("train_tokenizer", tmp_path / "run")  # raises nothing
    signal.signal(signal.SIGHUP, before)
    assert "told to end at step 7" in capsys.readouterr().out
    train("train_tokenizer", tmp_path / "run")
    assert_the_same(tmp_path / "run", whole["train_tokenizer"])


@pytest.mark.parametrize("step", [1, 3])
def test_a_line_that_was_due_is_the_same_runs_and_knows_no_speed(tmp_path, train, monkeypatch, step):
    """Also that of the first step, before which no line is kept: trackers go on with their run."""
    wandb = FakeWandb(monkeypatch)
    settings = {"track__wandb": "offline", "train__log_every": 1, "train__steps": 4}
    with monkeypatch.context() as patch:
        on_call(patch, training, "take_step", step, signal.SIGTERM)
        run = train("train_prior", tmp_path / "run", **settings)
    train("train_prior", run, **settings)
    assert wandb.starts[0]["id"] == wandb.starts[1]["id"]
    assert (
        [at for at, values in wandb.history if "learning_rate" in values]
        == [line["step"] for line in metrics(run)]
        == [1, 2, 3, 4]
    )
    assert [line["step"] for line in metrics(run) if "images_per_second" not in line] == [step]


# The signals


def test_a_launcher_that_passes_ctrl_c_on_has_not_doubled_it(tmp_path, monkeypatch):
    """A second SIGINT ends the process, but not one that comes at once."""
    stop, ended, clock = Stop(tmp_path), [], iter([10.0, 10.4, 10.6])
    monkeypatch.setattr(stop, "end", lambda: ended.append(True))
    monkeypatch.setattr("pipelines.training.stopping.time.monotonic", lambda: next(clock))
    with heeded(stop, alone=True):
        for wanted in ([], [], [True]):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked() and ended == wanted


@pytest.mark.parametrize("launcher", ["", "torchrun"])
def test_torchrun_means_a_second_ctrl_c_by_sigterm(tmp_path, monkeypatch, launcher):
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop, ended = Stop(tmp_path), []
    monkeypatch.setattr(stop, "end", lambda: ended.append(True))
    with heeded(stop, alone=False):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert not ended
        os.kill(os.getpid(), signal.SIGTERM)
        assert bool(ended) == bool(launcher)


def test_what_is_ignored_stays_ignored(tmp_path):
    """`nohup` ignores SIGHUP for a command, and a shell SIGINT for one in the background of a script."""
    stop, before = Stop(tmp_path), {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGHUP)}
    try:
        with heeded(stop, alone=True):
            for number in before:
                os.kill(os.getpid(), number)
            assert not stop.asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_is_saved(tmp_path):
    assert what_is_saved(tmp_path) == "nothing was saved yet"
    for name in ("step-00000008", "step-100000000", ".tmp-step-200000000", "step-half"):
        (tmp_path / "state" / name).mkdir(parents=True)
    assert what_is_saved(tmp_path).startswith("step 100000000 is saved")


# Other verbs


def test_other_verbs_say_that_they_were_interrupted(tmp_path, monkeypatch, capsys):
    """In one line, with the exit code of Ctrl-C; an encode continues."""
    monkeypatch.setattr(encode, "build_accelerator", lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(generate, "joined", lambda device: os.kill(os.getpid(), signal.SIGINT))
    for verb_of, argv, line in (
        (encode, ["tokenizer=x", f"out={tmp_path}/tokens"], "error: interrupted; the same command continues\n"),
        (generate, ["pipeline=x"], "error: interrupted\n"),
    ):
        with pytest.raises(SystemExit) as caught:
            verb_of.main(argv)
        assert caught.value.code == 130 and capsys.readouterr() == ("", line)


def test_the_command_line_ends_by_the_signal(monkeypatch, capsys):
    """A shell's loop goes on after any exit code, but not after a command that died of SIGINT."""

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


class Command:
    """A command in a group of processes of its own, as a shell starts it; Ctrl-C comes to the whole group."""

    def __init__(self, command: list[str], printed: Path, **more: str) -> None:
        self.path = printed
        with printed.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(**more), stdout=file, stderr=file, text=True, start_new_session=True
            )

    def workers(self) -> list[psutil.Process]:
        """The processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def said(self, text: str) -> Any:
        """Whether it has printed this."""
        return lambda: text in self.path.read_text()

    def ctrl_c(self) -> None:
        """What a terminal sends."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, workers: list[psutil.Process], seconds: float = 40) -> str:
        """What it and its workers, who may outlive it, have printed when all have ended."""
        self.process.wait(seconds)
        left = psutil.wait_procs(workers, timeout=seconds)[1]
        assert not left, f"still there after {seconds} s: {left}\n{self.path.read_text()}"
        return self.path.read_text()


@pytest.fixture
def command(tmp_path):
    """Starts one; whatever happens, none is left behind."""
    started: list[Command] = []

    def begin(argv: list[str], **more: str) -> Command:
        started.append(Command(argv, tmp_path / f"printed-{len(started)}", **more))
        return started[-1]

    yield begin
    for one in started:
        end(one.process)
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)


def logged(run: Path, step: int) -> Any:
    """Whether the run has come to a step."""
    path = run / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= step


@pytest.mark.slow
def test_ctrl_c_in_a_shell_ends_its_loop(tmp_path, command):
    loop = 'for name in a b; do "$@" out=$0/$name; done'
    argv = verb("train_tokenizer", tokenizer_arguments(tmp_path, train__steps=20000))
    job, run = command(["bash", "-c", loop, str(tmp_path), *argv]), tmp_path / "a"
    assert wait_for(logged(run, 3), job.process)
    workers = job.workers()
    job.ctrl_c()
    lines = job.end(workers).splitlines()
    step = int(states(run)[-1].name[5:])
    assert len(workers) == 1 and f"{run}: {FIRST}" in lines
    assert lines[-1] == f"{run}: told to end at step {step}; the same command continues"
    assert job.process.returncode == -signal.SIGINT and not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_under_accelerate_launch_saves_once(tmp_path, command, processes):
    """The launcher of one ends before it; that of two passes Ctrl-C on, and waits."""
    run, launched = tmp_path / "run", {1: one_launched, 2: two_processes}[processes]
    job = command(launched("train_tokenizer", tokenizer_arguments(run, train__steps=20000, train__log_every=1)))
    assert wait_for(logged(run, 3), job.process)
    workers = job.workers()
    job.ctrl_c()
    printed = job.end(workers)
    (state,) = states(run)
    assert len(workers) == processes and re.search(rf" {processes} process(es)? on cpu", printed)
    assert printed.count(f"{run}: {FIRST}\n") == 1
    assert printed.count(f"{run}: told to end at step {int(state.name[5:])}; the same command continues\n") == 1
    assert job.process.returncode and metrics(run)[-1]["step"] in (int(state.name[5:]) - 1, int(state.name[5:]))
    verify_manifest(state)
    assert not list(run.glob(".tmp-*")) and not (run / ".processes").exists()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("launched", "saved"),
    [
        pytest.param("alone", 0, marks=pytest.mark.slow),
        pytest.param("alone", 4, marks=pytest.mark.slow),
        pytest.param("two", 4, marks=pytest.mark.slow),
    ],
)
def test_a_second_ctrl_c_ends_at_once(tmp_path, command, launched, saved):
    """In a step that takes forever; with what is saved as the last word."""
    run, argv = tmp_path / "run", ["tests/support/failures/stuck.py", "6", "train_tokenizer"]
    argv += tokenizer_arguments(tmp_path / "run", train__steps=20000, **({"train__save_every": saved} if saved else {}))
    if launched == "alone":
        job = command([sys.executable, *argv])
    else:
        whole = two_processes("x", [])
        job = command([*whole[: whole.index("-m")], *argv])
    assert wait_for(job.said("stuck"), job.process, 90)
    workers = job.workers()
    job.ctrl_c()
    assert wait_for(job.said(FIRST), job.process)
    time.sleep(1.2 * stopping.TWICE)
    job.ctrl_c()
    lines = job.end(workers, 20).splitlines()
    kept = "step 4 is saved, the same command continues from there" if saved else "nothing was saved yet"
    assert lines.count(f"{run}: ended at once; {kept}") == 1 and not any("told to end" in line for line in lines)
    if launched == "alone":
        assert lines[-1].endswith(kept) and job.process.returncode == -signal.SIGINT and not workers
    else:
        assert len(workers) == 2 and job.process.returncode
    assert len(states(run)) == bool(saved)


@pytest.mark.slow
def test_a_closed_terminal_saves(tmp_path):
    """What is written to it from then on would be an error."""
    run, (master, terminal) = tmp_path / "run", pty.openpty()
    argv = tokenizer_arguments(run, train__steps=20000)
    process = subprocess.Popen(
        verb("train_tokenizer", argv),
        cwd=ROOT,
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)

    def shown() -> bool:
        while select.select([master], [], [], 0)[0]:
            os.read(master, 1 << 16)
        return logged(run, 3)()

    try:
        assert wait_for(shown, process)
        os.close(master)
        assert process.wait(30) == 0
    finally:
        end(process)
    step = int(states(run)[-1].name[5:])
    assert metrics(run)[-1]["step"] in (step - 1, step)
