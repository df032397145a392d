"""Which training step it is, and whether it was taken, without waiting for a GPU, which alone knows both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Taken = bool | Tensor
"""Whether a step was taken: a bool, or one `()` on the device."""


def moved_if(taken: Taken, moved: Tensor, before: Tensor) -> Tensor:
    """`moved` where the step was taken, else `before`."""
    if isinstance(taken, Tensor):
        return torch.where(taken, moved, before)
    return moved if taken else before


class Stepped(nn.Module):
    """Counts steps twice: in a buffer `started` those that were taken, and on the host, in `step`, all of them.

    So `step` is too large by those that were skipped, until `find_step` reads the buffer. It does so in a step that
    `matters`, to which `step`, never too small, comes first; and whether that one is taken is found out as well, so
    that none is passed by.
    """

    started: Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("started", torch.zeros((), dtype=torch.long))
        self.step = 0

    def matters(self, step: int) -> bool:
        """Whether something depends on it being this step: a codebook starts at step 0."""
        return step == 0

    def find_step(self) -> None:
        """To be called at the beginning of a step: then `step` is the one, if it matters. A GPU is waited for there."""
        if self.matters(self.step):
            self.step = int(self.started)

    def find_taken(self, taken: Taken) -> Taken:
        """A bool, if this step matters, for which a GPU is waited for; else as it is."""
        return bool(taken) if self.matters(self.step) else taken

    def count_step(self, taken: Taken) -> None:
        """To be called at the end of a step, with what `find_taken` returns."""
        self.started += taken
        self.step += taken if isinstance(taken, bool) else 1

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.step = 0
