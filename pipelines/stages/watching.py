"""What a caller sees of a call while it goes on, as in diffusers: `callback_on_step_end`, and `pipe.interrupt`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor

from prior.sampling import Step, progress_bar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Callback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]
"""`callback_on_step_end`: takes the pipeline, the step (from 0), the rank that the images being drawn have reached in
their order, and `{"tokens": (B, *grid), "known": bool (B, *grid)}`; returns that, or None."""


class Interrupted(RuntimeError):
    """Sampling was ended by `pipe.interrupt = True`, before all tokens were drawn.

    tokens, known: those of all images asked for, `(B, *grid.shape)`, and which of them are drawn or were given. A call
    with these and the same seeds returns what the interrupted one would have; with `num_orders` or `steps`, other
    completions of the same tokens.
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
        if callback is not None and not callable(callback):
            raise TypeError(f"callback_on_step_end should be a function (got {callback!r})")
        self.pipeline, self.callback = pipeline, callback
        self.interrupted = False
        self.tokens, self.known = tokens.clone(), known.clone()  # they may be the caller's own memory
        self.steps = self.before = 0  # in all, and until this batch
        self.rows = slice(0)

    def begin(self, rows: slice) -> None:
        """Note which images are drawn next."""
        self.rows, self.before = rows, self.steps

    def report(self, step: Step) -> None:
        """Pass a step on to the callback. Raises `Interrupted` if the caller has asked for it, and something is left to
        be drawn."""
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
        """Store a finished batch. Raises `Interrupted` as `report` does."""
        self.tokens[self.rows], self.known[self.rows] = drawn, True
        if self.interrupted and not bool(self.known.all()):
            raise Interrupted(self.tokens, self.known)


class Interruptible:
    """Calls of a pipeline: those from several threads wait for each other, and `interrupt` ends one.

    A callback may call the pipeline again: the lock is reentrant.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._calls: list[Watcher] = []  # a callback's own calls are the later ones

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock and the calls under way: a copy has its own."""
        return {key: value for key, value in vars(self).items() if key not in ("_lock", "_calls")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Interruptible.__init__(self)
        vars(self).update(state)

    @contextmanager
    def _watched(self, watcher: Watcher) -> Iterator[None]:
        self._calls.append(watcher)
        try:
            yield
        finally:
            self._calls.remove(watcher)

    @property
    def interrupt(self) -> bool:
        """Whether the sampling call under way is to end. Set it to True from a callback or from another thread; a later
        call is not affected."""
        return bool(self._calls) and self._calls[-1].interrupted

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        if self._calls:
            self._calls[-1].interrupted = value


def serialized(method: F) -> F:
    """Let a method of an `Interruptible` run in one thread at a time."""

    @wraps(method)
    def call(self: Interruptible, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(F, call)


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
