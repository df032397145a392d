"""Turn a model's logits into the tables of an entropy coder, with the same integers on every machine.

The coder needs identical numbers on both sides, but floats differ in their last bits with batch size, cache, threads
and instruction set. Therefore models are evaluated in float64, where they differ by about 1e-14, and logits are rounded
to a grid of 1/16. A symbol with a logit within 1e-9 of a rounding boundary is coded uniformly, and its position is
stored. The coder gets integers: 2^32 exp(-z / 16) for z grid steps below the largest logit, from a table computed
exactly.
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
"""Grid steps per nat; rounding costs 0.03 % of the bits."""
GUARD = 1e-9
"""Distance to a rounding boundary, in nats, below which a logit is unsure: 60,000 times the differences measured
between machines."""
SCALE = 1 << 32


@cache
def exponentials() -> Tensor:
    """Compute round(2^32 exp(-z / 16)) for z = 0, 1, ... until 0, in decimal arithmetic, which is the same on all
    machines. Integers in float64."""
    with localcontext() as context:
        context.prec = 50
        values = [SCALE]
        while values[-1]:
            values.append(int((SCALE * (Decimal(-len(values)) / STEPS).exp()).to_integral_value()))
    return torch.tensor(values, dtype=torch.float64)


def grid_steps(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many grid steps each of `logits` (rows, V) float64 is below the largest, at most the length of the
    table; and whether any logit within the table is too close to a rounding boundary, bool `(rows,)`."""
    last = len(exponentials()) - 1
    finite = logits.nan_to_num(nan=0.0).clamp(-1e9, 1e9)
    scaled = finite * STEPS + 0.5  # 0 is the middle of a cell
    nearest = scaled.floor().long()
    below = nearest.amax(-1, keepdim=True) - nearest
    unsure = ((scaled - scaled.round()).abs() < GUARD * STEPS) & (below <= last)
    return below.clamp(max=last), unsure.any(-1)


def weights_of(steps: Tensor, uniform: Tensor) -> NDArray[np.float64]:
    """Return the integer weights `(rows, V)` for `steps` (rows, V), as float64 for the coder; equal weights in the rows
    that are `uniform` (rows,)."""
    weights = exponentials().to(steps.device)[steps]
    weights[uniform] = 1
    return weights.cpu().numpy()


def constriction() -> Any:
    """Import the entropy coding library. Raises `StreamError` if it is missing."""
    try:
        import constriction as library
    except ImportError as error:
        raise StreamError('compression needs the package constriction: pip install "smalti[compress]"') from error
    return library


class SymbolCoder(Protocol):
    """Encodes or decodes symbols, so that both directions share the code that evaluates the models."""

    def code(self, logits: Tensor, symbols: Tensor) -> Tensor:
        """Code the next symbols `(rows,)` under `logits` (rows, V) float64. An encoder encodes and returns `symbols`; a
        decoder returns the decoded ones."""
        ...


class SymbolEncoder:
    """Encodes symbols; `unsure` records whether each symbol was coded uniformly."""

    def __init__(self) -> None:
        self.library = constriction()
        self.coder = self.library.stream.queue.RangeEncoder()
        self.unsure: list[Tensor] = []

    def code(self, logits: Tensor, symbols: Tensor) -> Tensor:
        """Encode and return `symbols`."""
        steps, unsure = grid_steps(logits)
        self.unsure.append(unsure)
        family = self.library.stream.model.Categorical(perfect=False)
        self.coder.encode(symbols.cpu().numpy().astype(np.int32), family, weights_of(steps, unsure))
        return symbols

    def bytes(self) -> bytes:
        """Return everything encoded so far."""
        return bytes(self.coder.get_compressed().astype("<u4").tobytes())


class SymbolDecoder:
    """Decodes symbols. unsure: whether each symbol was coded uniformly, bool."""

    def __init__(self, data: bytes | memoryview, unsure: Tensor) -> None:
        if len(data) % 4:
            raise DamagedStream("the stream is damaged: the coded symbols are not a whole number of words")
        self.library = constriction()
        self.coder = self.library.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        self.unsure = unsure

    def code(self, logits: Tensor, symbols: Tensor) -> Tensor:
        """Decode the next symbols. Raises `ModelMismatch` if that is impossible under these logits."""
        unsure, self.unsure = self.unsure[: len(logits)], self.unsure[len(logits) :]
        family = self.library.stream.model.Categorical(perfect=False)
        try:
            found = self.coder.decode(family, weights_of(grid_steps(logits)[0], unsure))
        except (AssertionError, ValueError) as error:
            raise ModelMismatch(f"the symbols cannot be decoded with this machine's probabilities ({error})") from error
        return torch.from_numpy(np.asarray(found)).to(symbols)

    def finish(self) -> None:
        """Raise `ModelMismatch` if coded symbols are left over."""
        if not self.coder.maybe_exhausted():
            raise ModelMismatch("symbols are left over: this machine computes different probabilities")
