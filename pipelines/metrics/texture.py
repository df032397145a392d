"""The texture that a decoder weaves into areas that are flat in the original, which PSNR hardly sees and an eye does.

An even area of a drawing comes back with a pattern: of the decoder's up-sampling, with periods of 4 and 2 pixels, or of
neighbouring tokens that do not agree. Windows of 8 x 8 pixels in which the brightness (BT.601) of the original varies
by no more than 8 of 255 levels are *flat*. What is measured there is the brightness of the reconstruction minus that of
the original, in levels, less its mean and slope: a wrong colour or a shading is an error that PSNR knows, but no
texture. A window's texture is its root mean square; figures are medians over windows, as a few that lie beside an edge
would decide a mean.

- `texture_flat`: of the flat windows that are not background.
- `texture_grid`: likewise, of its part that repeats every 4 pixels in both directions: periods 4 and 2.
- `texture_white`: as `texture_flat`, in windows of background: brightness from 250 on, or, where more windows of the
  data are black (brightness up to 5), black ones. `texture_background` says which.

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
FLAT_RANGE, WHITE_LEAST, BLACK_MOST = 8.0, 250.0, 5.0  # 8-bit levels
BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue
LEVELS = 127.5  # 8-bit levels of one unit of images in [-1, 1]
SLACK = 1e-2  # levels that a float may be off
SHOWN_AS_NONE = "-"


def flat_windows(decoded: Tensor, images: Tensor) -> Tensor:
    """What figures are made of, for batches `(B, C, H, W)` in [-1, 1]: float64 `(n, 3)` on the CPU, a row for each flat
    window: 0 where it is white, 1 black, 2 neither; its texture in levels; and that of the periodic part."""
    before, after = (windows_of(brightness(part)) for part in (images, decoded))
    lowest, highest = before.amin((1, 2)), before.amax((1, 2))
    flat = highest - lowest <= FLAT_RANGE + SLACK
    white, black = lowest >= WHITE_LEAST - SLACK, highest <= BLACK_MOST + SLACK
    kind = torch.where(white, 0, torch.where(black, 1, 2))[flat]
    texture = without_plane((after[flat] - before[flat]).double())
    levels = [part.square().mean((1, 2)).sqrt() for part in (texture, periodic(texture))]
    return torch.stack([kind.double(), *levels], 1).cpu()


def texture_figures(windows: Tensor) -> dict[str, Any]:
    """The figures of `flat_windows`, of one batch or of several below each other, None where there is no such window;
    and of how many windows they are."""
    kind = windows[:, 0]
    background = "black" if (kind == 1).sum() > (kind == 0).sum() else "white"
    behind = kind == (1 if background == "black" else 0)
    return {
        "texture_flat": middle(windows[~behind, 1]),
        "texture_grid": middle(windows[~behind, 2]),
        "texture_white": middle(windows[behind, 1]),
        "texture_background": background,
        "texture_flat_windows": int((~behind).sum()),
        "texture_white_windows": int(behind.sum()),
    }


def middle(values: Tensor) -> float | None:
    """The median (of an even number of values the lower of the two in the middle), None of nothing."""
    return float(values.median()) if len(values) else None


def brightness(images: Tensor) -> Tensor:
    """In levels, `(B, H, W)`, of images `(B, C, H, W)`; of other than three channels their mean."""
    levels = LEVELS * (images.float() + 1)
    weights = BRIGHTNESS if images.shape[1] == 3 else [1 / images.shape[1]] * images.shape[1]
    return torch.einsum("bchw,c->bhw", levels, levels.new_tensor(weights))


def windows_of(maps: Tensor) -> Tensor:
    """`(n, 8, 8)` of maps `(B, H, W)`; none of maps that are smaller."""
    height, width = maps.shape[1:]
    if min(height, width) < WINDOW:
        return maps.new_zeros(0, WINDOW, WINDOW)
    stride = WINDOW if min(height, width) >= SMALL_SIDE else WINDOW // 2
    return maps.unfold(1, WINDOW, stride).unfold(2, WINDOW, stride).reshape(-1, WINDOW, WINDOW)


def without_plane(windows: Tensor) -> Tensor:
    """`(n, 8, 8)` less the plane, mean and slope, that is nearest to each."""
    ramp = torch.arange(WINDOW, dtype=windows.dtype, device=windows.device) - (WINDOW - 1) / 2
    down, across = ramp[:, None].expand(WINDOW, WINDOW), ramp.expand(WINDOW, WINDOW)
    planes = torch.stack([plane / plane.norm() for plane in (torch.ones_like(down), down, across)])
    shares = torch.einsum("nij,pij->np", windows, planes)
    return windows - torch.einsum("np,pij->nij", shares, planes)


def periodic(windows: Tensor) -> Tensor:
    """The part of `(n, 8, 8)` that repeats every 4 pixels in both directions, `(n, 4, 4)`."""
    times = WINDOW // PERIOD
    return windows.unflatten(2, (times, PERIOD)).unflatten(1, (times, PERIOD)).mean((1, 3))


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
