"""The texture that a decoder weaves into areas that are flat in the original, which PSNR hardly sees and an eye does.

An even area of a drawing comes back with a pattern: of the decoder's up-sampling, with periods of 4 and 2 pixels, or of
neighbouring tokens that do not agree. Windows of 8 x 8 pixels in which no channel of the original varies by more than
4 of 255 levels are *flat*. What is measured there is the reconstruction minus the original, in levels, less its mean
and slope: a wrong colour or a shading is an error that PSNR knows, but no texture.

- `texture_flat`: the root mean square of that in the flat windows that are not background.
- `texture_grid`: of its part that repeats every 4 pixels in both directions: periods 4 and 2.
- `texture_white`: as `texture_flat`, in windows of background: all values from 253 on, or, where more windows of the
  data are black (all values up to 2), black ones. `texture_background` says which.

Windows begin at the top left corner, at every 8th row and column, which is where tokens of 8, 4 and 2 pixels begin.
Images with a side below 64 pixels have few of them: there at every 4th. Values are taken before they are rounded to 8
bits, which would add 0.3 levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WINDOW, PERIOD = 8, 4  # pixels
SMALL_SIDE = 64  # of an image whose windows overlap
FLAT_RANGE, WHITE_LEAST, BLACK_MOST = 4.0, 253.0, 2.0  # 8-bit levels
LEVELS = 127.5  # 8-bit levels of one unit of images in [-1, 1]
SLACK = 1e-2  # levels that a float may be off
SHOWN_AS_NONE = "-"


def texture_sums(decoded: Tensor, images: Tensor) -> Tensor:
    """What figures are made of, for batches `(B, C, H, W)` in [-1, 1]: float64 `(3, 3)` on the CPU. For white, black
    and other flat windows it has their number, and the sums over them of the mean squares, in levels, of the texture
    and of its periodic part. Sums of several batches add up."""
    before, after = (windows_of(LEVELS * (part.float() + 1)) for part in (images, decoded))
    lowest, highest = before.amin((2, 3)), before.amax((2, 3))
    flat = (highest - lowest <= FLAT_RANGE + SLACK).all(1)
    white = flat & (lowest >= WHITE_LEAST - SLACK).all(1)
    black = flat & (highest <= BLACK_MOST + SLACK).all(1)
    sums = []
    for chosen in (white, black, flat & ~white & ~black):
        texture = without_plane((after[chosen] - before[chosen]).double())
        squares = [part.square().mean((1, 2, 3)).sum().cpu() for part in (texture, periodic(texture))]
        sums.append(torch.stack([chosen.sum().double().cpu(), *squares]))
    return torch.stack(sums)


def texture_figures(sums: Tensor) -> dict[str, Any]:
    """The figures of `texture_sums`, None where there is no such window; and of how many windows they are."""
    white, black, other = sums.unbind()
    backgrounds = {"white": white, "black": black}
    background = "black" if black[0] > white[0] else "white"
    behind = backgrounds.pop(background)
    flat = other + sum(backgrounds.values())
    return {
        "texture_flat": root_mean(flat[1], flat[0]),
        "texture_grid": root_mean(flat[2], flat[0]),
        "texture_white": root_mean(behind[1], behind[0]),
        "texture_background": background,
        "texture_flat_windows": int(flat[0]),
        "texture_white_windows": int(behind[0]),
    }


def root_mean(total: Tensor, count: Tensor) -> float | None:
    """The root of a mean, None of nothing."""
    return float((total / count).sqrt()) if count else None


def windows_of(images: Tensor) -> Tensor:
    """`(n, C, 8, 8)` of images `(B, C, H, W)`; none of images that are smaller."""
    channels, height, width = images.shape[1:]
    if min(height, width) < WINDOW:
        return images.new_zeros(0, channels, WINDOW, WINDOW)
    stride = WINDOW if min(height, width) >= SMALL_SIDE else WINDOW // 2
    cut = images.unfold(2, WINDOW, stride).unfold(3, WINDOW, stride)
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, WINDOW, WINDOW)


def without_plane(windows: Tensor) -> Tensor:
    """`(n, C, 8, 8)` less the plane, mean and slope, that is nearest to each."""
    ramp = torch.arange(WINDOW, dtype=windows.dtype, device=windows.device) - (WINDOW - 1) / 2
    down, across = ramp[:, None].expand(WINDOW, WINDOW), ramp.expand(WINDOW, WINDOW)
    planes = torch.stack([plane / plane.norm() for plane in (torch.ones_like(down), down, across)])
    shares = torch.einsum("ncij,pij->ncp", windows, planes)
    return windows - torch.einsum("ncp,pij->ncij", shares, planes)


def periodic(windows: Tensor) -> Tensor:
    """The part of `(n, C, 8, 8)` that repeats every 4 pixels in both directions, `(n, C, 4, 4)`."""
    times = WINDOW // PERIOD
    return windows.unflatten(3, (times, PERIOD)).unflatten(2, (times, PERIOD)).mean((2, 4))


def in_levels(value: float | None) -> str:
    """A figure as people read it."""
    return SHOWN_AS_NONE if value is None else f"{value:.2f}"


def texture_line(figures: dict[str, Any]) -> str:
    """The figures in a line."""
    flat, grid, white = (in_levels(figures[f"texture_{name}"]) for name in ("flat", "grid", "white"))
    return (
        f"texture in flat areas {flat} levels, at periods 4 and 2 {grid}, "
        f"in {figures['texture_background']} areas {white}"
    )
