"""Where in an image the evidence lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from prior.columns import find_column

from ..anomaly.maps import anomaly_map

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline


def evidence_map(pipeline: ImagePipeline, images: Any, column: str, a: Any, b: Any, *, condition: Any = None) -> Tensor:
    """Return for each pixel the bits that speak for value `a` of a column rather than `b`, `(B, H, W)`, of clips `(B,
    T, H, W)`: log2 p(token | earlier tokens, a) - log2 p(token | earlier tokens, b), spread evenly over the patch of
    the token. They sum to log2 p(image | a) / p(image | b). a, b: one value, or one per image. Raises `ValueError` for
    tokens without a position in the image."""
    batch = pipeline.to_images(images)
    given = pipeline.read_given(None, condition, len(batch))
    find_column(pipeline.columns, column, "column")
    if column in given.rows:
        raise ValueError(f"column: {column!r} is given; leave it out of the condition")
    maps = []
    for value in (a, b):
        own = pipeline.read_given(None, {column: value}, len(batch))
        maps.append(anomaly_map(pipeline, batch, condition=given.with_rows(**own.rows)))
    return maps[1] - maps[0]
