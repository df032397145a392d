"""One run at a time: the first process claims for all, all are told, and what ends a process removes the claim."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from failures.forked import fork
from several import Several
from two_processes import join_group

from pipelines.config import UserError
from pipelines.config.arguments import ToldElsewhere
from pipelines.config.command import exit_codes
from pipelines.files import claims, holders
from pipelines.files.claims import claimed, inside
from pipelines.files.holders import Claim
from pipelines.processes.claims import alone_at, alone_in
from pipelines.processes.sharing import Team
from tokenizer.files import PathError


def is_held(run: Path) -> bool:
    """Whether another process holds the claim in a folder."""
    try:
        with claimed(inside(run), run):
            return False
    except PathError:
        return True


def test_a_folder_is_made_and_goes_if_nothing_came_into_it(tmp_path):
    run = tmp_path / "runs" / "mine"
    with alone_in(run):
        assert os.listdir(run) == [".lock"]
    assert not os.listdir(tmp_path)
    with alone_in(run):
        (run / "config.yaml").touch()
    assert os.listdir(run) == ["config.yaml"]


def test_a_folder_that_another_process_removes_as_it_ends_is_made_again(tmp_path, monkeypatch):
    """It had made it, was refused, and leaves no empty folder."""
    (tmp_path / "runs").mkdir()
    tries: list[Path] = []

    def interrupted(place: Path, *rest: Any) -> Any:
        tries.append(place)
        if len(tries) == 1:
            place.parent.rmdir()
        return claimed(place, *rest)

    monkeypatch.setattr("pipelines.processes.claims.claimed", interrupted)
    with alone_at(tmp_path / "runs" / "out"):
        assert os.listdir(tmp_path / "runs") == [".out.lock"]
    assert len(tries) == 2


def test_the_claim_on_an_output_is_beside_it(tmp_path):
    """Whatever it becomes, there is nothing of it inside."""
    with alone_at(tmp_path / "set.npz"), alone_at(tmp_path / "tokens"), alone_at(None):
        assert sorted(os.listdir(tmp_path)) == [".set.npz.lock", ".tokens.lock"]
        with pytest.raises(UserError, match=r"tokens: process \d+ on .* one writer"), alone_at(tmp_path / "tokens"):
            pytest.fail("two at once")
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be_written_is_a_mistake_of_that_key(tmp_path):
    (tmp_path / "file").touch()
    cannot = pytest.raises(UserError, match=r"^pipeline: .*/file/x cannot be written")
    with cannot, alone_at(tmp_path / "file" / "x", key="pipeline"):
        pytest.fail("it was claimed")


def test_all_processes_are_refused_and_the_first_tells_it(tmp_path):
    several, errors = Several(3), {}

    def work() -> None:
        with pytest.raises(UserError, match="one writer at a time") as caught, alone_in(tmp_path, several.side):
            pytest.fail("two at once")
        errors[several.side.rank] = caught.type

    with claimed(inside(tmp_path), tmp_path):
        several.run(work)
    assert errors == {0: UserError, 1: ToldElsewhere, 2: ToldElsewhere}


def test_a_process_on_the_machine_of_the_one_before_tells_that_it_is_gone(tmp_path, monkeypatch):
    """A launcher has started all anew, and the first process is on another machine by now: nobody waits."""
    several = Several(2)
    monkeypatch.setattr(holders, "machine", lambda: f"machine {several.side.rank}")
    monkeypatch.setattr(claims, "_watched", lambda *_: pytest.fail("it waits"))
    several.local.side = Team(1, 2)
    inside(tmp_path).write_bytes(replace(Claim.new(), start=1).to_bytes())

    def work() -> None:
        with alone_in(tmp_path, several.side):
            several.barrier.wait()
            assert Claim.from_bytes(inside(tmp_path).read_bytes()).machine == "machine 0"
            several.barrier.wait()

    several.run(work)
    assert not os.listdir(tmp_path)


# Processes


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_a_signal_that_ends_a_process_removes_its_claims(tmp_path, name):
    """It ends as it would have without; after kill -9 they are nobody's."""
    number, ready = getattr(signal, name), tmp_path / "run" / "ready"

    def hold(rank: int) -> None:
        for other in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with alone_in(tmp_path / "run"), alone_at(tmp_path / "set.npz"):
            ready.touch()
            time.sleep(60)

    (pid,) = fork(1, hold, tmp_path / "log").pids
    try:
        until = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert is_held(tmp_path / "run")
    finally:
        os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (1 if name == "SIGINT" else -number)
    left = {path.name for path in tmp_path.rglob("*")} - {"run", "ready", "log"}
    assert left == ({".lock", ".set.npz.lock"} if name == "SIGKILL" else set())
    assert not is_held(tmp_path / "run")


def test_what_somebody_else_does_at_a_signal_stays(tmp_path):
    """What was set before, and what was set meanwhile."""
    seen: list[Any] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    try:
        with alone_in(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == ["mine"] and inside(tmp_path).exists()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with alone_in(tmp_path):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with alone_in(tmp_path), alone_at(tmp_path / "out"):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.timeout(120)
def test_two_processes_are_refused_without_a_hang_and_both_end_with_2(tmp_path, monkeypatch, capfd):
    """Without a launcher, which would end the second one."""
    monkeypatch.setattr("pipelines.config.command.TELLING", 0.2)

    def work(rank: int) -> None:
        join_group(tmp_path)
        with exit_codes(), alone_in(tmp_path / "run", Team(rank, 2)):
            sys.exit("two at once")

    (tmp_path / "run").mkdir()
    with claimed(inside(tmp_path / "run"), tmp_path / "run"):
        both = fork(2, work, tmp_path / "log")
        assert both.wait(60) and both.codes == {0: 2, 1: 2}
    lines = capfd.readouterr().err.splitlines()
    told = f"{tmp_path / 'run'}: process {os.getpid()} on "
    assert [line.partition(told)[0] for line in lines if told in line] == ["error: ", "error on process 1: "], lines
