"""One writer at a time: who is refused, what is stale, and that one of all that try takes a stale claim.

Processes here are a few lines each, and load neither torch nor a model: the modules are read by their files.

Covers: pipelines/files/holders.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipelines.files import claims
from pipelines.files.claims import beside, claimed, inside, is_claim, known_gone
from pipelines.files.holders import Claim, machine, started
from tokenizer.files import PathError

ROOT = Path(__file__).parents[3]
OTHER = "another-boot/4026531836"
BARE = """
import os, sys, time
sys.path.insert(0, ROOT)
from pathlib import Path
from pipelines.files import claims, holders
from tokenizer.files import PathError
"""


def process(place: Path, code: str, **settings: float) -> subprocess.Popen[str]:
    """A process that runs `code`, in which `place` is the claim's; settings: those of the module."""
    lines = [f"ROOT = {str(ROOT)!r}", BARE, f"place = Path({str(place)!r})"]
    lines += [f"claims.{name} = {value!r}" for name, value in settings.items()]
    command = [sys.executable, "-c", "\n".join([*lines, code])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


HOLD = "with claims.claimed(place, 'it') as release:\n    print(os.getpid(), flush=True)\n    sys.stdin.read()\n"
ELSEWHERE = "holders.machine = lambda: 'elsewhere/1'\n"  # as if it ran on another machine


@contextmanager
def holder(place: Path, code: str = HOLD, **settings: float) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the claim while the block lasts, unless it is killed in it."""
    other = process(place, code, **settings)
    try:
        line = other.stdout.readline()
        assert line.strip() == str(other.pid), other.stderr.read()
        yield other
    finally:
        other.kill()
        other.communicate()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return inside(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is a third of a second."""
    monkeypatch.setattr(claims, "SILENCE", 0.3)
    monkeypatch.setattr(claims, "LOOK", 0.03)


def left(place: Path, **changes: object) -> Claim:
    """A claim that somebody left."""
    claim = replace(Claim.new(), **changes)
    place.write_bytes(claim.to_bytes())
    return claim


def takes(place: Path) -> bool:
    """Whether this process gets the claim."""
    try:
        with claimed(place, "it"):
            assert Claim.from_bytes(place.read_bytes()).pid == os.getpid()
            return True
    except PathError:
        return False


# Held


def test_the_second_is_refused_in_a_line_that_says_who_and_touches_nothing(place):
    with holder(place, PERIOD=600.0) as other:
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in place.parent.iterdir()}
        folder = place.parent.stat().st_mtime_ns
        with pytest.raises(PathError) as caught, claimed(place, "runs/mine"):
            pytest.fail("two at once")
        host = re.escape(os.uname().nodename)
        since = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"
        line = f"runs/mine: process {other.pid} on {host} has been writing here since {since}; one writer at a time, "
        assert re.fullmatch(f"{line}nothing was changed", str(caught.value))
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in place.parent.iterdir()} == before
        assert place.parent.stat().st_mtime_ns == folder
        other.communicate("")  # it ends
    assert takes(place) and not list(place.parent.iterdir())


def test_a_process_that_was_stopped_holds_its_claim(place, quick):
    """Ctrl-Z is no end."""
    with holder(place) as other:
        os.kill(other.pid, signal.SIGSTOP)
        assert not takes(place)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_a_claim_goes_with_the_block_however_it_ends(place, error):
    with pytest.raises(error) if error else nullcontext(), claimed(place, "it"):
        if error:
            raise error
    assert not list(place.parent.iterdir())


def test_a_claim_may_go_earlier_and_a_later_one_is_not_taken_for_it(place):
    with claimed(place, "it") as release:
        release()
        assert not list(place.parent.iterdir())
        other = left(place)
    assert Claim.from_bytes(place.read_bytes()) == other


def test_a_claim_that_cannot_be_removed_means_nothing_any_more(place, monkeypatch):
    """On a full disk. The process may live on, and is not to be refused by itself."""
    put = claims._put

    def full(path: Path, own: Claim) -> bool:
        if path != place:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(path, own)

    with monkeypatch.context() as patch:
        patch.setattr(claims, "_put", full)
        with claimed(place, "it"):
            pass
    assert os.listdir(place.parent) == [".lock"] and known_gone(place)
    assert takes(place) and not os.listdir(place.parent)


def test_a_signal_in_the_middle_of_a_release_does_not_hang(place):
    """Its handler releases as well (`processes.claims`), while the event's lock is held."""
    held = claims._Held(place, "it")
    held.take(())
    lock, again = held._ended._cond, []

    class Interrupted:
        notify_all = lock.notify_all

        def __enter__(self) -> None:
            lock.__enter__()
            other = threading.Thread(target=held.release, daemon=True)  # so that a hang can be seen
            other.start()
            other.join(1)
            again.append(other.is_alive())

        def __exit__(self, *error: object) -> None:
            lock.__exit__(*error)

    held._ended._cond = Interrupted()
    held.release()
    assert again == [False] and not list(place.parent.iterdir())


def test_a_forked_process_does_not_remove_the_claim_of_its_parent(place):
    fork = "if os.fork() == 0:\n        release()\n        os._exit(0)\n    os.wait()\n    print"
    with holder(place, HOLD.replace("print", fork)):
        assert place.exists()


# Stale


def test_a_process_that_was_killed_is_replaced_at_once(place):
    with holder(place) as other:
        other.kill()
        other.wait()
        began = time.monotonic()
        assert takes(place) and time.monotonic() - began < 2
    assert not list(place.parent.iterdir())


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_one_that_was_killed_as_it_let_go_is_replaced_at_once(place, calls):
    """After it had said that it removes its claim; before and after it had done so."""
    code = "left, unlink = [None] * CALLS, Path.unlink\n"
    code += "def dying(*given, **more):\n"
    code += "    left.pop() if left else os.kill(os.getpid(), 9)\n    unlink(*given, **more)\n"
    code += "with claims.claimed(place, 'it'):\n    Path.unlink = dying\n"
    process(place, code.replace("CALLS", str(calls))).communicate()
    assert list(place.parent.iterdir())
    with claimed(place, "it"):
        assert claims.read_claim(place).pid == os.getpid()
        assert [path for path in place.parent.iterdir() if path != place] == []


def test_a_killed_process_that_nobody_has_waited_for_is_gone(place):
    with holder(place) as other:
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # and it is a zombie still
        assert takes(place)


def test_a_pid_that_another_process_has_by_now_is_not_its_holder(place):
    """This process has the pid, and was started at another time."""
    left(place, start=Claim.new().start - 1)
    assert takes(place)
    left(place)
    assert not takes(place)


@pytest.mark.parametrize("changes", [{"machine": OTHER}, {"host": "another"}, {"machine": ""}], ids=str)
def test_of_another_machine_only_its_silence_is_known(place, quick, capfd, changes):
    """Though it has the pid, or the name of the host, of one here."""
    left(place, pid=1, **changes)
    began = time.monotonic()
    assert takes(place) and time.monotonic() - began >= 0.3
    assert "it: process 1 on" in (said := capfd.readouterr().err) and "waiting 0.3 s at most" in said


@pytest.mark.parametrize("count", range(1, 3))
def test_a_claim_that_counts_on_another_machine_is_held(place, monkeypatch, count):
    """A holder that is slow at its work, and whose thread goes on."""
    monkeypatch.setattr(claims, "SILENCE", 3.0)
    monkeypatch.setattr(claims, "LOOK", 0.05)
    with holder(place, ELSEWHERE + HOLD, PERIOD=0.2):
        assert Claim.from_bytes(place.read_bytes()).machine == "elsewhere/1"
        began = time.monotonic()
        assert not takes(place) and time.monotonic() - began < 2.5


def test_no_clock_of_another_machine_is_believed(place, quick):
    """Neither what the file says of times, nor when the system says that it was changed."""
    for year in (1999, 2099):
        left(place, machine=OTHER, since=f"{year}-01-01 00:00:00 +0000")
        os.utime(place, (year, year))
        began = time.monotonic()
        assert takes(place) and time.monotonic() - began >= 0.3


def test_a_machine_of_the_same_run_tells_that_a_process_is_gone(place):
    stale = left(place, machine=OTHER)
    with claimed(place, "it", [stale.nonce]):
        assert Claim.from_bytes(place.read_bytes()).pid == os.getpid()
    assert known_gone(place) is None
    stale = left(place, start=1)
    assert known_gone(place) == stale.nonce
    left(place)
    assert known_gone(place) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[" * 1000,
        b'{"pid": 1, "host": "gone", "since": "2020"}',  # of an earlier version
        b'{"nonce": "../../x", "pid": -1, "start": 1e400, "host": "\\u001b[2J\\ud800", "since": ["\\n"]}',
        b'{"nonce": "%s", "pid": 9999999999999999999999, "machine": "%s"}' % (b"a" * 32, machine().encode()),
    ],
    ids=["empty", "cut", "deep", "earlier", "hostile", "large"],
)
def test_a_file_that_is_no_claim_of_ours_is_given_up_after_silence(place, quick, data, capfd):
    place.write_bytes(data)
    assert takes(place) and not os.listdir(place.parent)
    (said,) = capfd.readouterr().err.splitlines()
    assert said.isprintable()


@pytest.mark.parametrize("what", ["a folder", "a link", "a pipe"])
def test_something_else_of_the_name_is_left_and_named(place, what):
    if what == "a folder":
        place.mkdir()
    elif what == "a link":
        place.symlink_to("/etc/hostname")
    else:
        os.mkfifo(place)
    with pytest.raises(PathError, match=r"\.lock: it (says|is to say) who writes here"), claimed(place, "it"):
        pytest.fail("it was taken")
    assert len(list(place.parent.iterdir())) == 1


# Races

RACE = """
sys.stdin.readline()
try:
    with claims.claimed(place, "it"):
        print("won", flush=True)
        sys.stdin.readline()
except PathError as error:
    print(f"refused: {error}", flush=True)
    sys.stdin.readline()
"""


def race(place: Path, racers: list[subprocess.Popen[str]]) -> list[str]:
    """What each says, of all that start at once."""
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.communicate("end\n", timeout=20)
    return said


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_one_of_eight_that_find_a_stale_claim_has_it(place, rounds):
    """The others are told of that one; nothing is left."""
    for number in range(rounds):
        left(place, start=1)
        if number % 3 == 1:  # one was killed while it was taking the claim over
            stale = Claim.from_bytes(place.read_bytes())
            place.with_name(f".lock-{stale.nonce}").write_bytes(replace(Claim.new(), start=2).to_bytes())
            place.with_name(f".lock.{'b' * 32}").touch()
        racers = [process(place, RACE) for _ in range(8)]
        said = race(place, racers)
        (winner,) = [racer.pid for racer, line in zip(racers, said, strict=True) if line == "won"]
        assert sum(f"process {winner} on" in line for line in said) == 7, said
        assert not list(place.parent.iterdir())


def test_who_looked_before_another_claimed_is_refused(place, monkeypatch):
    other = left(place)
    monkeypatch.setattr(os.path, "lexists", lambda _: False)  # as it was a moment ago
    assert not takes(place) and Claim.from_bytes(place.read_bytes()) == other
    assert os.listdir(place.parent) == [".lock"]


def test_a_place_that_is_taken_over_is_free_at_no_moment(place, monkeypatch):
    """A third one, which has seen no stale claim, would have it."""
    removed, unlink = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: removed.append(path) or unlink(path, **options))
    left(place, start=1)
    with claimed(place, "it"):
        assert removed and place not in removed
    assert place in removed


def test_one_that_is_frozen_while_it_takes_over_is_named_and_not_waited_for(place, monkeypatch):
    """It lives; the stale claim stays."""
    monkeypatch.setattr(claims, "TRIES", 3)
    stale = left(place, start=1)
    place.with_name(f".lock-{stale.nonce}").write_bytes(Claim.new().to_bytes())
    assert not takes(place) and Claim.from_bytes(place.read_bytes()) == stale


def test_who_comes_late_with_a_judgement_replaces_nobody(place, monkeypatch):
    """Between finding a claim stale and replacing it, another process may have been quicker."""
    stale = left(place, start=1)
    with claimed(place, "it"):
        now = place.read_bytes()
        late = replace(Claim.new(), pid=os.getpid())
        assert not claims._replaced(place, stale, late, (), "it")
        assert place.read_bytes() == now and os.listdir(place.parent) == [".lock"]


def test_a_claim_that_counts_while_it_is_taken_over_is_not_replaced(place):
    """Its holder was silent, and is back before the other one replaces it."""
    silent = left(place, machine=OTHER)
    awake = left(place, **{**asdict(silent), "count": 7})
    assert not claims._replaced(place, silent, Claim.new(), (), "it")
    assert Claim.from_bytes(place.read_bytes()) == awake and os.listdir(place.parent) == [".lock"]


def test_a_holder_that_wakes_up_when_the_other_has_ended_ends_too(place, quick):
    """It was taken over while it was stopped, by a process of another machine that has worked and gone: what it knows
    is old."""
    with holder(place, ELSEWHERE + HOLD, PERIOD=0.1, SILENCE=0.3) as other:
        os.kill(other.pid, signal.SIGSTOP)
        assert takes(place) and not os.listdir(place.parent)
        os.kill(other.pid, signal.SIGCONT)
        assert other.wait(10) == claims.LOST
        assert other.stderr.read().startswith("error: it: another process has taken over, as this process was silent")
    assert not os.listdir(place.parent)


def test_a_holder_that_was_only_silent_removes_nobody_elses(place):
    held = claims._Held(place, "it")
    held.take(())
    other = left(place)
    held.release()
    assert Claim.from_bytes(place.read_bytes()) == other and os.listdir(place.parent) == [".lock"]


def test_a_holder_that_is_being_replaced_leaves_its_claim_to_the_other(place):
    held = claims._Held(place, "it")
    held.take(())
    guard = place.with_name(f".lock-{held.own.nonce}")
    guard.write_bytes(Claim.new().to_bytes())
    held.release()
    assert place.exists() and guard.exists()


def test_a_holder_that_was_replaced_ends_in_a_line(place):
    with holder(place, PERIOD=0.05) as other:
        left(place, host="quicker")
        assert other.wait(10) == claims.LOST
        said = other.stderr.read()
    assert said.count("\n") == 1 and re.match(r"error: it: process \d+ on quicker has taken over", said)
    assert place.exists()


def test_a_holder_that_was_replaced_ends_also_where_it_cannot_say_so(place):
    """Its terminal is gone, or its log is on a full disk: it would write beside the other for ever."""
    code = f"os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n{HOLD}"
    with holder(place, code, PERIOD=0.05) as other:
        left(place, host="quicker")
        assert other.wait(10) == claims.LOST
    assert place.exists()


def test_a_claim_that_somebody_removed_comes_back(place, monkeypatch):
    monkeypatch.setattr(claims, "PERIOD", 0.02)
    with claimed(place, "it"):
        place.unlink()
        until = time.monotonic() + 10
        while not place.exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert Claim.from_bytes(place.read_bytes()).pid == os.getpid()
    assert not list(place.parent.iterdir())


def test_a_folder_that_is_away_for_long_is_nobody_elses(tmp_path, quick, monkeypatch):
    """It was moved, or its disk is not there: nobody was silent."""
    monkeypatch.setattr(claims, "PERIOD", 0.02)
    monkeypatch.setattr(claims._Held, "_end", lambda *_: ended.append(True))
    place, ended = inside(tmp_path / "run"), list[bool]()
    place.parent.mkdir()
    with claimed(place, "it"):
        place.parent.rename(tmp_path / "away")
        time.sleep(0.5)
        place.parent.mkdir()
        until = time.monotonic() + 10
        while not place.exists() and time.monotonic() < until:
            time.sleep(0.01)
    assert not ended and not list(place.parent.iterdir())


def test_a_claim_that_somebody_damaged_is_mended(place, monkeypatch):
    """It is nobody else's: the process goes on."""
    monkeypatch.setattr(claims, "PERIOD", 0.02)
    with claimed(place, "it"):
        place.write_bytes(b"")
        until = time.monotonic() + 10
        while not place.read_bytes() and time.monotonic() < until:
            time.sleep(0.01)
        assert Claim.from_bytes(place.read_bytes()).pid == os.getpid()
    assert not list(place.parent.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_what_goes_wrong_on_the_way_leaves_no_claim(place, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error("planted")

    monkeypatch.setattr(claims, "_remove_leftovers", fail)
    with pytest.raises(error), claimed(place, "it"):
        pytest.fail("it was claimed")
    assert not list(place.parent.iterdir())


# Systems of files


def test_a_disk_without_links_will_do(place, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with claimed(place, "it"):
        assert not takes(place) and os.listdir(place.parent) == [".lock"]
    assert not list(place.parent.iterdir())
    left(place, start=1)
    assert takes(place)


def test_a_disk_without_links_that_is_full_keeps_no_half_claim(place, monkeypatch):
    """The next one would wait for whose it is."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    write, sizes = os.write, []

    def full(file: int, data: bytes) -> int:
        sizes.append(len(data))
        if len(sizes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"), claimed(place, "it"):
        pytest.fail("it was claimed")
    assert not os.listdir(place.parent)


def test_an_answer_that_was_lost_is_no_refusal(place, monkeypatch):
    """Over NFS a request may be sent twice, and the second finds what the first has done."""
    link = os.link

    def twice(*names: Path) -> None:
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", twice)
    assert takes(place) and not list(place.parent.iterdir())


def test_nothing_relies_on_locks_of_the_system():
    """Where they are missing, or are those of one machine alone, everybody would get one."""
    for package in ("tokenizer", "prior", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            assert not re.search(r"\b(fcntl|flock|lockf)\b", path.read_text()), path


def test_a_copy_of_a_folder_is_not_held_by_who_writes_in_the_first(tmp_path, quick, capfd):
    """Nothing is said of it but that this has to be found out."""
    place = inside(tmp_path / "run")
    place.parent.mkdir()
    with holder(place, PERIOD=0.05):
        copy = inside(shutil.copytree(place.parent, tmp_path / "copy"))
        assert not takes(place) and takes(copy) and not os.listdir(copy.parent)
        assert "may be writing here" in capfd.readouterr().err
    shutil.copytree(place.parent, copy.parent, dirs_exist_ok=True)
    assert known_gone(copy) == Claim.from_bytes(copy.read_bytes()).nonce  # nobody waits for the dead


# Names


def test_a_claim_beside_has_one_name_for_one_place(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    assert beside(tmp_path / "link" / "set.npz") == tmp_path / "runs" / ".set.npz.lock"
    assert beside(f"{tmp_path}/runs/../runs/folder/") == tmp_path / "runs" / ".folder.lock"
    long = beside(tmp_path / ("n" * 250))
    with claimed(long, "it"):
        assert len(long.name) < 100
    assert beside(tmp_path / ("n" * 249)) != long


def test_what_a_claim_leaves_in_a_folder_is_known_by_its_name():
    nonce = "0123456789abcdef" * 2
    assert all(map(is_claim, (".lock", f".lock-{nonce}", f".lock.{nonce}")))
    assert not any(map(is_claim, (".locked", ".lock-mine", f"x.lock-{nonce}", f".lock-{nonce}.txt", "lock")))


def test_a_claim_says_what_is_known_of_its_process():
    claim = Claim.new()
    assert Claim.from_bytes(claim.to_bytes()) == claim and len(claim.to_bytes()) == 1024
    assert claim.start == started(os.getpid()) and json.loads(claim.to_bytes())["pid"] == os.getpid()
    assert claim.state() == "held" and claim.state([claim.nonce]) == "gone"
