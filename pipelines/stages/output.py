"""What a call returns: in diffusers' way a mapping, a tuple by position, and attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Image as Picture
from torch import Tensor

from ..images import to_uint8
from ..images.grids import class_grid


@dataclass(frozen=True, eq=False)
class PipelineOutput(Mapping[str, Any]):
    """`images`: a list of PIL images, uint8 (B, H, W, C), or float (B, C, H, W); `tokens`: (B, *grid.shape).

    As in diffusers, `out.images`, `out["images"]` and `out[0]` are the same, so are `tokens` and `out[1]`;
    `images, tokens = out.to_tuple()`; `for name in out` goes over the names, as it does over those of a dict.
    """

    images: Any
    tokens: Tensor
    class_names: list[str] | None = field(default=None, repr=False)
    """That of each image, "" where none was asked for; None if none was for all. It is no part of the mapping."""

    def to_tuple(self) -> tuple[Any, Tensor]:
        """`(images, tokens)`: what a call with `return_dict=False` returns."""
        return self.images, self.tokens

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return dict(zip(self, self.to_tuple(), strict=True))[key]
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("images", "tokens"))

    def __len__(self) -> int:
        return 2

    def grid(self, columns: int | None = None, *, labels: bool = True) -> Picture:
        """All images in one picture: a column for each class, with its name on top; with `columns`, in their order,
        the name above each image. labels: False writes no names. Completions (`draws`) of an image stand in a row.

        Small images are enlarged by a whole number, until a name fits over them. Raises `ValueError` for an output of
        `output_type="latent"`, which has no images, and for fewer than 1 column.
        """
        if columns is not None and columns < 1:
            raise ValueError(f"columns must be at least 1 (got {columns})")
        if self.images is self.tokens:
            raise ValueError("grid: these are tokens; pipe.decode(out.tokens) makes images of them")
        images, draws = as_pixels(self.images)
        names = self.class_names if draws is None else None
        return Image.fromarray(class_grid(images, names, columns or draws, captions=labels))


def as_pixels(images: Any) -> tuple[np.ndarray, int | None]:
    """Images as a call returns them as uint8 (B, H, W, C), and how many draws of each there are, None without an axis
    of draws."""
    draws = None
    if isinstance(images, list):
        if isinstance(images[0], list):
            draws, images = len(images[0]), [image for each in images for image in each]
        pixels = np.stack([np.asarray(image) for image in images])
        return pixels.reshape(*pixels.shape[:3], -1), draws
    if images.ndim == 5:
        draws, images = images.shape[1], images.reshape(-1, *images.shape[2:])
    return (to_uint8(images.cpu()).movedim(1, -1).numpy() if isinstance(images, Tensor) else images), draws
