"""Gumbel noise that belongs to the image: drawn from its own generator alone, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.base import finest

from .buffers import Buffer, make_buffer

NOISE_BLOCK = 1 << 16  # numbers drawn at a time for one image; a function of nothing else, so that batches agree


class GumbelNoise:
    """The Gumbel noise of a batch of images, drawn block by block as positions are asked for in ascending order.

    Each image's block is `(positions, V)` from its own generator, so it does not depend on the rest of the batch.
    Drawn as -log(-log(u)), u uniform with 53 bits: torch's own exponential variates take seven times as long on CPU.

    Where blocks are drawn ahead, use it as a context: once that is left, no thread draws from the generators any more.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        num_tokens: int,
        vocab_size: int,
        device: torch.device,
        ahead: int = 0,
    ) -> None:
        """ahead: the number of tokens whose noise will surely be asked for. Their blocks, and no others, may be drawn
        before they are, so that generators end where they would without."""
        self.generators, self.device, self.ahead = generators, device, ahead
        self.positions = max(1, min(num_tokens, NOISE_BLOCK // vocab_size))
        self.shape = (self.positions, len(generators), vocab_size)
        self.on_cpu = all(generator.device.type == "cpu" for generator in generators)
        self.block: Tensor = torch.empty(0)
        self.drawn = 0
        self.buffers: list[Buffer] = []  # one, or two that take turns where one block is drawn ahead
        self.current: Buffer | None = None  # holds `block`
        self.next: Buffer | None = None

    def __enter__(self) -> GumbelNoise:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.next is not None:
            self.next.wait()

    def of(self, begin: int, end: int) -> Tensor:
        """Noise `(B, n, V)` of the n tokens ranked `begin` to `end` - 1, which holds until the next call; ranks are
        asked for in ascending order."""
        if self.next is not None:
            self.next.send()
        at, parts = begin, None
        while at < end:
            while at >= self.drawn:
                self._next_block()
            first, stop = self.drawn - self.positions, min(end, self.drawn)
            part = self.block[at - first : stop - first]
            if len(part) == end - begin:
                return part.transpose(0, 1)
            parts = part.new_empty(end - begin, *self.shape[1:]) if parts is None else parts
            parts[at - begin : stop - begin] = part  # at once, as its buffer may be drawn in again
            at = stop
        assert parts is not None
        return parts.transpose(0, 1)

    def _next_block(self) -> None:  # (positions, B, V)
        if self.on_cpu:
            if self.current is not None:
                self.current.leave()
            self.current = self._begun() if self.next is None else self.next
            self.block = self.current.receive()
            self.next = None
        else:
            rows = [gumbel((self.positions, self.shape[2]), generator) for generator in self.generators]
            self.block = torch.stack(rows, 1).to(self.device)
        self.drawn += self.positions
        if self.on_cpu and self.drawn < self.ahead:
            self.next = self._begun()

    def _begun(self) -> Buffer:
        """A buffer in which a block is being drawn, but not the one in use if another block may follow it."""
        if len(self.buffers) < (2 if self.ahead > self.positions else 1):
            self.buffers.insert(0, make_buffer(self.shape, self.device))
        else:
            self.buffers.insert(0, self.buffers.pop())
        self.buffers[0].begin(self.generators)
        return self.buffers[0]


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel variates, float32, on the generator's device (which may have no float64)."""
    device = generator.device
    uniform = torch.rand(shape, generator=generator, device=device, dtype=finest(device))
    return uniform.log_().neg_().float().log_().neg_()
