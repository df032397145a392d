"""Ctrl-C, SIGTERM, a closed terminal, a launcher that is gone: a run saves itself, and goes on to the same bits."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from folders import half_written
from launch import (
    MACHINE,
    ROOT,
    assert_equal_tensors,
    end,
    environment,
    exact,
    launched,
    metrics,
    one_launched,
    states,
    tensors,
    tokenizer_arguments,
    train_stage,
    train_tokenizer,
    two_processes,
    verb,
    wait_for,
)
from one_process import one_process
from tiny_task import Killed

from pipelines import encode, generate
from pipelines import train_tokenizer as train_tokenizer_verb
from pipelines.config import run_command
from pipelines.config.errors import Interrupted
from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training import stopping, trainer
from pipelines.training.stopping import Stop, heed_signals, what_is_saved
from pipelines.training.trainer import Trainer

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
    return lambda stage, out, **more: train_stage(stage, out, tokens, **{**EVERY, **more})


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
    """Send the signal in the midst of the `turn`-th call."""
    call, calls = getattr(owner, name), iter(range(1, 1000))

    def called(*arguments: Any, **named: Any) -> Any:
        if next(calls) == turn:
            os.kill(os.getpid(), number)
        return call(*arguments, **named)

    monkeypatch.setattr(owner, name, called)


def assert_same_run(run: Path, expected: Path) -> None:
    """All that no clock is in: figures, weights, averages, moments, the snapshot, pictures; and nothing half done."""
    assert exact(run) == exact(expected)
    assert_equal_tensors(tensors(states(run)[-1]), tensors(states(expected)[-1]))
    for name in ("tokenizer", "pipeline"):
        if (expected / name).exists():
            assert_equal_tensors(tensors(run / name), tensors(expected / name))
    pictures = [{path.name: path.read_bytes() for path in (at / "previews").iterdir()} for at in (run, expected)]
    assert pictures[0] == pictures[1]
    assert sorted(os.listdir(run)) == sorted(os.listdir(expected)) and not list((run / "state").glob(".*"))


PHASES = {
    "the first step": (Trainer, "take_step", 1),
    "a step": (Trainer, "take_step", 7),
    "a step after which much is due": (Trainer, "take_step", 4),
    "the evaluation": ("task", "evaluate", 2),
    "the preview": ("task", "preview", 2),
    "the snapshot": ("task", "save", 2),
    "the checkpoint": (trainer, "write_checkpoint", 1),  # by a thread, for which the next save waits
}


@pytest.mark.parametrize("stage", TASKS)
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_saves_and_the_same_command_continues_to_the_bit(
    tmp_path, train, whole, monkeypatch, capsys, stage, phase
):
    run, (owner, name, turn) = tmp_path / "run", PHASES[phase]
    with monkeypatch.context() as patch:
        on_call(patch, TASKS[stage] if owner == "task" else owner, name, turn)
        with interrupted():
            train(stage, run)
    step = int(states(run)[-1].name[5:])
    assert step < 12 and max([0, *(line["step"] for line in metrics(run))]) <= step
    assert capsys.readouterr().out.endswith(f"{run}: stopped at step {step}; the same command continues\n")
    train(stage, run)
    assert f"continuing from step {step};" in capsys.readouterr().out or step == 0
    assert_same_run(run, whole[stage])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_save_as_well(tmp_path, train, whole, monkeypatch, capsys, number):
    """As a run that ended well, and not as one that was interrupted."""
    before = signal.signal(number, lambda *_: pytest.fail("nobody heeds it"))
    with monkeypatch.context() as patch:
        on_call(patch, Trainer, "take_step", 7, number)
        train("train_tokenizer", tmp_path / "run")  # raises nothing
    signal.signal(number, before)
    assert "stopped at step 7" in capsys.readouterr().out
    train("train_tokenizer", tmp_path / "run")
    assert_same_run(tmp_path / "run", whole["train_tokenizer"])


@pytest.mark.parametrize("turn", range(1, 12, 2))
def test_a_run_that_is_stopped_again_and_again(tmp_path, train, whole, monkeypatch, turn):
    """At each step, and every `turn` steps."""
    while not (steps := [state.name for state in states(tmp_path / "run")]) or steps[-1] != "step-00000012":
        with monkeypatch.context() as patch:
            on_call(patch, Trainer, "take_step", turn, signal.SIGTERM)
            train("train_prior", tmp_path / "run")
    assert_same_run(tmp_path / "run", whole["train_prior"])


@pytest.mark.parametrize("stage", TASKS)
def test_a_run_that_is_lost_between_its_first_snapshot_and_checkpoint_begins_again(
    tmp_path, train, whole, monkeypatch, stage
):
    """The snapshot of a run that never had a checkpoint is no reason to refuse the same command."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", Mock(side_effect=Killed))
        with pytest.raises(Killed):
            train(stage, run)
    assert not states(run) and {"tokenizer", "pipeline"} & set(os.listdir(run))
    train(stage, run)
    assert_same_run(run, whole[stage])


def test_a_checkpoint_is_not_written_again_over_itself(tmp_path, train, whole, monkeypatch):
    """A run that is stopped before its first step leaves the checkpoint that it has loaded, with what is due there."""
    run, found = tmp_path / "run", []
    for asked in (Stop.asked, lambda stop: True):
        with monkeypatch.context() as patch:
            on_call(patch, Trainer, "take_step", 4, signal.SIGTERM)
            patch.setattr(Stop, "asked", asked)
            train("train_prior", run)
        (checkpoint,) = states(run)
        found.append({path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in checkpoint.rglob("*")})
    assert found[0] == found[1] and found[0]
    train("train_prior", run)
    assert_same_run(run, whole["train_prior"])


def test_what_killed_processes_left_is_deleted(tmp_path, train, whole, monkeypatch):
    """Half of a checkpoint, a snapshot, a picture, a file; and nothing else."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_call(patch, Trainer, "take_step", 7, signal.SIGTERM)
        train("train_tokenizer", run)
    folders = ("state/.tmp-step-00000009-0123abcd", ".tmp-tokenizer-0123abcd", ".del-tokenizer-0123abcd")
    targets = ("metrics.jsonl", "config.json", "trackers.json", "bad_images.jsonl", "previews/codebook-00000006.png")
    files = [half_written(tmp_path / "other" / name).relative_to(tmp_path / "other").as_posix() for name in targets]
    for name in (*folders, *(f"{folder}.mine" for folder in folders)):
        (run / name).mkdir()
        (run / name / "config.json").write_text("{}")
    for name in (*files, *(f"{file}.mine" for file in files)):
        (run / name).write_text("{}")
    train("train_tokenizer", run)
    assert not [name for name in (*folders, *files) if (run / name).exists()]
    for path in run.rglob("*.mine"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert_same_run(run, whole["train_tokenizer"])


def test_ctrl_c_at_the_end_lets_the_run_finish(tmp_path, train, whole, monkeypatch, capsys):
    """The command ends as one that was interrupted, or a loop in a shell would go on; nothing is left to be done."""
    on_call(monkeypatch, TokenizerTask, "evaluate", 3)
    with interrupted():
        train("train_tokenizer", tmp_path / "run")
    assert ": done: 12 steps" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole["train_tokenizer"])


@pytest.mark.parametrize("before", [0, 5])
def test_ctrl_c_before_training_ends_at_once(tmp_path, train, whole, monkeypatch, capsys, before):
    """While images are looked at or models built: nothing was done, so nothing is saved; and one line says so."""
    run = tmp_path / "run"
    if before:
        with monkeypatch.context() as patch, interrupted():
            on_call(patch, Trainer, "take_step", before)
            train("train_tokenizer", run)
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        on_call(patch, TokenizerTask, "new_tokenizer", 1)
        train_tokenizer_verb.main(tokenizer_arguments(run, **EVERY))
    assert caught.value.code == 130
    kept = f"step {before} is saved, the same command continues from there" if before else "nothing was saved yet"
    assert capsys.readouterr().err.splitlines() == [f"error: interrupted; {kept}"]
    train("train_tokenizer", run)
    assert_same_run(run, whole["train_tokenizer"])


# The signals


def test_a_launcher_that_passes_ctrl_c_on_has_not_doubled_it(tmp_path, monkeypatch):
    """A second SIGINT ends the process, but not one that comes at once."""
    stop, ended, clock = Stop(tmp_path), [], iter([10.0, 10.4, 10.6])
    monkeypatch.setattr(stop, "end", lambda: ended.append(True))
    monkeypatch.setattr("pipelines.training.stopping.time.monotonic", lambda: next(clock))
    with heed_signals(stop, alone=True):
        for wanted in ([], [], [True]):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked() and ended == wanted


@pytest.mark.parametrize("launcher", ["", "torchrun"])
def test_torchrun_means_a_second_ctrl_c_by_sigterm(tmp_path, monkeypatch, launcher):
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop, ended = Stop(tmp_path), []
    monkeypatch.setattr(stop, "end", lambda: ended.append(True))
    with heed_signals(stop, alone=False):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert not ended
        os.kill(os.getpid(), signal.SIGTERM)
        assert bool(ended) == bool(launcher)


def test_what_is_ignored_stays_ignored(tmp_path):
    """`nohup` ignores SIGHUP for a command, and a shell SIGINT for one in the background of a script."""
    stop, before = Stop(tmp_path), {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGHUP)}
    try:
        with heed_signals(stop, alone=True):
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


def test_other_verbs_say_that_they_were_interrupted(tmp_path, monkeypatch, capsys):
    """In one line, with the exit code of Ctrl-C; an encode continues."""
    monkeypatch.setattr(encode, "build_accelerator", lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(generate, "join_group", lambda device: os.kill(os.getpid(), signal.SIGINT))
    for verb_of, argv, line in (
        (encode, ["tokenizer=x", f"out={tmp_path}/tokens"], "error: interrupted; the same command continues\n"),
        (generate, ["pipeline=x"], "error: interrupted; the same command continues\n"),
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

    def __init__(self, command: list[str], printed: Path) -> None:
        self.path = printed
        with printed.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=file, stderr=file, text=True, start_new_session=True
            )

    def wait_until(self, condition: Callable[[], bool]) -> list[psutil.Process]:
        """The processes that it has started by the time that this holds."""
        assert wait_for(condition, self.process, 90), self.path.read_text()
        return psutil.Process(self.process.pid).children(recursive=True)

    def prints(self, text: str) -> Callable[[], bool]:
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

    def begin(argv: list[str]) -> Command:
        started.append(Command(argv, tmp_path / f"printed-{len(started)}"))
        return started[-1]

    yield begin
    for one in started:
        end(one.process)
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)


def has_logged(run: Path, step: int) -> Callable[[], bool]:
    """Whether the run has come to a step."""
    path = run / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= step


LONG = {"train__steps": 200, "train__log_every": 1}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["lost", pytest.param("SIGTERM", marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_launcher_that_is_gone_or_told_to_end(tmp_path, command, processes, how):
    """Its processes save at that step and end, and the same command continues to the bit."""
    run, launch = tmp_path / "run", {1: one_launched, 2: two_processes}[processes]
    job = command(launch("train_tokenizer", tokenizer_arguments(run, **LONG)))
    workers = job.wait_until(has_logged(run, 1))
    assert len(workers) == processes
    job.process.send_signal(signal.SIGKILL if how == "lost" else signal.SIGTERM)
    printed = job.end(workers)
    step = int(states(run)[-1].name[5:])
    assert printed.count(f"{run}: stopped at step {step}; the same command continues\n") == 1 and step < 200
    if processes == 1:
        train_tokenizer(run, **LONG)
        assert exact(run) == exact(train_tokenizer(tmp_path / "whole", **LONG))
        assert_equal_tensors(tensors(states(run)[-1]), tensors(states(tmp_path / "whole")[-1]))


@pytest.mark.slow
def test_ctrl_c_in_a_shell_ends_its_loop(tmp_path, command):
    loop = 'for name in a b; do "$@" out=$0/$name; done'
    argv = verb("train_tokenizer", tokenizer_arguments(tmp_path, train__steps=20000))
    job, run = command(["bash", "-c", loop, str(tmp_path), *argv]), tmp_path / "a"
    workers = job.wait_until(has_logged(run, 3))
    job.ctrl_c()
    lines = job.end(workers).splitlines()
    step = int(states(run)[-1].name[5:])
    assert len(workers) == 1 and f"{run}: {FIRST}" in lines
    assert lines[-1] == f"{run}: stopped at step {step}; the same command continues"
    assert job.process.returncode == -signal.SIGINT and not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_under_accelerate_launch_saves_once(tmp_path, command, processes):
    """The launcher of one ends before it; that of two passes Ctrl-C on, and waits."""
    run, launch = tmp_path / "run", {1: one_launched, 2: two_processes}[processes]
    job = command(launch("train_tokenizer", tokenizer_arguments(run, train__steps=20000)))
    workers = job.wait_until(has_logged(run, 3))
    job.ctrl_c()
    printed = job.end(workers)
    (state,) = states(run)
    step = int(state.name[5:])
    assert len(workers) == processes and printed.count(f"{run}: {FIRST}\n") == 1
    assert printed.count(f"{run}: stopped at step {step}; the same command continues\n") == 1
    assert job.process.returncode and metrics(run)[-1]["step"] in (step - 1, step)
    assert not list(run.glob(".tmp-*")) and tensors(state)


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
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("saved", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_a_second_ctrl_c_ends_at_once(tmp_path, command, processes, saved):
    """In a step that takes forever; with what is saved as the last word."""
    run, script = tmp_path / "run", tmp_path / "stuck.py"
    script.write_text(STUCK)
    argv = [str(script), *tokenizer_arguments(run, train__steps=20000, train__save_every=saved or 1000)]
    two = ["--multi_gpu", "--num_processes", "2", *MACHINE]
    job = command([sys.executable, *argv] if processes == 1 else launched(two, *argv))
    workers = job.wait_until(job.prints("stuck"))
    job.ctrl_c()
    job.wait_until(job.prints(FIRST))
    time.sleep(1.2 * stopping.TWICE)
    job.ctrl_c()
    lines = job.end(workers, 20).splitlines()
    kept = "step 4 is saved, the same command continues from there" if saved else "nothing was saved yet"
    assert lines.count(f"{run}: ended at once; {kept}") == 1 and not any("stopped at" in line for line in lines)
    if processes == 1:
        assert lines[-1].endswith(kept) and job.process.returncode == -signal.SIGINT and not workers
    else:
        assert len(workers) == 2 and job.process.returncode
    assert len(states(run)) == bool(saved)


@pytest.mark.slow
def test_a_closed_terminal_saves(tmp_path):
    """What is written to it from then on would be an error."""
    run, (master, terminal) = tmp_path / "run", pty.openpty()
    process = subprocess.Popen(
        verb("train_tokenizer", tokenizer_arguments(run, train__steps=20000)),
        cwd=ROOT,
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)

    def has_begun() -> bool:
        while select.select([master], [], [], 0)[0]:
            os.read(master, 1 << 16)
        return has_logged(run, 3)()

    try:
        assert wait_for(has_begun, process)
        os.close(master)
        assert process.wait(30) == 0
    finally:
        end(process)
    step = int(states(run)[-1].name[5:])
    assert metrics(run)[-1]["step"] in (step - 1, step)
