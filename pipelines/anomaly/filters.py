"""A map without a model: how far the filter responses of each cell of pixels are from those of normal images."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 8
"""Side of a cell in pixels."""
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Standard deviations of the Gaussians, in pixels."""
DARKEST = 0.05
"""Added to intensities from 0 to 1 before the logarithm."""
NEAREST = 3
WINDOW = 8
"""Cells before and after a border that are compared, at most half of the image."""


def smooth(values: Tensor, sigma: float) -> Tensor:
    """Blur a map `(H, W)` by a Gaussian of `sigma` pixels; beyond the border, the outermost values continue."""
    reach = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=values.device) / sigma) ** 2).to(values)
    kernel, found = kernel / kernel.sum(), values[None, None]
    for shape, padding in (((1, -1), (reach, reach, 0, 0)), ((-1, 1), (0, 0, reach, reach))):
        found = F.conv2d(F.pad(found, padding, mode="replicate"), kernel.reshape(1, 1, *shape))
    return found[0, 0]


def filter_responses(image: Tensor) -> Tensor:
    """Return the responses `(rows, columns, d)` of the cells of an image `(C, H, W)` in [-1, 1]: the highest and the
    lowest difference of Gaussians at each scale, the mean of its size and of its slopes, and the brightness. Brightness
    is a logarithm, less that of the whole image, so that exposure does not matter."""
    levels = torch.log((image.float().mean(0) + 1).clamp(min=0) / 2 + DARKEST)
    blurred = [smooth(levels, scale) for scale in SCALES]

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values[None], CELL, ceil_mode=True)

    found = [mean(blurred[-1] - levels.median())]
    for fine, coarse in itertools.pairwise(blurred):
        band = fine - coarse
        found += [F.max_pool2d(sign * band[None], CELL, ceil_mode=True) for sign in (1, -1)]
        found += [mean(band.abs()), mean(band.diff(dim=0).abs()), mean(band.diff(dim=1).abs())]
    size = min(each.shape[1] for each in found), min(each.shape[2] for each in found)
    return torch.cat([each[:, : size[0], : size[1]] for each in found]).movedim(0, -1)


def nearest_distances(rows: Tensor, points: Tensor) -> Tensor:
    """Return the mean distance of rows `(n, d)` from the nearest `points` (m, d), `(n,)`."""
    count = min(NEAREST, len(points))
    parts = [torch.cdist(part, points).topk(count, largest=False).values.mean(1) for part in rows.split(2048)]
    return torch.cat(parts)


def largest_changes(cells: Tensor) -> Tensor:
    """Return the largest changes of standardized cells `(rows, columns, d)` at borders down and across, `(2,)`: the
    root mean square, along a border, of the difference between the means of the `WINDOW` cells before and after it.
    Cells are cut off at one deviation, so that many small differences count more than a few large ones."""
    found = []
    for turned in (cells, cells.transpose(0, 1)):
        reach = min(WINDOW, len(turned) // 2)
        if reach:
            sums = F.pad(turned.double().clamp(-1, 1).cumsum(0), (0, 0, 0, 0, 1, 0))
            means = (sums[reach:] - sums[:-reach]) / reach
            found.append((means[reach:] - means[:-reach]).square().mean((1, 2)).sqrt().max())
        else:
            found.append(cells.new_zeros((), dtype=torch.float64))
    return torch.stack(found)


def spread_cells(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Spread a value of each cell, `(rows, columns)`, over its pixels: `(H, W)`."""
    rows, columns = (torch.arange(side, device=values.device) // CELL for side in size)
    return values[rows.clamp(max=len(values) - 1)][:, columns.clamp(max=values.shape[1] - 1)]
