"""Requests to stop: Ctrl-C, SIGTERM, a closed terminal, a dead launcher.

Each finishes the step, saves, and ends the run; a second Ctrl-C ends it at once. Launchers treat Ctrl-C differently:
accelerate's launcher of a single process receives it, too, and exits a quarter of a second later; torchrun, whose
workers the terminal does not reach, forwards it, waits 30 seconds (TORCH_ELASTIC_SHUTDOWN_TIMEOUT), and forwards a
second one as SIGTERM.
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

TWICE = 0.5  # a SIGINT within this many seconds is the same Ctrl-C, forwarded by a launcher


class Stop:
    """Requests to this process to stop the run in the folder `run`."""

    def __init__(self, run: Path) -> None:
        self.run, self.parent = run, os.getppid()
        self.requested = False
        self.interrupted: float | None = None
        """Time of the first Ctrl-C, if any."""
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def asked(self) -> bool:
        """Return whether a signal arrived or the launcher died: that of a single process does not forward SIGTERM."""
        orphaned = "ACCELERATE_MIXED_PRECISION" in os.environ and os.getppid() != self.parent
        return self.requested or orphaned

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle the first or second Ctrl-C."""
        if self.interrupted is None:
            self.requested, self.interrupted = True, time.monotonic()
            self.say("Ctrl-C: saving, then ending; press Ctrl-C again to end at once")
        elif time.monotonic() - self.interrupted > TWICE:
            self.end()

    def terminate(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM, which announces preemption, or a second Ctrl-C under torchrun."""
        if self.interrupted is not None and "TORCHELASTIC_RUN_ID" in os.environ:
            self.end()
        self.requested = True

    def hang_up(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGHUP: the terminal is closed, so redirect output that would fail."""
        self.requested = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for terminal in self._terminals:
            os.dup2(nowhere, terminal)

    def end(self) -> None:
        """End this process at once by SIGINT itself, so that a shell sees a Ctrl-C."""
        self.say(f"ended at once; {what_is_saved(self.run)}")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)

    def say(self, text: str) -> None:
        """Write a line to stderr, below the progress bar. Not by `print`, which is not reentrant."""
        if is_first_process():
            below = "\n" if 2 in self._terminals else ""
            with suppress(OSError):
                os.write(2, f"{below}{self.run}: {text}\n".encode())


@contextmanager
def heed_signals(stop: Stop, alone: bool) -> Iterator[None]:
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
        if not alone:  # the launcher's SIGTERM must not end this process before it has reported the lost one
            del before[signal.SIGTERM]
        raise
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def what_is_saved(run: Path) -> str:
    """Say what is saved of a run that ends now."""
    try:
        checkpoints = list_checkpoints(run)
    except OSError as error:
        return f"the checkpoints cannot be listed ({error.strerror})"
    if not checkpoints:
        return "nothing was saved yet"
    return f"step {step_of(checkpoints[-1])} is saved, the same command continues from there"
