"""Pictures of samples beside the conditions that they were given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..columns import format_of
from ..images import ImageDataset
from ..images.pictures import LATENT, grid_picture
from ..processes.group import ALONE, ProcessGroup
from ..shuffling import spread_rows
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
    rows = spread_rows(len(split), min(count, len(split)) // width * width)
    size = -(-len(rows) // group.world)

    def draw(start: int) -> Tensor:
        given = split.given[torch.from_numpy(rows[start : start + size])]
        tokens = pipeline(condition=given, seed=seed + start, output_type=LATENT, progress=False).tokens
        return pipeline.decode_batch(tokens, batch_size=64, progress=False).float().cpu()

    samples = torch.cat(group.map(draw, range(0, len(rows), size)))
    given, spec, parts = split.given[torch.from_numpy(rows)], pipeline.spec, list[Tensor]()
    for name, tokenizer in pipeline.condition_tokenizers.items():
        parts.append(format_of(name, pipeline.columns[name], tokenizer).draw(given.raw(name), spec))
    parts += [*([] if images is None else [images.batch(rows)]), samples]
    lines = zip(*(part.split(width) for part in parts), strict=True)
    return grid_picture(spec.picture(torch.cat([line for row in lines for line in row])), width)
