"""Random augmentation of training images: flip, shift, rotation, zoom.

The augmentation of an image is a pure function of (seed, epoch, index), without generator state. A resumed run, another
batch size or another number of processes therefore gives the same images. The host draws five numbers for each image
(`draw_changes`); the pixels are transformed on their own device, usually a GPU.
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
    """Random augmentation of training images, off by default."""

    flip: bool = Field(default=False, description="mirror half of the images left to right")
    shift: int = Field(
        default=0, ge=0, description="shift by up to this many whole pixels, vertically and horizontally"
    )
    rotate: float = Field(default=0.0, ge=0, le=180, description="rotate by up to this many degrees, either way")
    zoom: float = Field(default=0.0, ge=0, lt=1, description="enlarge or shrink by up to this share")

    @property
    def moves(self) -> bool:
        return bool(self.shift or self.rotate or self.zoom)

    def describe(self) -> str:
        """List the changes of an image, such as `flip, shift 3`; empty if there are none."""
        changes = {name: value for name, value in self.model_dump().items() if value}
        return ", ".join(name if value is True else f"{name} {value:g}" for name, value in changes.items())


def draw_changes(
    indices: NDArray[np.int64], epochs: NDArray[np.int64] | int, config: AugmentConfig, seed: int
) -> Tensor | None:
    """Draw the changes of the images at `indices` (B,) in their `epochs`, (B,) or one for all. Return float32 (B, 5): 1
    to mirror; cosine and sine of the angle, both divided by the zoom; and the shift down and right in pixels. None if
    augmentation is off."""
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
    """Mirror images (B, C, H, W) of any type left to right where `changes`, from `draw_changes`, say so."""
    return torch.where(changes[:, 0].bool()[:, None, None, None], images.flip(-1), images)


def move_images(images: Tensor, changes: Tensor) -> Tensor:
    """Shift, rotate and zoom float images (B, C, H, W) in [-1, 1] by `changes`, from `draw_changes`.

    The result for an image is the same to the bit in any batch.
    """
    grid = affine_grid(changes, images.shape[-2], images.shape[-1])
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return images.clamp(-1, 1)  # interpolation can overshoot by a rounding error


def affine_grid(changes: Tensor, height: int, width: int) -> Tensor:
    """Return the source position of each output pixel, (B, H, W, 2) for `grid_sample`. changes: (B, 5), from
    `draw_changes`.

    Elementwise, because `F.affine_grid` is a matrix product, whose rounding can depend on B.
    """
    cos, sin, down, right = changes[:, 1:, None, None].unbind(1)
    y = torch.arange(height, device=changes.device)[None, :, None] - (height - 1) / 2 - down
    x = torch.arange(width, device=changes.device)[None, None, :] - (width - 1) / 2 - right
    # Coordinates are in pixels from the centre, so that rotation does not shear images that are not square.
    return torch.stack([(cos * x - sin * y) * 2 / width, (sin * x + cos * y) * 2 / height], dim=-1)
