"""A copy of a run's record in a tracker, made by a thread of its own.

The thread reads `metrics.jsonl` and `previews/`, from the step on that the tracker holds, and goes on while they grow.
So a tracker that is slow, away or broken costs the run at most a line of warning: the run never waits for it, starting
and ending have limits, every failure stays in the thread, and what is not copied now is copied when the run resumes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..config.terminal import tell
from .record import Entry, Reader, Record

INIT_SECONDS = 30.0
CLOSE_SECONDS = 15.0
LAST_SECONDS = 300.0  # for a model, if it is sent at the end


class Target(Protocol):
    """What a mirror writes to, once it was started. Any method may raise anything."""

    held: int
    """The highest step that it has already, from earlier processes; -1 for none."""

    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def images(self, step: int, values: dict[str, Path]) -> None: ...

    def finish(self) -> None: ...


class Mirror:
    """A daemon thread that starts a tracker and copies the record to it, in order; nothing here raises.

    `starts` are ways to start, by name, tried in turn; `between` tidies up after one that failed. `advice` is for a
    user whose tracker was not done in time. `held` is the highest step that the tracker may have, by what is known
    before it has started; later, `copied` is.
    """

    def __init__(
        self,
        label: str,
        record: Record,
        starts: dict[str, Callable[[], Target]],
        *,
        held: int = -1,
        between: Callable[[], None] = lambda: None,
        advice: str = "metrics.jsonl has every number",
    ) -> None:
        self.label, self.advice, self.copied = label, advice, held
        self._reader, self._starts, self._between = Reader(record), starts, between
        self._ending = self._given_up = self._failed = False
        self.target: Any = None
        """What it writes to, once that was started."""
        self._last: dict[str, Callable[[Any], None]] = {}
        self._news = threading.Event()
        self._news.set()  # there may be a past
        self._thread = threading.Thread(target=self._work, name=f"mirror-{label}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something new in the record. Does not wait."""
        self._news.set()

    def end(self, last: dict[str, Callable[[Any], None]] | None = None) -> None:
        """Ask the thread to end once all of the record is copied and what is `last` is done with the target, in order,
        each under the words that its failure is told in; does not wait."""
        self._last, self._ending = last or {}, True
        self._news.set()

    def join(self, deadline: float) -> None:
        """Wait until it has ended, or `time.monotonic()` is past `deadline`; says if it was not done."""
        began = time.monotonic()
        self._thread.join(max(0.0, deadline - began))
        self._given_up = True  # the interpreter may be ending: the thread prints nothing after this
        if self._thread.is_alive():
            warn(self.label, f"not done after {time.monotonic() - began:.0f} s; {self.advice}")

    def _work(self) -> None:
        target = self._connect()
        if target is None:
            return
        self.target, self.copied = target, max(self.copied, target.held)
        ending = False
        while not ending:
            self._news.wait()
            self._news.clear()
            ending = self._ending  # before the record is read: all that was recorded until then is there
            self._copy(target, ending)
        for failure, act in self._last.items():
            self._attempt(failure, partial(act, target))
        self._attempt("the run was not finished", target.finish)

    def _copy(self, target: Target, to_the_end: bool) -> None:
        """Hand over what is new, and what the target does not hold of it."""
        try:
            for entry in self._reader.read(to_the_end):
                if entry.step > target.held:
                    self.copied = entry.step
                    self._log(target, entry)
        except Exception as error:  # of the disk
            self._report(f"the record was not read ({short(error)})")

    def _log(self, target: Target, entry: Entry) -> None:
        """Hand it over."""
        try:
            getattr(target, entry.method)(entry.step, entry.values)
        except Exception as error:
            self._report(f"step {entry.step} was not logged ({short(error)})")

    def _report(self, failure: str) -> None:
        """Say what failed, if it is the first failure of the run."""
        if not self._failed:
            self._warn(f"{failure}; later failures are not reported")
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
    tell(f"warning: {label}: {message}")


def short(error: BaseException) -> str:
    """What it says, in one line of no great length, or its name."""
    return " ".join(str(error).split())[:200] or type(error).__name__
