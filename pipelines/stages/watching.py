"""What a caller sees of a call while it goes on, as in diffusers: `callback_on_step_end`, and `pipe.interrupt`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from prior.sampling import Step, progress_bar

T = TypeVar("T")
Callback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]
"""`callback_on_step_end`: takes the pipeline, the step (from 0), the rank that the images being drawn have reached in
their order, and `{"tokens": (B, *grid), "known": bool (B, *grid)}`; returns that, or None."""


class Interrupted(RuntimeError):
    """Sampling was ended by `pipe.interrupt = True`, before all tokens were drawn.

    tokens, known: those of all images asked for, `(B, *grid.shape)`, and which of them are drawn or were given; given
    to a call with the same seeds, it goes on from there.
    """

    def __init__(self, tokens: Tensor, known: Tensor) -> None:
        super().__init__(f"interrupted after {int(known.sum())} of {known.numel()} tokens: see `tokens` and `known`")
        self.tokens, self.known = tokens, known

    def __reduce__(self) -> Any:
        return type(self), (self.tokens, self.known)


class Watcher:
    """What watches the steps of one call, which draws `tokens` where not `known`, both `(B, *grid.shape)`, in
    batches."""

    def __init__(self, pipeline: Any, callback: Callback | None, tokens: Tensor, known: Tensor) -> None:
        self.pipeline, self.callback = pipeline, callback
        self.thread, self.interrupted = threading.get_ident(), False
        self.tokens, self.known = tokens.clone(), known.clone()  # they may be the caller's own memory
        self.steps = self.before = 0  # in all, and until this batch
        self.rows = slice(0)

    def begin(self, rows: slice) -> None:
        """These are drawn now."""
        self.rows, self.before = rows, self.steps

    def saw(self, step: Step) -> None:
        """Tell of a step. Raises `Interrupted` if the caller has asked for it, and something is left to be drawn."""
        self.steps = self.before + step.number + 1
        if self.callback is not None:
            tokens, known = self.so_far(step)
            version = tokens._version
            found = self.callback(self.pipeline, self.steps - 1, step.rank, {"tokens": tokens, "known": known})
            check_returned(found, tokens, changed=tokens._version != version)
        if self.interrupted:
            tokens, known = self.so_far(step)
            if not bool(known.all()):
                raise Interrupted(tokens, known)

    def so_far(self, step: Step) -> tuple[Tensor, Tensor]:
        """Copies of all images' tokens, and of which are known."""
        tokens, known = self.tokens.clone(), self.known.clone()
        tokens[self.rows], known[self.rows] = step.tokens, step.known
        return tokens, known

    def end(self, drawn: Tensor) -> None:
        """Those are drawn."""
        self.tokens[self.rows], self.known[self.rows] = drawn, True


class Calls:
    """The calls of a pipeline that are under way, in all threads, and which of them are told to end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.under_way: list[Watcher] = []
        self.told = False  # what was said last, since a call began

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """A call is under way, and not yet told to end."""
        with self.lock:
            self.under_way.append(watcher)
            self.told = False
        try:
            yield
        finally:
            with self.lock:
                self.under_way.remove(watcher)

    def own(self) -> list[Watcher]:
        """Those of this thread, the innermost last."""
        return [call for call in self.under_way if call.thread == threading.get_ident()]

    @property
    def interrupt(self) -> bool:
        """Of this thread's call whether it is told to end; in a thread without one, what was said last."""
        own = self.own()
        return own[-1].interrupted if own else self.told

    @interrupt.setter
    def interrupt(self, told: bool) -> None:
        """Tell this thread's call to end, or not to; in a thread without one, all calls."""
        with self.lock:
            self.told = told
            for call in self.own()[-1:] or self.under_way:
                call.interrupted = told


class Interruptible:
    """What a pipeline is told of its calls. Its copies, shallow ones too, have calls of their own."""

    _calls: Calls

    @property
    def interrupt(self) -> bool:
        """Whether sampling is to end. True, set by a callback, ends the call that it watches; set by a thread that does
        not sample, all calls that are under way, in any thread. A call that begins later is not meant."""
        return self._calls.interrupt

    @interrupt.setter
    def interrupt(self, told: bool) -> None:
        self._calls.interrupt = told

    def __getstate__(self) -> dict[str, Any]:
        """All but the calls that are under way."""
        return {**vars(self), "_calls": Calls()}


def progress_of_long(parts: Sequence[T], bar: bool | Mapping[str, Any], what: str) -> Iterable[T]:
    """Iterate over `parts`, with a bar if they take longer than two seconds, unless another bar is shown."""
    from tqdm import tqdm

    if bar is False or len(parts) < 2 or len(getattr(tqdm, "_instances", ())):
        return parts
    return progress_bar(parts, {"desc": what, "delay": 2.0, **({} if bar is True else bar)}, unit="part")


def check_returned(found: Any, tokens: Tensor, changed: bool) -> None:
    """Raise `ValueError` where a callback has `changed` the `tokens` in place, or returned others; `TypeError` where it
    returned something else."""
    if found is not None and not isinstance(found, dict):
        raise TypeError(f"callback_on_step_end should return its last argument or None (got {type(found).__name__})")
    if changed or (found is not None and found.get("tokens", tokens) is not tokens):
        raise ValueError(
            "callback_on_step_end: tokens that are drawn are there to look at, not to change; to keep some of your "
            "own, give tokens= and known= to the call"
        )
