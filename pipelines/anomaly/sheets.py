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

from tokenizer.spec import to_float, to_uint8

from ..images.grids import class_grid
from .examine import Examination
from .ground_truth import rank_maps
from .healing import heal_images
from .maps import TITLES, map_images

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

MOST = 512  # pixels per side, beyond which an image is reduced


def draw_sheet(examination: Examination, scores: Tensor, count: int, seed: int, kind: str = "bits") -> np.ndarray:
    """Draw a row for each of the `count` most and, below, least anomalous images, each reduced to at most 512 pixels a
    side: the image, its map (if tokens have positions) and, of whole images, the healed image and the difference; of
    tiled ones, the regions above the threshold of the map in red, if there is one. kind: one of `MAPS`."""
    pipeline, chosen = examination.pipeline, take_ends(scores.argsort(descending=True).tolist(), count)
    some, titles = examination.select(chosen), list[str]()
    rows = [[reduce_image(to_float(some.read(number)), pipeline)] for number in range(len(chosen))]
    regions = None if pipeline.calibration is None else pipeline.calibration.scores.get("map")
    regions = regions if examination.view.is_tiled else None
    if pipeline.tokenizer.placed:
        titles += [TITLES[kind], *(["flagged"] if regions else [])]
        heats = list[Tensor]()
        for row, (_, maps) in zip(rows, map_images(some, {kind, "combined"} if regions else {kind}), strict=True):
            heats.append(reduce_map(maps[kind].cpu()))
            if regions and regions.threshold is not None:
                row.append(paint(row[0], reduce_map((maps["combined"] > regions.threshold).cpu()) > 0))
        highest = max(1e-6, *(float(heat.max()) for heat in heats))
        for row, heat in zip(rows, heats, strict=True):
            row.insert(1, apply_colormap(heat[None] / highest)[0])
    if not examination.view.is_tiled:
        titles += ["healed", "difference"]
        healed = heal_images(some, seed=seed)
        for row, image, difference in zip(rows, healed.images.cpu(), healed.difference.cpu(), strict=True):
            row += [reduce_image(image, pipeline), apply_colormap(reduce_map(difference)[None])[0]]
    return draw_rows(rows, [[f"score {score:.3g}", *titles] for score in scores[chosen].tolist()])


def draw_truth(
    examination: Examination,
    maps: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_]],
    names: Sequence[str],
    count: int,
    kind: str = "bits",
) -> np.ndarray:
    """Draw the image, its map and its mask for the `count` defective images whose maps fit worst and, below, best.
    kind: of the maps, one of `MAPS`."""
    chosen, rows = take_ends(rank_maps(maps, masks) or [*range(len(maps))], count), []
    for number in chosen:
        heat = torch.from_numpy(maps[number])[None]
        low, high = heat.min(), heat.max()
        marked = torch.from_numpy(masks[number]).float()[None] * 2 - 1
        image = reduce_image(to_float(examination.read(number)), examination.pipeline)
        rows.append([image, apply_colormap((heat - low) / (high - low).clamp(min=1e-6))[0], marked])
    return draw_rows(rows, [[Path(names[number]).name, TITLES[kind], "mask"] for number in chosen])


def paint(image: Tensor, region: Tensor) -> Tensor:
    """Return an image `(C, H, W)` in [-1, 1] as colours, with the pixels of `region` (H, W) in red."""
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    return torch.where(region, 0.5 * image + 0.5 * red, image.expand(3, -1, -1))


def take_ends(ranked: list[int], count: int) -> list[int]:
    """Return the first and the last `count` numbers, or all if there are fewer."""
    return ranked if len(ranked) <= 2 * count else ranked[:count] + ranked[-count:]


def draw_rows(rows: list[list[Tensor]], names: list[list[str]]) -> np.ndarray:
    """Draw rows of images `(C, H, W)` in [-1, 1] of different sizes, each on white below its name."""
    height, width = (max(panel.shape[axis] for row in rows for panel in row) for axis in (1, 2))
    panels = [
        F.pad(panel.expand(3, -1, -1), (0, width - panel.shape[2], 0, height - panel.shape[1]), value=1.0)
        for row in rows
        for panel in row
    ]
    pixels = to_uint8(torch.stack(panels)).movedim(1, -1).numpy()
    return class_grid(pixels, [name for row in names for name in row], len(rows[0]))


def apply_colormap(values: Tensor) -> Tensor:
    """Map `(..., H, W)` in [0, 1] to colour images `(..., 3, H, W)`: black, red, yellow, white."""
    return torch.stack([(3 * values - channel).clamp(0, 1) for channel in range(3)], -3) * 2 - 1


def reduce_image(image: Tensor, pipeline: ImagePipeline) -> Tensor:
    """Return the shown channels of an image `(C, H, W)`, or of a clip with its frames below one another, reduced by the
    factor of its map."""
    colours = pipeline.spec.select_shown(image).movedim(-3, 0).flatten(1, -2)
    return F.avg_pool2d(colours[None], factor_of(image.shape), ceil_mode=True)[0]


def reduce_map(heat: Tensor) -> Tensor:
    """Average a map `(H, W)`, or that of a clip with its frames below one another, over squares of pixels, so that an
    image or a frame has at most 512 a side."""
    return F.avg_pool2d(heat.float().flatten(0, -2)[None], factor_of(heat.shape), ceil_mode=True)[0]


def reduce_mask(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Reduce a mask `(H, W)` as `reduce_map` does; a square is marked if one of its pixels is."""
    marked = F.max_pool2d(torch.from_numpy(mask).float()[None], factor_of(mask.shape), ceil_mode=True)
    return np.asarray(marked[0].numpy() > 0)


def factor_of(size: Sequence[int]) -> int:
    """Return the side of the squares of pixels that are averaged in an image `(..., H, W)`."""
    return -(-max(size[-2:]) // MOST)
