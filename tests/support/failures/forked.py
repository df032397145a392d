"""The real verbs in forked children: everything is imported once, so that starting one takes no time.

For a process that has started no threads.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from launch import blank, free_port

from pipelines import ImagePipeline
from pipelines.metrics.codebook import CodebookUse

ENDING = {signal.SIGINT, signal.SIGTERM}
Hook = Callable[[int], None]


class Attempt:
    """The processes of one start of a run; `codes` of those that have ended, negative for a signal."""

    def __init__(self, pids: list[int]) -> None:
        self.pids, self.told = pids, False
        self.codes: dict[int, int] = {}
        self.ended: dict[int, float] = {}

    def wait(self, seconds: float = 120.0, among: set[int] | None = None) -> bool:
        """Whether the processes of these ranks (all) end within so many seconds."""
        wanted, until = among or set(range(len(self.pids))), time.monotonic() + seconds
        while not wanted <= set(self.codes):
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    self.codes[rank], self.ended[rank] = os.waitstatus_to_exitcode(done[1]), time.monotonic()
            if time.monotonic() > until:
                return wanted <= set(self.codes)
            time.sleep(min(0.0005, seconds))
        return True

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        """A signal to these ranks (all) that still run."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if rank not in self.codes:  # not waited for, so the number is still its own
                os.kill(self.pids[rank], number)

    def end(self) -> list[int]:
        """Its exit codes. As a launcher does, it tells those that are left after one has failed to end.

        Raises `AssertionError` for a process that then goes on for half a minute, or for two minutes in any case.
        """
        seconds = 120.0
        while not self.wait(0.05):
            seconds -= 0.05
            if any(self.codes.values()) and not self.told:
                self.send(signal.SIGTERM)
                self.told, seconds = True, 30.0
            if seconds <= 0:
                left = set(range(len(self.pids))) - set(self.codes)
                self.send(signal.SIGKILL)
                raise AssertionError(f"hung: {sorted(left)} of {len(self.pids)} processes; the others {self.codes}")
        return [self.codes[rank] for rank in range(len(self.pids))]


def import_once(*names: str) -> None:
    """Import here what each child would; fails if that starts a thread, which children would lack."""
    for name in names:
        if name not in sys.modules:
            with suppress(Exception):  # some are made by others, or under another name
                importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread was started, which children would lack"
    gc.freeze()  # children look for garbage among their own alone


def start_verb(
    verb: str, world: int, out: Path, argv: list[str], *hooks: Hook, places: dict[str, str] | None = None
) -> Attempt:
    """Start `smalti VERB` in so many processes; each first calls the hooks with its rank. places: more variables of
    their environment. Charts and sample pictures are blank: drawing is half of a tiny run, and has tests of its own."""

    def act(rank: int) -> None:
        os.environ.update(places or {})
        CodebookUse.picture = blank  # type: ignore[method-assign]
        ImagePipeline.sample_picture = blank  # type: ignore[method-assign]
        for hook in hooks:
            hook(rank)
        importlib.import_module(f"pipelines.{verb}").main(argv)

    return fork(world, act, log_of(out))


def fork(world: int, act: Hook, log: Path) -> Attempt:
    """`act` in each of so many processes, with its rank; several find each other as those of a launcher do."""
    port, pids = free_port(), []
    sys.stdout.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # libraries that look after forks would swallow one
    for rank in range(world):
        pids.append(os.fork())
        if not pids[-1]:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            where = {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            child(partial(act, rank), log, where if world > 1 else {}, before)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Attempt(pids)


def in_child(act: Callable[[], Any]) -> None:
    """Do it in a child, so that what torch does there stays out of this process. Raises `AssertionError`."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, "a child has failed"


def child(act: Callable[[], None], log: Path, places: dict[str, Any], signals: set[signal.Signals]) -> None:
    """Become a process that does this, with these signals blocked; does not return."""
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update({key: str(value) for key, value in places.items()})
        act()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def log_of(out: Path) -> Path:
    """Where the processes of a run print."""
    return out.with_name(f"{out.name}.log")


def last_line(out: Path) -> str:
    """The last that they printed."""
    return (log_of(out).read_text().strip().splitlines() or ["(nothing was printed)"])[-1]
