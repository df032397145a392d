"""Random changes of training images: flip, shift, rotation, zoom.

What happens to an image is a pure function of (seed, epoch, index): no generator is kept, so a resumed run, another
batch size or another number of processes sees the same images. It is drawn on the host, as five numbers for an image
(`draw_changes`); the pixels are changed wherever they are, on a GPU where there is one.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ..config import Config
from ..shuffling import DRAWS, uniforms


class AugmentConfig(Config):
    """Random changes of training images; all are off by default."""

    flip: bool = Field(default=False, description="mirror half of the images left to right")
    shift: int = Field(
        default=0, ge=0, description="move by up to this many whole pixels, down or up and left or right"
    )
    rotate: float = Field(default=0.0, ge=0, le=180, description="turn by up to this many degrees, either way")
    zoom: float = Field(default=0.0, ge=0, lt=1, description="enlarge or shrink by up to this share")

    @property
    def moves(self) -> bool:
        """Whether pixels come to lie between others, or at other places than mirrored ones."""
        return bool(self.shift or self.rotate or self.zoom)


def draw_changes(
    indices: NDArray[np.int64], epochs: NDArray[np.int64] | int, config: AugmentConfig, seed: int
) -> Tensor | None:
    """Return the changes of the images at `indices` (B,) in their `epochs`, (B,) or one for all: float32 (B, 5), which
    are 1 to mirror, cosine and sine of the angle, both times the share of the picture that is seen, and the pixels down
    and right. None if nothing is changed."""
    if not (config.flip or config.moves):
        return None
    draws, epochs = np.empty((len(indices), DRAWS)), np.broadcast_to(epochs, indices.shape)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        draws[here] = uniforms(seed, int(epoch), indices[here])
    mirrored, sides = draws[:, 0] < 0.5, 2 * draws[:, 1:] - 1
    down, right = np.rint(sides[:, :2] * (config.shift + 0.5) * (1 - 1e-9)).T  # whole pixels, all equally likely
    angle, scale = sides[:, 2] * math.radians(config.rotate), 1 / (1 + sides[:, 3] * config.zoom)
    changes = [config.flip * mirrored, np.cos(angle) * scale, np.sin(angle) * scale, down, right]
    return torch.from_numpy(np.stack(changes, axis=1).astype(np.float32))


def mirror_images(images: Tensor, changes: Tensor) -> Tensor:
    """Return images (B, C, H, W) of any type, some of them mirrored left to right as `changes` (`draw_changes`) say."""
    return torch.where(changes[:, 0].bool()[:, None, None, None], images.flip(-1), images)


def move_images(images: Tensor, changes: Tensor) -> Tensor:
    """Return float images (B, C, H, W) in [-1, 1], shifted, turned and zoomed by `changes` (`draw_changes`).

    The result for an image is the same, bit for bit, in any batch.
    """
    grid = affine_grid(changes, images.shape[-2], images.shape[-1])
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return images.clamp(-1, 1)  # interpolation may overshoot by a rounding error


def affine_grid(changes: Tensor, height: int, width: int) -> Tensor:
    """Return the place from which each output pixel is read, (B, H, W, 2) for `grid_sample`; `changes` (B, 5) are as
    `draw_changes` returns them.

    Written with elementwise operations because `F.affine_grid` is a matrix product, whose rounding may depend on B.
    """
    cos, sin, down, right = changes[:, 1:, None, None].unbind(1)
    y = torch.arange(height, device=changes.device)[None, :, None] - (height - 1) / 2 - down
    x = torch.arange(width, device=changes.device)[None, None, :] - (width - 1) / 2 - right
    # Pixels count from the centre, so that rotation does not shear images that are not square.
    return torch.stack([(cos * x - sin * y) * 2 / width, (sin * x + cos * y) * 2 / height], dim=-1)
