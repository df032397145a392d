"""Samples to evaluate, made and stored as 8-bit images by the processes of a group: 50,000 may take gigabytes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tokenizer.spec import to_float, to_uint8

from ..processes.group import ALONE, ProcessGroup
from .quality import AT_A_TIME

SAMPLED_AT_A_TIME = 64


class EvaluatedSamples:
    """`count` samples in parts of `AT_A_TIME`; a part is identified by the number of its first sample.

    draw: `draw(start, end)` returns these samples, `(n, C, H, W)` in [-1, 1], and must not depend on how they are
    batched. seconds: how long sampling took.
    """

    def __init__(self, draw: Callable[[int, int], Tensor], count: int, group: ProcessGroup = ALONE) -> None:
        from tqdm import tqdm

        self.count, self.group = count, group
        self.parts = range(0, count, AT_A_TIME)
        self._mine: dict[int, Tensor] = {}

        def work() -> float:
            began = time.monotonic()
            hidden = None if group.is_main else True
            for part in tqdm(group.mine(self.parts), desc="sampling", leave=False, disable=hidden):
                end = min(part + AT_A_TIME, count)
                cuts = [(start, min(start + SAMPLED_AT_A_TIME, end)) for start in range(part, end, SAMPLED_AT_A_TIME)]
                # `draw` may return before a GPU has finished; .cpu() waits for it.
                self._mine[part] = torch.cat([to_uint8(draw(*cut)).cpu() for cut in cuts])
            return time.monotonic() - began

        self.seconds = max(group.gather(work))

    def images(self, part: int) -> Tensor:
        """Return the images, in [-1, 1], of a part that this process has made."""
        return to_float(self._mine[part])

    def rows(self, act: Callable[[Tensor], Tensor], count: int) -> Tensor:
        """Apply `act` to the first `count` images; return `(count, d)`."""
        parts = [part for part in self.parts if part < count]
        return torch.cat(self.group.map(lambda part: act(self.images(part)[: count - part]), parts))

    def select(self, chosen: list[int]) -> Tensor:
        """Return the samples with these numbers, on every process."""
        mine = [k for k in chosen if k - k % AT_A_TIME in self._mine]
        here = {k: self._mine[k - k % AT_A_TIME][k % AT_A_TIME].clone() for k in mine}
        every = {k: image for found in self.group.gather(lambda: here) for k, image in found.items()}
        return to_float(torch.stack([every[k] for k in chosen]))
