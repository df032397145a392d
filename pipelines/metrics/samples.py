"""Samples that are judged: each is drawn and kept, in bytes, by one of the processes, as 50,000 may be gigabytes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..images import to_float, to_uint8
from ..processes.group import ALONE, ProcessGroup
from .quality import AT_A_TIME

DRAWN = 64  # at a time


class Samples:
    """`count` samples in parts of `AT_A_TIME`, named by their first; `draw(start, end)` makes some, `(n, C, H, W)` in
    [-1, 1], and does not depend on which are made together. seconds: how long it took."""

    def __init__(self, draw: Callable[[int, int], Tensor], count: int, group: ProcessGroup = ALONE) -> None:
        from tqdm import tqdm

        self.count, self.group = count, group
        self.parts = range(0, count, AT_A_TIME)
        self._kept: dict[int, Tensor] = {}
        mine = {part: min(part + AT_A_TIME, count) for part in group.mine(self.parts)}
        total = sum(end - part for part, end in mine.items())
        with tqdm(
            total=total, desc="sampling", unit="image", leave=False, disable=None if group.is_main else True
        ) as bar:

            def drawn(start: int, end: int) -> Tensor:
                made = to_uint8(draw(start, end)).cpu()  # when `draw` returns, a GPU has still to compute it
                bar.update(end - start)
                return made

            def work() -> float:
                began = time.monotonic()
                for part, end in mine.items():
                    cuts = range(part, end, DRAWN)
                    self._kept[part] = torch.cat([drawn(start, min(start + DRAWN, end)) for start in cuts])
                return time.monotonic() - began

            self.seconds = max(group.gather(work))

    def images(self, part: int) -> Tensor:
        """The images of a part that this process has drawn, in [-1, 1]."""
        return to_float(self._kept[part])

    def rows(self, act: Callable[[Tensor], Tensor], count: int) -> Tensor:
        """What `act` makes of the first `count` images, `(count, d)`."""
        parts = [part for part in self.parts if part < count]
        return torch.cat(self.group.map(lambda part: act(self.images(part)[: count - part]), parts))

    def some(self, chosen: list[int]) -> Tensor:
        """The images at these places, on every process."""
        owners = {k: self._kept.get(k - k % AT_A_TIME) for k in chosen}
        mine = {k: kept[k % AT_A_TIME].clone() for k, kept in owners.items() if kept is not None}
        every = {k: image for found in self.group.gather(lambda: mine) for k, image in found.items()}
        return to_float(torch.stack([every[k] for k in chosen]))
