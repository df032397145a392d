"""Pictures of where in images the evidence lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..anomaly.sheets import draw_rows, reduce_image, reduce_map
from ..image_pipeline import ImagePipeline
from .evidence import evidence_map
from .posterior import Posterior, format_value


def draw_evidence(pipeline: ImagePipeline, images: Any, posterior: Posterior, condition: Any = None) -> np.ndarray:
    """Draw each image beside what speaks for its likeliest value (red) and for the second (blue).

    posterior: of these images, or of these and more after them."""
    batch = pipeline.to_images(images)
    first, second = (each[: len(batch)] for each in posterior.rivals())
    maps = evidence_map(pipeline, batch, posterior.name, first, second, condition=condition)
    rows, names = [], []
    for image, heat, a, b in zip(batch.cpu(), maps.cpu(), first, second, strict=True):
        small = reduce_map(heat)
        rows.append([reduce_image(image, pipeline), colour_signed(small / small.abs().max().clamp(min=1e-9))])
        bits = float(heat.sum())
        names.append([format_value(a), f"{bits:.0f} bits over {format_value(b)}"])
    return draw_rows(rows, names)


def colour_signed(values: Tensor) -> Tensor:
    """Map `(H, W)` in [-1, 1] to colours `(3, H, W)`: blue, white, red."""
    faded = 1 - values.abs()
    red = torch.where(values > 0, 1.0, faded)
    blue = torch.where(values < 0, 1.0, faded)
    return torch.stack([red, faded, blue]) * 2 - 1
