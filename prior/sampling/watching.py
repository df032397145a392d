"""What a caller sees of sampling while it goes on: a bar, and each step when it is taken.

Nothing is copied, and a GPU is not waited for, unless somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..requests import Rows
from .progress import progress_over

T = TypeVar("T")


class Step:
    """A step that has been taken, to be looked at while `on_step` runs: later the memory behind it is drawn in.

    number: from 0; where the images are drawn in several parts, it goes on counting over all of them.
    """

    def __init__(self, number: int, watch: Watch, rows: Rows, drawn: Tensor, decided: int | Tensor) -> None:
        self.number = number
        self._watch, self._rows, self._drawn, self._decided = watch, rows, drawn, decided

    @property
    def rank(self) -> int:
        """How far along their order the images being drawn have come: so many tokens of each are decided, those
        included that the caller gave."""
        return self._decided if isinstance(self._decided, int) else int(self._decided.sum(1).min())

    @cached_property
    def _whole(self) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # no inference tensors: they are the caller's
            return self._watch.with_part(self._rows, self._drawn, self._decided)

    @property
    def tokens(self) -> Tensor:
        """Those of all images so far, a copy, `(B, *grid.shape)`; 0 where none is decided."""
        return self._whole[0]

    @property
    def known(self) -> Tensor:
        """Which tokens are decided or given, bool `(B, *grid.shape)`."""
        return self._whole[1]


OnStep = Callable[[Step], Any]


class Watch:
    """What is shown and told of one request.

    shown: a bar, perhaps with arguments of `tqdm`; on_step: called with each `Step`, of whatever path draws the images.
    What it raises ends sampling. rows: all that are drawn, in raster order.
    """

    def __init__(
        self, shown: bool | Mapping[str, Any], on_step: OnStep | None, rows: Rows, shape: Sequence[int]
    ) -> None:
        self.shown, self.on_step, self.shape = shown, on_step, tuple(shape)
        self.tokens = None if on_step is None else rows.given.clone()
        self.known = None if on_step is None else rows.keep.clone()
        self.steps = 0
        self.failed = False  # whether `on_step` raised an error, which is then not the sampler's

    def over(self, steps: Sequence[T]) -> Iterable[T]:
        """`steps` of a part, with the bar."""
        return progress_over(steps, self.shown, unit="pass")

    def took(self, rows: Rows, drawn: Tensor, decided: int | Tensor) -> None:
        """Tell of a step: `drawn` `(b, N)` in the order of `rows`, the images of this part; of which the first so many
        are decided, or those where bool `(b, N)` holds, in the same order."""
        if self.on_step is None:
            return
        step, self.steps = Step(self.steps, self, rows, drawn, decided), self.steps + 1
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.on_step(step)
        except BaseException:
            self.failed = True
            raise

    def drew(self, rows: Rows, drawn: Tensor) -> None:
        """Remember a part that is finished."""
        if self.tokens is not None and self.known is not None:
            self.tokens[rows.images] = to_raster(rows, drawn)
            self.known[rows.images] = True

    def with_part(self, rows: Rows, drawn: Tensor, decided: int | Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of all images, and which are known, with the part that is being drawn."""
        assert self.tokens is not None and self.known is not None
        if isinstance(decided, int):
            decided = torch.arange(drawn.shape[1], device=drawn.device) < decided
        known = rows.keep | decided
        tokens, every = self.tokens.clone(), self.known.clone()
        tokens[rows.images] = to_raster(rows, torch.where(known, drawn, 0))
        every[rows.images] = to_raster(rows, known)
        return tokens.unflatten(1, self.shape), every.unflatten(1, self.shape)


def to_raster(rows: Rows, values: Tensor) -> Tensor:
    """`values` `(b, N)` in the order of `rows` in raster order."""
    return torch.empty_like(values).scatter_(1, rows.path.expand(values.shape), values)
