"""Pictures of anomalous images: the image, its map, what was healed, and the mask of its defect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.spec import select_shown, to_float, to_uint8

from ..images.grids import class_grid
from ..images.tiles import LazyImages
from .ground_truth import rank_maps
from .healing import anomaly_map, heal_images, map_bits
from .maps import TITLES

if TYPE_CHECKING:
    from prior.given import Given

    from ..image_pipeline import ImagePipeline

MOST = 512
"""Pixels per side of a large image, beyond which it is reduced."""


def draw_sheet(
    pipeline: ImagePipeline,
    pixels: Tensor,
    given: Given,
    scores: Tensor,
    count: int,
    seed: int,
    kind: str = "bits",
) -> np.ndarray:
    """Draw a row for each of the `count` most and, below, least anomalous images: the image, its map (if tokens have
    positions), the healed image, and the difference, each below its score or name. kind: one of `MAPS`."""
    chosen = rank_scores(scores, count)
    images = to_float(pixels[chosen])
    own, batch = given[chosen], pipeline.to_images(images)
    healed = heal_images(pipeline, batch, own, seed=seed)
    panels = {"healed": healed.images.cpu(), "difference": apply_colormap(healed.difference.cpu())}
    if pipeline.tokenizer.placed:
        if kind == "bits":
            heat = map_bits(pipeline, batch, own)
        else:
            heat = anomaly_map(pipeline, images, method=kind, condition=own)
        panels = {TITLES[kind]: apply_colormap(heat.cpu() / heat.amax().cpu().clamp(min=1e-6)), **panels}
    panels["healed"] = select_shown(panels["healed"], pipeline.spec.show)
    columns = [
        panel.expand(*panel.shape[:-3], 3, -1, -1)
        for panel in (select_shown(images, pipeline.spec.show), *panels.values())
    ]
    names = [name for score in scores[chosen].tolist() for name in (f"score {score:.3g}", *panels)]
    panel_pixels = to_uint8(torch.stack(columns, 1).flatten(0, 1))
    return class_grid(panel_pixels.movedim(-3, -1).numpy(), names, len(columns))


def draw_whole(
    pipeline: ImagePipeline,
    images: LazyImages,
    given: Given,
    scores: Tensor,
    count: int,
    stride: int,
    kind: str = "bits",
) -> np.ndarray:
    """Draw a row for each of the `count` most and, below, least anomalous images of any size, reduced to at most 512
    pixels a side: the image, its map (if tokens have positions) and, with a calibrated map, its flagged regions in
    red. kind: one of `MAPS`."""
    chosen, calibration = rank_scores(scores, count), pipeline.calibration
    panels, heats, regions = list[Tensor](), list[Tensor](), list[Tensor]()
    for number in chosen.tolist():
        image, own = images.select([number]), given[[number]]
        panels.append(reduce_image(to_float(image.load(0)), pipeline))
        if pipeline.tokenizer.placed:
            (heat,) = anomaly_map(pipeline, image, condition=own, stride=stride, method=kind)
            heats.append(reduce_map(heat.cpu()))
        if calibration is not None and calibration.maps is not None:
            if kind != "combined":
                (heat,) = anomaly_map(pipeline, image, condition=own, stride=stride, method="combined")
            above = (heat > calibration.scores["map"].threshold).cpu()
            regions.append(paint(panels[-1], reduce_map(above) > 0))
    highest = max([1e-6, *(float(heat.max()) for heat in heats)])
    rows = [[panel] for panel in panels]
    for row, heat in zip(rows, heats, strict=False):
        row += list(apply_colormap(heat[None] / highest))
    for row, region in zip(rows, regions, strict=False):
        row.append(region)
    names = [[f"score {score:.3g}", TITLES[kind], "flagged"][: len(rows[0])] for score in scores[chosen].tolist()]
    return draw_rows(rows, names)


def draw_truth(
    pipeline: ImagePipeline,
    pixels: Tensor | LazyImages,
    maps: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_]],
    names: list[str],
    count: int,
    kind: str = "bits",
) -> np.ndarray:
    """Draw the image, its map and its mask for the `count` defective images whose maps fit worst and, below, best.
    kind: of the maps, one of `MAPS`."""
    ranked = rank_maps(maps, masks) or list(range(len(maps)))
    chosen = ranked if len(ranked) <= 2 * count else ranked[:count] + ranked[-count:]
    rows = []
    for number in chosen:
        image = to_float(pixels.load(number) if isinstance(pixels, LazyImages) else pixels[number])
        heat = torch.from_numpy(maps[number])[None]
        low, high = heat.min(), heat.max()
        marked = torch.from_numpy(masks[number]).float()[None] * 2 - 1
        rows.append(
            [reduce_image(image, pipeline), apply_colormap((heat - low) / (high - low).clamp(min=1e-6))[0], marked]
        )
    return draw_rows(rows, [[Path(names[number]).name, TITLES[kind], "mask"] for number in chosen])


def paint(image: Tensor, region: Tensor) -> Tensor:
    """Return an image `(C, H, W)` in [-1, 1] as colours, with the pixels of `region` (H, W) in red."""
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    return torch.where(region, 0.5 * image + 0.5 * red, image.expand(3, -1, -1))


def rank_scores(scores: Tensor, count: int) -> Tensor:
    """Return the numbers of the `count` highest and the `count` lowest scores, from the highest."""
    ranked = torch.argsort(scores, descending=True)
    return ranked if len(ranked) <= 2 * count else torch.cat([ranked[:count], ranked[-count:]])


def draw_rows(rows: list[list[Tensor]], names: list[list[str]]) -> np.ndarray:
    """Draw rows of images `(C, H, W)` in [-1, 1] of different sizes, each on white below its name."""
    height, width = (max(panel.shape[axis] for row in rows for panel in row) for axis in (1, 2))
    panels = [
        F.pad(panel.expand(3, -1, -1), (0, width - panel.shape[2], 0, height - panel.shape[1]), value=1.0)
        for row in rows
        for panel in row
    ]
    shown = to_uint8(torch.stack(panels)).movedim(1, -1).numpy()
    return class_grid(shown, [name for row in names for name in row], len(rows[0]))


def apply_colormap(values: Tensor) -> Tensor:
    """Map `(..., H, W)` in [0, 1] to colour images `(..., 3, H, W)`: black, red, yellow, white."""
    return torch.stack([(3 * values - channel).clamp(0, 1) for channel in range(3)], -3) * 2 - 1


def reduce_image(image: Tensor, pipeline: ImagePipeline) -> Tensor:
    """Return the shown channels of an image `(C, H, W)`, reduced by the factor of its map."""
    shown = select_shown(image[None], pipeline.spec.show)
    return F.avg_pool2d(shown, factor_of(image.shape[1:]), ceil_mode=True)[0]


def reduce_map(heat: Tensor) -> Tensor:
    """Average a map `(H, W)` over squares of pixels, so that it has at most 512 a side."""
    return F.avg_pool2d(heat.float()[None], factor_of(heat.shape), ceil_mode=True)[0]


def reduce_mask(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Reduce a mask `(H, W)` as `reduce_map` does; a square is marked if one of its pixels is."""
    marked = F.max_pool2d(torch.from_numpy(mask).float()[None], factor_of(mask.shape), ceil_mode=True)
    found: NDArray[np.bool_] = marked[0].numpy() > 0
    return found


def factor_of(size: Sequence[int]) -> int:
    """Return the side of the squares of pixels that are averaged in an image of this size (H, W)."""
    return -(-max(size) // MOST)
