"""Locks: a second writer is refused, a dead holder is replaced at once, a frozen one after its lease.

Covers: pipelines/files.py.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
from ordinary import as_others
from ranks import Several

from pipelines import files
from pipelines.config import UserError
from pipelines.config.errors import ReportedElsewhere
from pipelines.files import is_lock, lock_beside, lock_folder, lock_output

HOLD = """
    import sys, time
    from pathlib import Path
    from pipelines import files
    files.LEASE, files.HEARTBEAT = float(sys.argv[2]), float(sys.argv[3])
    with files.lock_output(sys.argv[1]):
        print("locked", flush=True)
        sys.stdin.readline()
    print("released", flush=True)
"""


def is_locked(holder: Popen[str]) -> bool:
    """Wait until this process has the lock, or has ended."""
    assert holder.stdout is not None
    return holder.stdout.readline() == "locked\n"


@pytest.fixture
def hold() -> Any:
    """Start a process that locks a path until it reads a line; it is killed in the end."""
    started: list[Popen[str]] = []

    def start(out: Path, wait: bool = True) -> Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(HOLD), str(out), str(files.LEASE), str(files.HEARTBEAT)]
        started.append(Popen(command, text=True, stdin=PIPE, stdout=PIPE, stderr=PIPE))
        assert not wait or is_locked(started[-1])
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


LEASE, HEARTBEAT = 0.8, 0.1


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(files, "LEASE", LEASE)
    monkeypatch.setattr(files, "HEARTBEAT", HEARTBEAT)


def refusal(out: Path) -> str:
    """Return the error of a second writer, which comes within a second."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught, lock_output(out):
        pytest.fail("two writers at once")
    assert time.monotonic() - began < 1
    return str(caught.value)


# The place of a lock


def test_a_run_is_locked_inside_and_an_output_beside_and_nothing_is_left(tmp_path):
    with lock_folder(tmp_path / "run"), lock_output(tmp_path / "set.npz"), lock_output(None):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".set.npz.lock", "run"]
        assert os.listdir(tmp_path / "run") == [".lock"] and is_lock(".lock") and not is_lock(".out.lock")
        (tmp_path / "run" / "config.yaml").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["run", "run/config.yaml"]
    with pytest.raises(KeyboardInterrupt), lock_output(tmp_path / "sets" / "deep" / "set.npz"):
        assert (tmp_path / "sets" / "deep").is_dir()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # created folders that stay empty are removed


def test_two_paths_of_one_output_have_one_lock(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with lock_output(tmp_path / "real" / "out"):
        assert str(tmp_path / "link" / "out") in refusal(tmp_path / "link" / "out")


# Two writers at once


def test_a_second_writer_is_refused_with_the_host_and_the_process_of_the_first(tmp_path, hold, monkeypatch):
    out = tmp_path / "out"
    first = hold(out)
    before = lock_beside(out).read_bytes()
    message = refusal(out)
    assert str(out) in message and f"process {first.pid} on {socket.gethostname()}" in message
    assert "\n" not in message and lock_beside(out).read_bytes() == before
    assert first.communicate("release\n", timeout=30) == ("released\n", "") and first.returncode == 0
    with lock_output(out):
        assert f"process {os.getpid()} on" in refusal(out)
        monkeypatch.setattr(files, "LEASE", 60.0)  # as in another version
        assert "lease" in refusal(out)
    assert not list(tmp_path.iterdir())


def test_one_of_many_simultaneous_writers_wins(tmp_path, hold):
    holders = [hold(tmp_path / "out", wait=False) for _ in range(3)]
    assert sum(is_locked(holder) for holder in holders) == 1
    for holder in holders:
        holder.communicate("release\n", timeout=30)
    assert sorted(holder.returncode for holder in holders) == [0, 1, 1] and not list(tmp_path.iterdir())


def test_the_main_process_locks_for_its_group_and_all_are_refused(tmp_path):
    several, errors = Several(3), {}

    def hold() -> None:
        with lock_folder(tmp_path, several.side):
            several.barrier.wait()
            assert os.listdir(tmp_path) == [".lock"]
            several.barrier.wait()

    def be_refused() -> None:
        with pytest.raises(UserError) as caught, lock_folder(tmp_path, several.side):
            pytest.fail("two writers at once")
        errors[several.side.rank] = caught.type

    several.run(hold)
    assert not os.listdir(tmp_path)
    with lock_folder(tmp_path):
        several.run(be_refused)
    assert errors == {0: UserError, 1: ReportedElsewhere, 2: ReportedElsewhere}


# Dead and frozen holders


def test_a_dead_holder_is_replaced_at_once(tmp_path, hold):
    out = tmp_path / "out"
    first = hold(out)
    first.kill()
    first.wait(timeout=30)
    began = time.monotonic()
    with lock_output(out):
        assert time.monotonic() - began < 0.5
        assert f"pid={os.getpid()}\n" in lock_beside(out).read_text()
    assert not list(tmp_path.iterdir())


def test_a_frozen_holder_is_replaced_after_its_lease_and_stops_when_it_wakes(tmp_path, hold, short_lease, capsys):
    out = tmp_path / "out"
    first = hold(out)
    first.send_signal(signal.SIGSTOP)
    time.sleep(4 * HEARTBEAT)  # until it has missed heartbeats
    began = time.monotonic()
    with lock_output(out):
        assert 0.5 * LEASE < time.monotonic() - began < LEASE + 3
        assert str(first.pid) in capsys.readouterr().err  # says for whom it waits
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=30) == files.STOPPED
        error = first.stderr.read()
        assert len(error.splitlines()) == 1 and str(out) in error and "released" not in first.stdout.read()
        assert f"pid={os.getpid()}\n" in lock_beside(out).read_text()
    assert not list(tmp_path.iterdir())


def test_a_holder_on_another_machine_is_recognised_by_its_heartbeat(tmp_path, hold, short_lease, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    first = hold(out)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"process {first.pid} on"), lock_output(out):
        pytest.fail("two writers at once")
    assert time.monotonic() - began < LEASE
    first.kill()
    first.wait()
    began = time.monotonic()
    with lock_output(out):
        assert 0.5 * LEASE < time.monotonic() - began < LEASE + 3


# Places that cannot be locked


def test_a_file_in_the_place_of_a_lock_is_reported_and_left(tmp_path, monkeypatch):
    """Someone's file, or a lock that was not written when the power failed."""
    monkeypatch.setattr(files, "MOMENT", 0.1)
    lock = lock_beside(tmp_path / "out")
    lock.write_text("a")
    with pytest.raises(UserError, match=f"{lock} names no holder"), lock_output(tmp_path / "out"):
        pytest.fail("it was locked")
    assert lock.read_text() == "a"


def test_an_empty_lock_that_is_old_is_replaced(tmp_path, monkeypatch):
    """Power was lost while it was written."""
    monkeypatch.setattr(files, "MOMENT", 0.1)
    lock = lock_beside(tmp_path / "out")
    lock.touch()
    with pytest.raises(UserError, match="names no holder"), lock_output(tmp_path / "out"):
        pytest.fail("it was locked")
    os.utime(lock, (1, 1))
    with lock_output(tmp_path / "out"):
        assert lock.stat().st_size > 0


def test_an_unwritable_folder_is_an_error_of_the_key(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    with as_others(), pytest.raises(UserError, match=f"^pipeline: {closed}/out "):  # noqa: SIM117
        with lock_output(closed / "out", key="pipeline"):
            pytest.fail("it was locked")
