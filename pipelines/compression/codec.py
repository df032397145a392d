"""An entropy coder's tables from a model's logits, the same integers on every machine.

A coder needs the same numbers on both sides, and floats differ in their last bits with batch, cache, threads and
instruction set. So models are evaluated in float64, where they differ by about 1e-14, and logits are rounded to a grid
of 1/16. A symbol with a logit within 1e-9 of a rounding boundary is coded uniformly, and its position is written down.
The coder gets whole numbers: 2^32 exp(-z / 16) for z grid steps below the largest logit, from a table made by exact
arithmetic.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .container import DamagedStream, ModelMismatch, StreamError

STEPS = 16
"""Grid steps per nat: rounding costs 0.03 % of the bits."""
GUARD = 1e-9
"""How near a boundary, in nats, a logit is in doubt: 60,000 times what machines were seen to differ by."""
SCALE = 1 << 32


@cache
def exponentials() -> Tensor:
    """round(2^32 exp(-z / 16)) for z = 0, 1, ... until it is 0, whole numbers in float64: decimal arithmetic, in which
    no two machines differ."""
    with localcontext() as context:
        context.prec = 50
        values = [SCALE]
        while values[-1]:
            values.append(int((SCALE * (Decimal(-len(values)) / STEPS).exp()).to_integral_value()))
    return torch.tensor(values, dtype=torch.float64)


def grid_steps(logits: Tensor) -> tuple[Tensor, Tensor]:
    """How many grid steps each of `logits` (rows, V) float64 is below the largest, cut where the table ends; and bool
    `(rows,)`, whether any of those that count is too near a boundary to be sure of."""
    last = len(exponentials()) - 1
    finite = logits.nan_to_num(nan=0.0).clamp(-1e9, 1e9)
    scaled = finite * STEPS + 0.5  # 0 lies in the middle of a cell
    nearest = scaled.floor().long()
    below = nearest.amax(-1, keepdim=True) - nearest
    unsure = ((scaled - scaled.round()).abs() < GUARD * STEPS) & (below <= last)
    return below.clamp(max=last), unsure.any(-1)


def weights_of(steps: Tensor, uniform: Tensor) -> NDArray[np.float64]:
    """The coder's whole numbers `(rows, V)` for `steps` (rows, V), in the type that it takes; all equal in the rows
    that are `uniform` (rows,)."""
    weights = exponentials().to(steps.device)[steps]
    weights[uniform] = 1
    return weights.cpu().numpy()


def constriction() -> Any:
    """The library that codes. Raises `StreamError` if it is missing."""
    try:
        import constriction as library
    except ImportError as error:
        raise StreamError('compression needs the package constriction: pip install "smalti[compress]"') from error
    return library


class SymbolCoder(Protocol):
    """Codes symbols in turn, or decodes them: a model that is walked with either computes the same numbers."""

    def code(self, logits: Tensor, symbols: Tensor) -> Tensor:
        """The next symbols `(rows,)` under `logits` (rows, V) float64. An encoder takes `symbols`, and returns them; a
        decoder returns those that it finds."""
        ...


class Encoder:
    """Codes symbols; `doubts` says of each whether it was coded uniformly."""

    def __init__(self) -> None:
        self.library = constriction()
        self.coder = self.library.stream.queue.RangeEncoder()
        self.doubts: list[Tensor] = []

    def code(self, logits: Tensor, symbols: Tensor) -> Tensor:
        """Code `symbols`, and return them."""
        steps, unsure = grid_steps(logits)
        self.doubts.append(unsure)
        family = self.library.stream.model.Categorical(perfect=False)
        self.coder.encode(symbols.cpu().numpy().astype(np.int32), family, weights_of(steps, unsure))
        return symbols

    def bytes(self) -> bytes:
        """All that was coded."""
        return bytes(self.coder.get_compressed().astype("<u4").tobytes())


class Decoder:
    """Decodes symbols. doubts: bool, of each symbol whether it was coded uniformly."""

    def __init__(self, data: bytes | memoryview, doubts: Tensor) -> None:
        if len(data) % 4:
            raise DamagedStream("the stream is damaged: coded symbols are no whole number of words")
        self.library = constriction()
        self.coder = self.library.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        self.doubts = doubts

    def code(self, logits: Tensor, symbols: Tensor) -> Tensor:
        """The next symbols. Raises `ModelMismatch` where there are none under these logits."""
        unsure, self.doubts = self.doubts[: len(logits)], self.doubts[len(logits) :]
        family = self.library.stream.model.Categorical(perfect=False)
        try:
            found = self.coder.decode(family, weights_of(grid_steps(logits)[0], unsure))
        except (AssertionError, ValueError) as error:
            raise ModelMismatch(f"coded symbols make no sense under this machine's probabilities ({error})") from error
        return torch.from_numpy(np.asarray(found)).to(symbols)

    def finish(self) -> None:
        """Raise `ModelMismatch` if coded symbols are left over."""
        if not self.coder.maybe_exhausted():
            raise ModelMismatch("coded symbols are left over: this machine computes other probabilities")
