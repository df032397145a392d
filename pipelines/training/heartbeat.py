"""Which process is where: each keeps a line in the run folder, so that the others can say which one was lost, where.

A collective only says that a peer is gone or late, and on a GPU not even that: it waits. Here a thread of each process
writes that it is alive, and ends the process when another has been silent, or behind, for the timeout of the run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..config.command import ProcessLost, RunError, is_bug

PERIOD = 1.0  # seconds between signs of life
FOLDER = ".processes"
PHASES = ("start", "validate", "preview", "save", "train", "end")
"""In the order in which the loop comes to them at a step: a process that is further waits for the others."""
SIZE = 1024  # bytes of a line, so that a shorter one leaves nothing of a longer one
COLLECTIVE = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out|process ?group|collective|tcpstore",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sign:
    """What a process last wrote of itself: `since` is when it came to its phase, `alive` when it last wrote."""

    rank: int
    pid: int
    host: str
    step: int = 0
    phase: str = "start"
    since: float = 0.0
    alive: float = 0.0
    cause: str = ""

    @property
    def place(self) -> str:
        """`step 12 (train)`."""
        return f"step {self.step} ({self.phase})"

    @property
    def position(self) -> tuple[int, int]:
        """Orders processes by how far they are."""
        return self.step, PHASES.index(self.phase)


class Heartbeat:
    """The sign of this process, written where it changes and once a second; and what the signs of others mean.

    One process alone writes nothing. timeout: seconds of silence, or of being behind, after which another is given up.
    """

    def __init__(self, run: Path, rank: int, world: int, timeout: float) -> None:
        self.folder, self.world, self.timeout = run / FOLDER, world, timeout
        now = time.time()
        self.sign = Sign(rank, os.getpid(), socket.gethostname(), since=now, alive=now)
        self._came = time.monotonic()  # to its phase, by a clock that neither is set nor runs while the machine sleeps
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._file: int | None = None
        if world > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.folder / str(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            self._write()
            threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def beat(self, step: int, phase: str) -> None:
        """This process has come to `phase` of `step`."""
        with self._lock:
            self.sign = replace(self.sign, step=step, phase=phase, since=time.time())
            self._came = time.monotonic()
        self._write()

    def close(self, cause: str = "", *, last: bool = False) -> None:
        """Say why this process ends: an error, or nothing where all went well; the `last` one removes the signs."""
        self._closed.set()
        if self.world > 1:
            with self._lock:
                self.sign = replace(self.sign, cause=cause[:300])
            self._write()
            with self._lock:
                if self._file is not None:
                    os.close(self._file)
                self._file = None
            if last:
                shutil.rmtree(self.folder, ignore_errors=True)

    def others(self) -> list[Sign]:
        """The signs of the other processes that can be read."""
        signs = []
        for rank in range(self.world):
            try:
                sign = Sign(**json.loads((self.folder / str(rank)).read_text()))
            except (OSError, ValueError, TypeError):  # not begun yet, or read while it was written
                continue
            if rank != self.sign.rank:
                signs.append(sign)
        return signs

    def explain(self, error: BaseException, seconds: float = 3.0) -> str | None:
        """Which process an `error` is about, where that is another one and it can be told within `seconds`."""
        if self.world == 1 or not COLLECTIVE.search(f"{type(error).__name__} {error}"):
            return None
        until = time.monotonic() + seconds
        while True:
            found = [text for sign in self.others() if (text := self._loss(sign))]
            if found or time.monotonic() > until:
                return found[0] if found else None
            time.sleep(0.1)

    def _loss(self, sign: Sign) -> str | None:
        """What has become of another process, if it is lost."""
        name, silent = f"process {sign.rank} ({sign.host})", time.time() - sign.alive
        state = process_state(sign.pid) if sign.host == self.sign.host else "unknown"
        if sign.cause:
            return f"{name} failed at {sign.place}: {sign.cause}"
        if state == "gone":
            return f"{name} is gone at {sign.place}: it was killed, or ended early"
        if silent > self.timeout / 2 and not self._signs_still(sign):
            return f"{name} is {'frozen' if state == 'stopped' else 'silent'} at {sign.place} since {silent:.0f} s"
        return None

    def _signs_still(self, sign: Sign) -> bool:
        """Whether a process that seems to be silent writes all the same: the clock of its machine may be behind."""
        time.sleep(2 * min(PERIOD, self.timeout / 4))
        return any(other.rank == sign.rank and other.alive != sign.alive for other in self.others())

    def _late(self) -> str | None:
        """Which process this one has been waiting for longer than the timeout."""
        if time.monotonic() - self._came < self.timeout:
            return None
        signs = self.others()
        for sign in signs:
            if text := self._loss(sign):
                return text
        behind = [sign for sign in signs if sign.position < self.sign.position]
        late = [sign for sign in behind if time.time() - sign.since > self.timeout]
        if not late:
            return None
        waited = time.time() - late[0].since
        return (
            f"process {late[0].rank} ({late[0].host}) has been at {late[0].place} for {waited:.0f} s; "
            f"train.timeout={self.timeout:g} allows no more"
        )

    def _watch(self) -> None:
        while not self._closed.wait(min(PERIOD, self.timeout / 4)):
            with self._lock:
                self.sign = replace(self.sign, alive=time.time())
            self._write()
            if text := self._late():
                # The main thread waits in a collective, which no exception can reach.
                try:
                    print(f"error on process {self.sign.rank}: {self.sign.place}: {text}", file=sys.stderr, flush=True)
                    sys.stdout.flush()
                finally:  # the terminal may be gone, or a log's disk full
                    os._exit(1)

    def _write(self) -> None:
        with self._lock:
            if self._file is None:
                return
            line = json.dumps(asdict(replace(self.sign, alive=time.time()))).ljust(SIZE)
            try:
                os.pwrite(self._file, line.encode(), 0)
            except OSError:  # a full disk: the others lose a message, not the run
                pass


@contextmanager
def told_where(heartbeat: Heartbeat) -> Iterator[None]:
    """Tell the other processes of an error. Raises `ProcessLost` if it comes from one of them, and `RunError`, which
    says where it came up, if it is a bug."""
    try:
        yield
    except BaseException as error:
        lost = str(error) if isinstance(error, ProcessLost) else heartbeat.explain(error)
        ended = f"ended early, with exit code {error.code}" if isinstance(error, SystemExit) else None
        heartbeat.close(lost or ended or f"{type(error).__name__}: {error}")
        if lost:
            raise ProcessLost(f"{heartbeat.sign.place}: {lost}") from error
        if is_bug(error):
            raise RunError(f"{heartbeat.sign.place}: {type(error).__name__}: {error}") from error
        raise


def process_state(pid: int) -> str:
    """`gone`, `stopped` (by a signal), `running`, or `unknown` where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone" if Path("/proc/self/stat").exists() else "unknown"
    letter = stat.rpartition(")")[2].split()[0]
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(letter, "running")
