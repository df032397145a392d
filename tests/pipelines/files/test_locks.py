"""One writer at a time: a second one is refused, a dead one is replaced at once, a frozen one after its lease.

Covers: pipelines/files.py.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
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


class Holder:
    """A process that locks `out` until it is told to release it."""

    def __init__(self, out: Path, lease: float = 120.0, heartbeat: float = 5.0) -> None:
        command = [sys.executable, "-c", textwrap.dedent(HOLD), str(out), str(lease), str(heartbeat)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def wait_until_locked(self) -> Holder:
        """Itself, once it has the lock."""
        assert self.process.stdout is not None and self.process.stdout.readline() == "locked\n"
        return self

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and what it printed on stdout and stderr."""
        out, error = self.process.communicate("release\n", timeout=30)
        return self.process.returncode, out, error


@pytest.fixture
def hold() -> Any:
    """Makes holders, which are killed in the end."""
    made: list[Holder] = []

    def start(*arguments: Any, **options: Any) -> Holder:
        made.append(Holder(*arguments, **options))
        return made[-1]

    yield start
    for holder in made:
        holder.process.kill()
        holder.process.communicate()


def refused(out: Path) -> str:
    """What is said to a second writer, which is refused within a second."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught, lock_output(out):
        pytest.fail("two at once")
    assert time.monotonic() - began < 1
    return str(caught.value)


# Where a lock is


def test_the_lock_of_a_run_is_inside_and_that_of_an_output_beside(tmp_path):
    with lock_folder(tmp_path / "run"), lock_output(tmp_path / "set.npz"), lock_output(None):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".set.npz.lock", "run"]
        assert os.listdir(tmp_path / "run") == [".lock"]
        (tmp_path / "run" / "config.yaml").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["run", "run/config.yaml"]


def test_folders_that_were_made_for_a_lock_go_with_it(tmp_path):
    with lock_folder(tmp_path / "runs" / "mine"), lock_output(tmp_path / "sets" / "deep" / "set.npz"):
        assert (tmp_path / "sets" / "deep").is_dir()
    assert not list(tmp_path.iterdir())


def test_two_names_of_one_output_have_one_lock(tmp_path, hold):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    hold(tmp_path / "real" / "out").wait_until_locked()
    assert str(tmp_path / "link" / "out") in refused(tmp_path / "link" / "out")


@pytest.mark.parametrize("letter", ["a", "ü"])
def test_an_output_may_have_the_longest_name_there_is(tmp_path, letter):
    out = tmp_path / (letter * (255 // len(letter.encode())))
    with lock_output(out):
        assert lock_beside(out).exists()
        refused(out)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_leaves_of_a_lock_is_known(tmp_path):
    assert all(map(is_lock, (".lock", ".lock.break.12.0123456789abcdef0123456789abcdef")))
    assert not any(map(is_lock, (".locked", "lock", ".out.lock", ".lock-mine")))


# Two at once


def test_a_second_writer_is_refused_by_host_and_process(tmp_path, hold):
    out = tmp_path / "out"
    first = hold(out).wait_until_locked()
    before = lock_beside(out).read_bytes()
    message = refused(out)
    assert str(out) in message and f"process {first.process.pid} on {socket.gethostname()}" in message
    assert "\n" not in message and lock_beside(out).read_bytes() == before
    assert first.end() == (0, "released\n", "")
    assert not list(tmp_path.iterdir())


def test_a_second_writer_in_the_same_process_is_refused(tmp_path):
    with lock_folder(tmp_path / "run"):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock_folder(tmp_path / "run"):
            pytest.fail("two at once")
        assert (tmp_path / "run" / ".lock").exists()


def test_of_many_that_start_at_once_one_at_a_time_writes(tmp_path, hold):
    out = tmp_path / "out"
    holders = [hold(out) for _ in range(4)]
    locked = [holder for holder in holders if holder.process.stdout.readline() == "locked\n"]
    assert len(locked) == 1
    ends = [holder.end() for holder in holders]
    assert sorted(code for code, _, _ in ends) == [0, 1, 1, 1]
    assert all("UserError" in error for code, _, error in ends if code) and not list(tmp_path.iterdir())


def test_the_first_process_locks_and_all_are_refused(tmp_path):
    several, errors = Several(3), {}

    def work() -> None:
        with pytest.raises(UserError) as caught, lock_folder(tmp_path, several.side):
            pytest.fail("two at once")
        errors[several.side.rank] = caught.type

    with lock_folder(tmp_path):
        several.run(work)
    assert errors == {0: UserError, 1: ReportedElsewhere, 2: ReportedElsewhere}


def test_the_first_process_holds_the_lock_for_all(tmp_path):
    several = Several(3)

    def work() -> None:
        with lock_folder(tmp_path, several.side):
            several.barrier.wait()
            assert os.listdir(tmp_path) == [".lock"]
            several.barrier.wait()

    several.run(work)
    assert not os.listdir(tmp_path)


# Holders that are gone or silent


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"])
def test_a_holder_that_is_gone_is_replaced_at_once(tmp_path, hold, name):
    """Also by one whose clock, and so the age of the lock, says nothing."""
    out = tmp_path / "out"
    first = hold(out).wait_until_locked()
    first.process.send_signal(getattr(signal, name))
    first.process.wait(timeout=30)
    began = time.monotonic()
    with lock_output(out):
        assert time.monotonic() - began < 0.5
        assert f"pid={os.getpid()}\n" in lock_beside(out).read_text()
    assert not list(tmp_path.iterdir())


def test_a_frozen_holder_is_replaced_after_its_lease_and_stops_when_it_wakes(tmp_path, hold, monkeypatch, capsys):
    out, lease, heartbeat = tmp_path / "out", 2.0, 0.2
    monkeypatch.setattr(files, "LEASE", lease)
    monkeypatch.setattr(files, "HEARTBEAT", heartbeat)
    first = hold(out, lease, heartbeat).wait_until_locked()
    first.process.send_signal(signal.SIGSTOP)
    time.sleep(4 * heartbeat)
    began = time.monotonic()
    with lock_output(out):
        assert 0.5 * lease < time.monotonic() - began < lease + 3
        assert str(first.process.pid) in capsys.readouterr().err  # whom it waited for
        first.process.send_signal(signal.SIGCONT)
        code, printed, error = first.end() if first.process.wait(timeout=30) is None else (first.process.wait(), "", "")
        error = error or first.process.stderr.read()
        assert code == files.STOPPED and "released" not in printed
        assert len(error.splitlines()) == 1 and str(out) in error
        assert f"pid={os.getpid()}\n" in lock_beside(out).read_text()
    assert not list(tmp_path.iterdir())


def test_a_holder_that_was_silent_and_wakes_in_time_keeps_its_lock(tmp_path, hold, monkeypatch):
    out, lease, heartbeat = tmp_path / "out", 20.0, 0.2
    monkeypatch.setattr(files, "LEASE", lease)
    monkeypatch.setattr(files, "HEARTBEAT", heartbeat)
    first = hold(out, lease, heartbeat).wait_until_locked()
    first.process.send_signal(signal.SIGSTOP)
    time.sleep(4 * heartbeat)
    resume = subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {first.process.pid}"])
    with pytest.raises(UserError, match=f"process {first.process.pid} on"), lock_output(out):
        pytest.fail("two at once")
    assert resume.wait() == 0 and first.end() == (0, "released\n", "")


def test_a_holder_on_another_machine_is_given_time_for_a_sign(tmp_path, hold, monkeypatch):
    """Its process cannot be seen from here; a live one says so within a heartbeat, a dead one never."""
    out, lease, heartbeat = tmp_path / "out", 2.0, 0.3
    monkeypatch.setattr(files, "LEASE", lease)
    monkeypatch.setattr(files, "HEARTBEAT", heartbeat)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    first = hold(out, lease, heartbeat).wait_until_locked()
    began = time.monotonic()
    with pytest.raises(UserError, match=f"process {first.process.pid} on"), lock_output(out):
        pytest.fail("two at once")
    assert time.monotonic() - began < lease
    first.process.kill()
    first.process.wait()
    began = time.monotonic()
    with lock_output(out):
        assert 0.5 * lease < time.monotonic() - began < lease + 3


@pytest.mark.parametrize("kept", [0, 1, 30, -1])
@pytest.mark.parametrize("filled", [False, True])
def test_a_lock_that_was_half_written_is_nobodys_after_the_lease(tmp_path, monkeypatch, kept, filled):
    """As power loss leaves it: its beginning, perhaps with zeros to its length."""
    monkeypatch.setattr(files, "LEASE", 1.5)
    monkeypatch.setattr(files, "HEARTBEAT", 0.5)
    with lock_output(tmp_path / "out"):
        whole = lock_beside(tmp_path / "out").read_bytes()
    half = whole[:kept] + bytes(len(whole) - len(whole[:kept])) * filled
    lock_beside(tmp_path / "out").write_bytes(half if kept != 1 else bytes(len(whole)))
    began = time.monotonic()
    with lock_output(tmp_path / "out"):
        assert 1 < time.monotonic() - began < 4
        assert f"pid={os.getpid()}\n" in lock_beside(tmp_path / "out").read_text()
    assert not list(tmp_path.iterdir())


def test_a_process_whose_lock_was_removed_stops(tmp_path, hold):
    first = hold(tmp_path / "out", 5.0, 0.2).wait_until_locked()
    lock_beside(tmp_path / "out").unlink()
    assert first.process.wait(timeout=30) == files.STOPPED


# Places that cannot be locked


def make_garbage(path: Path) -> None:
    path.write_text("the thesis of somebody")


def make_link(path: Path) -> None:
    (path.parent / "mine").write_text("mine")
    path.symlink_to(path.parent / "mine")


@pytest.mark.parametrize(
    "make", [make_garbage, make_link, Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")]
)
def test_what_is_no_lock_is_left_and_named(tmp_path, make: Callable[[Path], Any]):
    place = lock_beside(tmp_path / "out")
    make(place)
    before = {path.name: path.lstat() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as caught, lock_output(tmp_path / "out", key="folder"):
        pytest.fail("it was locked")
    assert str(tmp_path / "out") in str(caught.value)
    assert {path.name: path.lstat() for path in tmp_path.iterdir()} == before


def test_a_folder_that_may_not_be_written_is_a_mistake_of_that_key(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    with (
        as_others(),
        pytest.raises(UserError, match=rf"^pipeline: {closed}/out "),
        lock_output(closed / "out", key="pipeline"),
    ):
        pytest.fail("it was locked")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^out: "), lock_folder(tmp_path / "file" / "run"):
        pytest.fail("it was locked")
    closed.chmod(0o755)
    assert not list(closed.iterdir())


def test_a_full_disk_is_a_mistake_of_that_key_and_leaves_nothing(tmp_path, monkeypatch):
    write = os.write

    def full(file: int, data: bytes) -> int:
        if bytes(data).startswith(b"filelock"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"^out: .*No space left"), lock_output(tmp_path / "sets" / "out"):
        pytest.fail("it was locked")
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_block_releases(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock_output(tmp_path / "out"):
        raise KeyboardInterrupt
    with lock_output(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())
