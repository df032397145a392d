"""A copy of a run's numbers and pictures that is made by a thread of its own, in some tracker.

The tracker being slow, away or broken costs the run at most a line of warning: what is put is queued without waiting,
starting and ending have limits, and every failure stays in the thread.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

QUEUE_SIZE = 1000
INIT_SECONDS = 30.0
CLOSE_SECONDS = 15.0
LAST_SECONDS = 300.0  # for a model, if it is sent at the end


class Entry(NamedTuple):
    """A call of a target: `log` with numbers, or `images` with the paths of PNG files, by name."""

    step: int
    method: Literal["log", "images"]
    values: dict[str, Any]


class Target(Protocol):
    """What a mirror writes to, once it was started. Any method may raise anything."""

    held: int
    """The highest step that it has already, from earlier processes; -1 for none."""

    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def images(self, step: int, values: dict[str, Path]) -> None: ...

    def finish(self) -> None: ...


class Mirror:
    """A daemon thread that starts a tracker and hands it what was put, in order; nothing here raises.

    `starts` are ways to start, by name, tried in turn; `between` tidies up after one that failed. `past` gives what
    earlier processes recorded: the target gets what it does not hold of it first, and of all that follows too.
    `advice` is for a user whose tracker was not done in time.
    """

    def __init__(
        self,
        label: str,
        starts: dict[str, Callable[[], Target]],
        *,
        between: Callable[[], None] = lambda: None,
        past: Callable[[], Iterable[Entry]] = tuple,
        advice: str = "metrics.jsonl has every number",
    ) -> None:
        self.label, self.advice, self.dropped = label, advice, 0
        self._starts, self._between, self._past = starts, between, past
        self._ending = self._given_up = self._failed = self._useless = False
        self._last: Callable[[Any], None] | None = None
        self._queue: queue.Queue[Entry | None] = queue.Queue(QUEUE_SIZE)
        self._thread = threading.Thread(target=self._work, name=f"mirror-{label}", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Queue it, or count it as dropped where the queue is full; never waits."""
        if self._useless:
            return
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self.dropped += 1

    def end(self, last: Callable[[Any], None] | None = None) -> None:
        """Ask the thread to end once the queue is empty and `last(target)`, an artifact, is done; does not wait."""
        self._last = last
        self._ending = True  # before the None, for which a full queue has no room
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            pass

    def join(self, deadline: float) -> None:
        """Wait until it has ended, or `time.monotonic()` is past `deadline`; says what is missing."""
        began = time.monotonic()
        self._thread.join(max(0.0, deadline - began))
        self._given_up = True  # the interpreter may be going down: no word from the thread after this
        if self._thread.is_alive():
            warn(self.label, f"not done after {time.monotonic() - began:.0f} s; {self.advice}")
        if self.dropped:
            warn(self.label, f"{self.dropped} entries were dropped because it was too slow; metrics.jsonl has them all")

    def _work(self) -> None:
        target = self._connect()
        if target is None:
            self._useless = True  # said once; what is put from now on is not called dropped
            return
        for entry in self._entries_to_copy():
            if entry.step > target.held:
                self._log(target, entry)
        if self._last is not None:
            self._attempt("the artifact was not made", partial(self._last, target))
        self._attempt("the run was not finished", target.finish)

    def _entries_to_copy(self) -> Iterable[Entry]:
        """What is past, then what is put, until the end."""
        try:
            yield from self._past()
        except Exception as error:
            self._warn(f"earlier steps were not logged ({short(error)})")
        while not (self._ending and self._queue.empty()):
            entry = self._queue.get()
            if entry is None:
                return
            yield entry

    def _log(self, target: Target, entry: Entry) -> None:
        """Hand it over; the first failure of a run is reported."""
        try:
            getattr(target, entry.method)(entry.step, entry.values)
        except Exception as error:
            if not self._failed:
                self._warn(f"step {entry.step} was not logged ({short(error)}); later failures are not reported")
            self._failed = True

    def _attempt(self, failure: str, function: Callable[[], None]) -> None:
        """Call it, and report its failure."""
        try:
            function()
        except Exception as error:
            self._warn(f"{failure} ({short(error)}); {self.advice}")

    def _connect(self) -> Target | None:
        """A target by the first start that works, else None."""
        reasons: list[str] = []
        for name, start in self._starts.items():
            try:
                if reasons:
                    within(INIT_SECONDS, self._between)
                target = within(INIT_SECONDS, start)
            except Exception as error:
                reasons.append(f"{name} failed ({short(error)})")
                continue
            if reasons:
                self._warn(f"{'; '.join(reasons)}; going on {name}")
            return target
        self._warn(f"{'; '.join(reasons)}; going on without it, metrics.jsonl has every number")
        return None

    def _warn(self, message: str) -> None:
        if not self._given_up:
            warn(self.label, message)


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """The result of `function`, run in a thread that is abandoned after `seconds`; raises what it raised, or
    `TimeoutError`."""
    outcome: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def call() -> None:
        try:
            outcome.put((function(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=call, name="mirror-start", daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
    if error is not None:
        raise error if isinstance(error, Exception) else RuntimeError(repr(error))
    return result


def warn(label: str, message: str) -> None:
    """One line on stderr."""
    print(f"warning: {label}: {message}", file=sys.stderr, flush=True)


def short(error: BaseException) -> str:
    """What it says, in one line of no great length, or its name."""
    return " ".join(str(error).split())[:200] or type(error).__name__
