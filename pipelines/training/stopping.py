"""Requests to stop: Ctrl-C, SIGTERM, a closed terminal, a dead launcher.

Each request finishes the step, saves and stops the run; a second Ctrl-C stops it at once. Launchers handle Ctrl-C
differently. accelerate's launcher of a single process also receives it, and exits a quarter of a second later.
torchrun's workers do not receive it from the terminal: torchrun forwards it, waits 30 seconds
(TORCH_ELASTIC_SHUTDOWN_TIMEOUT), and forwards a second Ctrl-C as SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ..config import is_first_process
from .checkpoint import list_checkpoints, step_of

FORWARDED = 0.5  # a second SIGINT within this many seconds is the same Ctrl-C, forwarded by a launcher


class Stop:
    """Requests to stop the run in the folder `run`, received by this process."""

    def __init__(self, run: Path) -> None:
        self.run, self.parent = run, os.getppid()
        self.requested = False
        self.interrupted: float | None = None  # time of the first Ctrl-C
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def is_requested(self) -> bool:
        """Return whether a signal arrived or the launcher died; the launcher of a single process does not forward
        SIGTERM."""
        orphaned = "ACCELERATE_MIXED_PRECISION" in os.environ and os.getppid() != self.parent
        return self.requested or orphaned

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted is None:
            self.requested, self.interrupted = True, time.monotonic()
            self.print_line("Ctrl-C: saving, then stopping; press Ctrl-C again to stop at once")
        elif time.monotonic() - self.interrupted > FORWARDED:
            self.stop_now()

    def terminate(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM, which means preemption or, under torchrun, a second Ctrl-C."""
        if self.interrupted is not None and "TORCHELASTIC_RUN_ID" in os.environ:
            self.stop_now()
        self.requested = True

    def hang_up(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGHUP: the terminal is closed, so discard output that would fail."""
        self.requested = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for terminal in self._terminals:
            os.dup2(nowhere, terminal)

    def stop_now(self) -> None:
        """Stop this process at once with an unhandled SIGINT, so that a shell sees a Ctrl-C."""
        self.print_line(f"stopped at once; {describe_saved(self.run)}")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)

    def print_line(self, text: str) -> None:
        """Write a line to stderr, below the progress bar, without `print`, which is not reentrant."""
        if is_first_process():
            below = "\n" if 2 in self._terminals else ""
            with suppress(OSError):
                os.write(2, f"{below}{self.run}: {text}\n".encode())


@contextmanager
def handle_signals(stop: Stop, alone: bool) -> Iterator[None]:
    """Forward signals to `stop`. Ignored signals (`nohup`, a background job) stay ignored, except SIGTERM.

    alone: whether this is the only process of the run.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    handlers = {"SIGINT": stop.interrupt, "SIGTERM": stop.terminate, "SIGHUP": stop.hang_up}
    numbers = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    before: dict[int, Any] = {}
    for number, handler in numbers.items():  # Windows has no SIGHUP
        if number == signal.SIGTERM or signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, handler)
    try:
        yield
    except BaseException:
        if not alone:  # the launcher's SIGTERM must not end this process before it reports the failed process
            del before[signal.SIGTERM]
        raise
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def describe_saved(run: Path) -> str:
    """Describe which step of the run is saved."""
    try:
        checkpoints = list_checkpoints(run)
    except OSError as error:
        return f"the checkpoints cannot be listed ({error.strerror})"
    if not checkpoints:
        return "nothing was saved yet"
    return f"step {step_of(checkpoints[-1])} is saved; the same command continues from there"
