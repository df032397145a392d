"""Multi-scale maps, coarse to fine, and their resizing (VAR, Tian et al. 2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import quote

Scales = tuple[tuple[int, int], ...]
"""(height, width) of each scale; the last is the full size."""


def scales_problem(scales: Scales, shape: tuple[int, ...] | None = None) -> str | None:
    """Return the problem with `scales` in one line, or None. shape: the grid's, if known."""
    if any(len(pair) != 2 or any(type(side) is not int or side < 1 for side in pair) for pair in scales):
        return f"expected pairs of positive whole sizes (got {quote(scales)})"
    if shape is not None and shape != (sum(areas(scales)),):
        return f"{', '.join(map(by, scales))} are {sum(areas(scales))} tokens on one axis (got a grid of {list(shape)})"
    steps = zip(scales, scales[1:], strict=False)
    if any(before[axis] > after[axis] for before, after in steps for axis in (0, 1)):
        return f"must not shrink from one scale to the next (got {', '.join(map(by, scales))})"
    return None


def by(sides: tuple[int, ...]) -> str:
    return f"{sides[0]}x{sides[1]}"


def areas(scales: Scales) -> list[int]:
    return [height * width for height, width in scales]


class Resize(nn.Module):
    """Downsamples maps from the last of `scales` by area averaging, and upsamples to it by bicubic interpolation.

    Both multiply by one fixed matrix per axis.
    """

    def __init__(self, scales: Scales) -> None:
        super().__init__()
        self.scales = scales
        for k, sides in enumerate(scales[:-1]):
            for axis, (small, large) in enumerate(zip(sides, scales[-1], strict=True)):
                self.register_buffer(f"down{k}_{axis}", area_matrix(small, large), persistent=False)
                self.register_buffer(f"up{k}_{axis}", bicubic_matrix(small, large), persistent=False)

    def down(self, x: Tensor, k: int) -> Tensor:
        """Downsample `(B, D, H, W)` to scale `k`, `(B, D, h, w)`."""
        return self._resize("down", x, k)

    def up(self, x: Tensor, k: int) -> Tensor:
        """Upsample a map of scale `k`, `(B, D, h, w)`, to `(B, D, H, W)`."""
        return self._resize("up", x, k)

    def _resize(self, direction: str, x: Tensor, k: int) -> Tensor:
        if self.scales[k] == self.scales[-1]:
            return x
        rows, columns = (self.get_buffer(f"{direction}{k}_{axis}").to(x.dtype) for axis in (0, 1))
        return rows @ x @ columns.t()

    def split(self, tokens: Tensor) -> Iterator[Tensor]:
        """Split `(B, L, ...)` into one map `(B, h, w, ...)` per scale."""
        for part, sides in zip(tokens.split(areas(self.scales), 1), self.scales, strict=True):
            yield part.unflatten(1, sides)


def area_matrix(small: int, large: int) -> Tensor:
    """Return the matrix `(small, large)` that averages the inputs covered by each output."""
    return F.adaptive_avg_pool1d(torch.eye(large, dtype=torch.float64, device="cpu"), small).t().float().contiguous()


def bicubic_matrix(small: int, large: int) -> Tensor:
    """Return the matrix `(large, small)` of bicubic interpolation."""
    one = torch.eye(small, dtype=torch.float64, device="cpu")[None, None]
    return F.interpolate(one, size=(large, small), mode="bicubic")[0, 0].float()
