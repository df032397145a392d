"""Maps of several sizes, coarse to fine: how a map is made smaller and larger (VAR, Tian et al. 2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import quote

Scales = tuple[tuple[int, int], ...]
"""(height, width) of each scale; the last is the whole map's."""


def scales_problem(scales: Scales, shape: tuple[int, ...] | None = None) -> str | None:
    """What is wrong with `scales`, for a grid of this shape if there is one; or None."""
    if any(len(pair) != 2 or any(type(side) is not int or side < 1 for side in pair) for pair in scales):
        return f"expected pairs of positive whole sizes (got {quote(scales)})"
    if shape is not None and shape != (sum(areas(scales)),):
        return f"{', '.join(map(by, scales))} are {sum(areas(scales))} tokens on one axis (got a grid of {list(shape)})"
    steps = zip(scales, scales[1:], strict=False)
    if any(before[axis] > after[axis] for before, after in steps for axis in (0, 1)):
        return f"must not become smaller ({', '.join(map(by, scales))})"
    return None


def by(sides: tuple[int, ...]) -> str:
    """A size as people write it: 7x7."""
    return f"{sides[0]}x{sides[1]}"


def areas(scales: Scales) -> list[int]:
    """The number of positions of each scale."""
    return [height * width for height, width in scales]


class Resize(nn.Module):
    """Maps of the last of `scales` to those of another one by means over areas, and back by bicubic interpolation.

    Both are fixed matrices, one for each axis.
    """

    def __init__(self, scales: Scales) -> None:
        super().__init__()
        self.scales = scales
        for k, sides in enumerate(scales[:-1]):
            for axis, (small, large) in enumerate(zip(sides, scales[-1], strict=True)):
                self.register_buffer(f"down{k}_{axis}", shrinking(small, large), persistent=False)
                self.register_buffer(f"up{k}_{axis}", growing(small, large), persistent=False)

    def down(self, x: Tensor, k: int) -> Tensor:
        """`(B, D, H, W)` as a map of scale `k`, `(B, D, h, w)`."""
        return self._resized("down", x, k)

    def up(self, x: Tensor, k: int) -> Tensor:
        """A map of scale `k`, `(B, D, h, w)`, as `(B, D, H, W)`."""
        return self._resized("up", x, k)

    def _resized(self, way: str, x: Tensor, k: int) -> Tensor:
        if self.scales[k] == self.scales[-1]:
            return x
        rows, columns = (self.get_buffer(f"{way}{k}_{axis}").to(x.dtype) for axis in (0, 1))
        return rows @ x @ columns.t()

    def split(self, tokens: Tensor) -> Iterator[Tensor]:
        """`(B, L, ...)`, scale after scale, as a map `(B, h, w, ...)` of each scale."""
        for part, sides in zip(tokens.split(areas(self.scales), 1), self.scales, strict=True):
            yield part.unflatten(1, sides)


def shrinking(small: int, large: int) -> Tensor:
    """`(small, large)`: each output is the mean of the inputs that it covers."""
    return F.adaptive_avg_pool1d(torch.eye(large, dtype=torch.float64, device="cpu"), small).t().float().contiguous()


def growing(small: int, large: int) -> Tensor:
    """`(large, small)`: bicubic interpolation."""
    one = torch.eye(small, dtype=torch.float64, device="cpu")[None, None]
    return F.interpolate(one, size=(large, small), mode="bicubic")[0, 0].float()
