"""What is written by a thread while training goes on: one thing at a time, so that only one copy is in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """A thread that writes. `wait` before the next thing, and before the end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._writing: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Call `write` in the thread."""
        self.wait()
        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Until all is written. Raises what `write` raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raise what `write` raised, if it has."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def close(self) -> None:
        """Let what was begun be written, as well as can be: after an error, which is what will be told."""
        self._thread.shutdown()
