"""One run at a time for what it writes: the first of its processes claims the place, and all others of it are told.

A run folder stays, and has its claim in it. Another `out`, a file, or a folder that is replaced as a whole or that
holds none but listed files, has it beside: `.NAME.lock`, as long as a process writes there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tokenizer.files import PathError, make_folder

from ..config import UserError
from ..config.outputs import writing
from ..files.claims import beside, claimed, inside, known_gone
from .sharing import ALONE, Team

SIGNALS = ("SIGTERM", "SIGHUP")
TRIES = 3  # to make a folder that others remove


@contextmanager
def alone_in(run: Path, team: Team = ALONE) -> Iterator[None]:
    """Be the only run in a folder, which is made where it is missing, while the block lasts. Raises `UserError`, on all
    processes, where another one is, and where the folder cannot be written."""
    with _alone(inside(run), run, "out", team):
        yield


@contextmanager
def alone_at(out: Path | str | None, team: Team = ALONE, key: str = "out") -> Iterator[None]:
    """Be the only one that writes a file or folder, the `key` of a command line, while the block lasts, as `alone_in`;
    None: nothing is written. Also for a pipeline that is read, and written hours later: of two that do so, one would
    drop what the other has found."""
    if out is None:
        yield
        return
    with _alone(beside(out), Path(out), key, team):
        yield


@contextmanager
def _alone(place: Path, called: Path, key: str, team: Team) -> Iterator[None]:
    """Each process looks first whether the holder was one of its machine, and is gone: after a launcher has started
    all anew, on several machines, the first process may be on another one."""
    found = team.gather(lambda: known_gone(place))
    with ExitStack() as stack:

        def claim() -> None:
            with writing(key, called):
                release = _claimed(place, called, [nonce for nonce in found if nonce], stack)
            stack.enter_context(_before_signals(release))

        team.first(claim)
        yield


def _claimed(place: Path, called: Path, gone: list[str], stack: ExitStack) -> Callable[[], None]:
    """Make the folder of the claim, and claim: for as long as `stack` lasts. Another process that had made the folder
    may end, and remove it, between the two: then it is made again."""
    left = TRIES
    while True:
        try:
            with ExitStack() as both:
                both.enter_context(_made(place.parent))
                release = both.enter_context(claimed(place, called, gone))
                stack.enter_context(both.pop_all())
                return release
        except PathError as error:
            raise UserError(str(error)) from error
        except FileNotFoundError:
            left -= 1
            if not left:
                raise


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and those that it is in; remove those that are empty in the end."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


class _Ending:
    """What a signal that ends this process does first. before: what it did until now."""

    def __init__(self, number: int, release: Callable[[], None], before: Any) -> None:
        self.number, self.release, self.before = number, release, before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.release()
        if isinstance(self.before, _Ending):
            self.before(number, frame)
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def take_back(self) -> None:
        """As it was, unless somebody else has set something."""
        now: Any = signal.getsignal(self.number)
        if now is self:
            signal.signal(self.number, self.before)


@contextmanager
def _before_signals(release: Callable[[], None]) -> Iterator[None]:
    """Release before a signal ends this process as it would without; what somebody else has set stays."""
    endings = []
    if threading.current_thread() is threading.main_thread():  # which alone may
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            before: Any = signal.getsignal(number)
            if before is signal.SIG_DFL or isinstance(before, _Ending):
                endings.append(_Ending(number, release, before))
                signal.signal(number, endings[-1])
    try:
        yield
    finally:
        for ending in endings:
            ending.take_back()
