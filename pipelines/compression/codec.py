"""An entropy coder's tables from a prior's logits, the same integers on every machine (profile 1 of the container).

A coder needs the same numbers on both sides, and floats differ in their last bits with batch, cache, threads and
instruction set. So models are evaluated in float64, where they differ by about 1e-14, and logits are rounded to a grid
of 1/16. A symbol with a logit within 1e-9 of a rounding boundary is coded uniformly, and its position is written down.
The coder gets whole numbers: 2^32 exp(-z / 16) for z grid steps below the largest logit, from a table made by exact
arithmetic.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal, localcontext
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prior import Prior
from tokenizer.base import finest

from .header import ModelMismatch, StreamError

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

VERSION = "smalti codec 1"
STEPS = 16
"""Grid steps per nat: rounding costs 0.03 % of the bits."""
GUARD = 1e-9
"""How near a boundary, in nats, a logit is in doubt: 60,000 times what paths were seen to differ by."""
SCALE = 1 << 32
NUMBERS = 1 << 22
"""How many logits are held in float64 at once; their grid steps are held in 16 bits."""
KNOWN_ROWS = 8
PROBED = 16
"""The share of the steps, as 1 / 16, after which it shows how long the rest would take."""
CODER_ANSWER = "e910d83e0700f62c"

Weights = NDArray[np.float64]
"""Whole numbers `(rows, V)`, up to 2^32, in the type that the coder takes."""


class CodecError(StreamError):
    """This machine cannot code: the coder is not installed, or not the one that the format was made with."""


@cache
def exponentials() -> Tensor:
    """round(2^32 exp(-z / 16)) for z = 0, 1, ... until it is 0: decimal arithmetic, in which no two machines differ."""
    with localcontext() as context:
        context.prec = 50
        values = [SCALE]
        while values[-1]:
            values.append(int((SCALE * (Decimal(-len(values)) / STEPS).exp()).to_integral_value()))
    return torch.tensor(values)


def grid_steps(logits: Tensor) -> tuple[Tensor, Tensor]:
    """How many grid steps each of `logits` (..., V) float64 is below the largest, int16, cut where the table ends; and
    bool `(...)`, whether any of those that count is too near a boundary to be sure of."""
    last = len(exponentials()) - 1
    finite = logits.nan_to_num(nan=0.0).clamp(-1e9, 1e9)
    scaled = finite * STEPS + 0.5  # 0 lies in the middle of a cell
    nearest = scaled.floor().long()
    below = nearest.amax(-1, keepdim=True) - nearest
    unsure = ((scaled - scaled.round()).abs() < GUARD * STEPS) & (below <= last)
    return below.clamp(max=last).short(), unsure.any(-1)


def weights_of(steps: Tensor, uniform: Tensor) -> Weights:
    """The coder's numbers `(rows, V)` for `steps` (rows, V), all equal in the rows that are `uniform` (rows,)."""
    weights = exponentials().to(steps.device)[steps.long()]
    return torch.where(uniform[:, None], 1, weights).double().cpu().numpy()


# The models


class Models:
    """A pipeline's models in float64, which autocast leaves alone, and what identifies them.

    The unconditional prior is used. `residual`: whether pixels are coded beside the tokens. On a device without
    float64 the processor is used.
    """

    def __init__(self, pipeline: ImagePipeline, *, residual: bool) -> None:
        device = pipeline.device if finest(pipeline.device) == torch.float64 else torch.device("cpu")
        self.prior = doubled(pipeline.prior, device)
        self.tokenizer = doubled(pipeline.tokenizer, device) if residual else pipeline.tokenizer
        self.residual = residual
        self.device = device
        self.grid = pipeline.prior.grid
        self.image_shape = pipeline.tokenizer.image_shape
        parts = (VERSION, pipeline.tokenizer.fingerprint(), pipeline.prior.fingerprint())
        self.model_id = hashlib.sha256(" ".join(parts).encode()).digest()[:16]
        self.order = self.prior.order.to(device)
        self.pass_seconds = math.inf
        """How long a pass over an image takes; not known before `answer`."""

    @torch.inference_mode()
    def answer(self) -> bytes:
        """8 bytes of the sha256 of the integers that fixed tokens lead to. A stream from a machine with another answer
        cannot be decoded here."""
        ids = torch.arange(KNOWN_ROWS * len(self.grid), device=self.device) * 2654435761 % (1 << 32)
        tokens = ((ids >> 7) % self.grid.vocab_size).reshape(KNOWN_ROWS, *self.grid.shape)
        digest, begin = hashlib.sha256(), time.perf_counter()
        known = self.passed_steps(tokens) if self.prior.exact else self.token_steps(tokens)
        for steps, unsure in known:
            digest.update(steps.masked_fill(unsure[:, None], 0).cpu().numpy().tobytes())
        self.pass_seconds = (time.perf_counter() - begin) / KNOWN_ROWS
        if self.residual:
            values = tokens.new_zeros(KNOWN_ROWS, *self.image_shape)
            for channel in range(self.image_shape[0]):
                steps, unsure = self.pixel_steps(tokens, values, channel)
                digest.update(steps.masked_fill(unsure[:, None], 0).cpu().numpy().tobytes())
        return digest.digest()[:8]

    def token_steps(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Grid steps `(n, V)` and doubts `(n,)` of each rank in turn, for known `tokens` (n, *grid.shape): step by
        step, as they are decoded; where passes over whole images would take less time than the steps that are left,
        from these. Both give the same integers."""
        flat = tokens.flatten(1)[:, self.order]
        begin, size = time.perf_counter(), len(self.grid)
        whole = len(tokens) * self.pass_seconds if self.prior.exact else math.inf
        for rank, found in enumerate(walk(self.prior, flat)):
            if rank >= size // PROBED and (time.perf_counter() - begin) / max(1, rank) * (size - rank) > whole:
                yield from islice(self.passed_steps(tokens), rank, None)
                return
            yield found

    def passed_steps(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What `token_steps` gives, of an exact prior, from passes over whole images."""
        rows = max(1, NUMBERS // (len(self.grid) * self.grid.vocab_size))
        parts = [grid_steps(self.prior(some)[:, self.order]) for some in tokens.split(rows)]
        steps, unsure = (torch.cat(each) for each in zip(*parts, strict=True))
        for rank in range(len(self.grid)):
            yield steps[:, rank], unsure[:, rank]

    def pixel_steps(self, tokens: Tensor, values: Tensor, channel: int, batch_size: int = 16) -> tuple[Tensor, Tensor]:
        """Grid steps `(n * H * W, 256)` and doubts `(n * H * W,)` of one channel, given tokens and earlier channels."""
        parts = []
        for some, known in zip(tokens.split(batch_size), values.split(batch_size), strict=True):
            logs = self.tokenizer.value_log_probs(some, known, channel)
            parts.append(grid_steps(logs.double().movedim(1, -1).flatten(0, 2)))
        steps, unsure = zip(*parts, strict=True)
        return torch.cat(steps), torch.cat(unsure)


def doubled(model: Any, device: torch.device) -> Any:
    """A copy in float64, in eval mode."""
    return copy.deepcopy(model).to(device).double().eval()


def walk(prior: Prior, ranked: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Grid steps and doubts rank by rank, on the incremental path; `ranked` `(n, N)` are the tokens in the order of the
    ranks."""
    state = prior.start(len(ranked), None)
    tokens, rank = None, 0
    for size in prior.blocks:
        steps, unsure = grid_steps(prior.next_logits(state, tokens))
        yield from zip(steps.unbind(1), unsure.unbind(1), strict=True)
        tokens, rank = ranked[:, rank : rank + size], rank + size


# The coder


def constriction() -> Any:
    """The library that codes. Raises `CodecError` if it is missing, or makes other bytes than the format's."""
    try:
        import constriction as library
    except ImportError as error:
        raise CodecError('compression needs the package constriction: pip install "smalti[compress]"') from error
    if coder_answer(library) != CODER_ANSWER:
        raise CodecError("the installed constriction makes other bytes than the version this format was made with")
    return library


@cache
def coder_answer(library: Any) -> str:
    """The beginning of the sha256 of fixed symbols, coded under fixed tables."""
    encoder = Encoder(library)
    for size in (2, 7, 256):
        ids = np.arange(64 * size).reshape(64, size) * 2654435761 % (1 << 32)
        encoder.add(ids[:, 0] % size, exponentials().numpy()[ids % len(exponentials())].astype(np.float64))
    return hashlib.sha256(encoder.bytes()).hexdigest()[:16]


class Encoder:
    """A range coder that takes rows of symbols with the weights of each."""

    def __init__(self, library: Any) -> None:
        self._coder = library.stream.queue.RangeEncoder()
        self._family = library.stream.model.Categorical(perfect=False)

    def add(self, symbols: NDArray[np.int64], weights: Weights) -> None:
        """Code `symbols` (rows,)."""
        self._coder.encode(np.ascontiguousarray(symbols, dtype=np.int32), self._family, weights)

    def bytes(self) -> bytes:
        """All that was coded."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """The inverse of `Encoder`; it takes the same rows with the same weights."""

    def __init__(self, library: Any, data: bytes) -> None:
        if len(data) % 4:
            raise StreamError(f"{len(data)} bytes of coded symbols are no whole number of words")
        words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
        self._coder = library.stream.queue.RangeDecoder(words)
        self._family = library.stream.model.Categorical(perfect=False)

    def take(self, weights: Weights) -> NDArray[np.int64]:
        """The next symbols `(rows,)`."""
        try:
            return np.asarray(self._coder.decode(self._family, weights)).astype(np.int64)
        except (AssertionError, ValueError) as error:
            raise ModelMismatch(f"coded bytes make no sense under this machine's probabilities ({error})") from error

    def finish(self) -> None:
        """Raise `ModelMismatch` if coded bytes are left over."""
        if not self._coder.maybe_exhausted():
            raise ModelMismatch("coded bytes are left over: this machine computes other probabilities")


def positions(doubts: Sequence[Tensor]) -> tuple[int, ...]:
    """Positions of the doubts, counted through all rows in the order of coding."""
    if not doubts:
        return ()
    return tuple(torch.nonzero(torch.cat(list(doubts)).cpu()).flatten().tolist())
