"""Pictures of samples beside the conditions that they were given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prior.conditions import GridColumn

from ..images import ImageDataset
from ..images.pictures import LATENT, grid_picture, show_of
from ..processes.group import ALONE, ProcessGroup
from ..shuffling import spread
from ..tokens import TokenSplit

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

COLUMNS = 16


@torch.no_grad()
def condition_picture(
    pipeline: ImagePipeline,
    split: TokenSplit,
    images: ImageDataset | None = None,
    count: int = 3 * COLUMNS,
    seed: int = 0,
    group: ProcessGroup = ALONE,
) -> np.ndarray:
    """Return a picture of samples given the labels and columns of at most `count` evenly spread rows of `split`. Each
    row of samples is below the rows of their grids, decoded, and of the real `images` of these rows, if given; all rows
    are full. The processes of the group share the sampling."""
    width = min(COLUMNS, count, len(split))
    rows = spread(len(split), min(count, len(split)) // width * width)
    size = -(-len(rows) // group.world)

    def draw(start: int) -> Tensor:
        some = rows[start : start + size]
        labels = None if split.labels is None else split.labels[torch.from_numpy(some)].tolist()
        condition = split.condition(some)
        drawn = pipeline(
            len(some), labels, condition=condition, seed=seed + start, output_type=LATENT, progress=False
        ).tokens
        return pipeline.decode_batch(drawn, batch_size=64, progress=False).float().cpu()

    samples = torch.cat(group.map(draw, range(0, len(rows), size)))
    grids = [name for name, column in pipeline.conditions.items() if isinstance(column, GridColumn)]
    parts = [decode_grid(pipeline, name, split.condition(rows)[name]) for name in grids]
    parts += [*([] if images is None else [images.batch(rows)]), samples]
    lines = zip(*(part.split(width) for part in parts), strict=True)
    shown = torch.cat([line for lines_of_images in lines for line in lines_of_images])
    return grid_picture(shown, width, show=show_of(pipeline.tokenizer))


def decode_grid(pipeline: ImagePipeline, name: str, tokens: Tensor) -> Tensor:
    """Decode raw tokens `(B, *shape)` of a grid column to images of the pipeline's shape; null ones are grey."""
    tokenizer, (channels, height, width) = pipeline.condition_tokenizers[name], pipeline.tokenizer.image_shape
    images = tokenizer.decode(tokens.clamp(min=0).to(pipeline.device)).float().cpu()
    images[pipeline.conditions[name].is_null(tokens)] = 0.0
    images = images if images.shape[1] == channels else images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return F.interpolate(images, (height, width), mode="nearest-exact")
