"""Each test of a file alone: the file is collected once, and every test runs in a fork of that process.

For a process that has started no threads: `benchmarks/trust/suite.py` is a command of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Row = dict[str, Any]
WORST = ("failed", "skipped", "passed")  # what a test comes to is the worst of its three phases


def forked(work: Callable[[Callable[[Row], None]], None], seconds: float, log: Path) -> Iterator[Row]:
    """Rows that `work` sends from a process of its own, whose output goes to `log`; the last one says how it ended:
    its exit code, -9 with `hung` where it was killed after so many seconds without a row."""
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receiving)
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        code = 1
        with contextlib.suppress(BaseException):
            work(lambda row: os.write(sending, json.dumps(row).encode() + b"\n") and None)
            code = 0
        os._exit(code)
    os.close(sending)
    yield from rows_from(receiving, pid, seconds)


def rows_from(receiving: int, pid: int, seconds: float) -> Iterator[Row]:
    """See `forked`."""
    import select

    rest, hung = b"", False
    while True:
        if not select.select([receiving], [], [], seconds)[0]:
            hung = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            break
        more = os.read(receiving, 1 << 16)
        if not more:
            break
        *lines, rest = (rest + more).split(b"\n")
        yield from map(json.loads, lines)
    os.close(receiving)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it has left behind
    yield {"code": code, "hung": hung}


class Alone:
    """A plugin: instead of running the tests one after another, it forks for each."""

    def __init__(self, send: Callable[[Row], None], skip: set[str], seconds: float) -> None:
        self.send, self.skip, self.seconds = send, skip, seconds

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Tells of each test that was not told of before."""
        for item in session.items:
            if item.nodeid not in self.skip:
                self.send(self.of(item))
        return True

    def of(self, item: pytest.Item) -> Row:
        """What it comes to, the seconds it takes, and the last lines that it says if it fails."""
        began, log = time.monotonic(), item.config.stash[LOG]
        log.unlink(missing_ok=True)
        rows = list(forked(lambda send: phases(item, send), self.seconds, log))
        ended, found = rows.pop(), [row["outcome"] for row in rows]
        outcome = next((each for each in WORST if each in found), "crashed")
        outcome = "hung" if ended["hung"] else "crashed" if ended["code"] else outcome
        row = {"test": item.nodeid, "outcome": outcome, "seconds": round(time.monotonic() - began, 3)}
        for left in Path(item.config.option.basetemp).glob("*"):
            shutil.rmtree(left, ignore_errors=True)
        if outcome not in ("passed", "skipped"):
            said = "\n".join(each["text"] for each in rows if each["text"]) or tail(log)
            row["text"] = said[-2000:]
        return row


LOG = pytest.StashKey[Path]()


def phases(item: pytest.Item, send: Callable[[Row], None]) -> None:
    """Set it up, call it, tear all of it down."""
    from _pytest.runner import runtestprotocol

    for report in runtestprotocol(item, log=False, nextitem=None):
        send({"outcome": report.outcome, "text": report.longreprtext[-2000:] if report.failed else ""})


class Phases:
    """A plugin: tells of every phase that does not pass, of a file that runs as ever."""

    def __init__(self, send: Callable[[Row], None]) -> None:
        self.send = send

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of each, so that silence means that one hangs."""
        self.send({"test": report.nodeid, "outcome": report.outcome, "text": report.longreprtext[-2000:]})


def collected(path: str, arguments: list[str], folder: Path, plugin: object) -> None:
    """Run pytest on one file with a plugin; raises where nothing could be collected."""

    class Places:
        def pytest_configure(self, config: pytest.Config) -> None:
            config.stash[LOG] = folder / "log"

    argv = [
        path,
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "pyproject.toml",
        f"--basetemp={folder / 'temporary'}",
        *arguments,
    ]
    code = pytest.main(argv, plugins=[Places(), plugin])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED), code


def file_alone(path: str, arguments: list[str], folder: Path, seconds: float) -> Row:
    """The whole file in a process of its own: passed, failed (with which), crashed, hung."""
    log, began = folder / "file.log", time.monotonic()
    work = forked(lambda send: collected(path, arguments, folder, Phases(send)), seconds, log)
    *rows, ended = list(work)
    failed = sorted({row["test"] for row in rows if row["outcome"] == "failed"})
    outcome = "hung" if ended["hung"] else "crashed" if ended["code"] else "failed" if failed else "passed"
    row = {"file": path, "outcome": outcome, "seconds": round(time.monotonic() - began, 3)}
    if outcome != "passed":
        said = "\n".join(row["text"] for row in rows if row["outcome"] == "failed") or tail(log)
        row |= {"failed": failed, "text": said[-2000:]}
    return row


def each_alone(path: str, arguments: list[str], folder: Path, seconds: float, skip: set[str]) -> Iterator[Row]:
    """Each test of the file alone, but for those told of before."""
    log = folder / "tests.log"
    # The inner limit is the one that is reached; the outer one is for a process that collects without end.
    work = forked(lambda send: collected(path, arguments, folder, Alone(send, skip, seconds)), seconds + 120, log)
    for row in work:
        if "test" in row:
            yield row
        elif row["code"] or row["hung"]:
            yield {"test": f"{path}::", "outcome": "crashed", "seconds": 0.0, "text": tail(log)}


def tail(log: Path) -> str:
    """The end of what a process has said."""
    return log.read_text(errors="replace")[-2000:] if log.exists() else ""
