"""Random changes of training images: flip, shift, rotation, zoom.

What happens to an image is a pure function of (seed, epoch, index): no generator is kept, so a resumed run, another
batch size or another number of processes sees the same images.
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
from ..shuffling.hashing import uniforms


class AugmentConfig(Config):
    """Random changes of training images; all are off by default."""

    flip: bool = Field(False, description="mirror half of the images left to right")
    shift: int = Field(0, ge=0, description="move by up to this many whole pixels, down or up and left or right")
    rotate: float = Field(0.0, ge=0, le=180, description="turn by up to this many degrees, either way")
    zoom: float = Field(0.0, ge=0, lt=1, description="enlarge or shrink by up to this share")


def augment_images(images: Tensor, indices: NDArray[np.int64], config: AugmentConfig, seed: int, epoch: int) -> Tensor:
    """Augment `images` (B, C, H, W) in [-1, 1] with `indices` (B,) in their data set; returns the same shape.

    The result for an image is the same, bit for bit, in any batch.
    """
    draws = uniforms(seed, epoch, indices)
    if config.flip:
        mirrored = torch.from_numpy(draws[:, 0] < 0.5)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if config.shift or config.rotate or config.zoom:
        grid = affine_grid(2 * draws[:, 1:] - 1, config, images.shape[-2], images.shape[-1])
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        images = images.clamp(-1, 1)  # interpolation may overshoot by a rounding error
    return images


def affine_grid(draws: NDArray[np.float64], config: AugmentConfig, height: int, width: int) -> Tensor:
    """The place from which each output pixel is read, (B, H, W, 2) for `grid_sample`; `draws` (B, 4) are uniform in
    [-1, 1].

    Written with elementwise operations because `F.affine_grid` is a matrix product, whose rounding may depend on B.
    """
    down, right = np.rint(draws[:, :2] * (config.shift + 0.5) * (1 - 1e-9)).T  # whole pixels, all equally likely
    angle = draws[:, 2] * math.radians(config.rotate)
    scale = 1 / (1 + draws[:, 3] * config.zoom)
    cos, sin, down, right = (
        torch.from_numpy(value).float()[:, None, None]
        for value in (np.cos(angle) * scale, np.sin(angle) * scale, down, right)
    )
    y = torch.arange(height)[None, :, None] - (height - 1) / 2 - down
    x = torch.arange(width)[None, None, :] - (width - 1) / 2 - right
    # Pixels count from the centre, so that rotation does not shear images that are not square.
    return torch.stack([(cos * x - sin * y) * 2 / width, (sin * x + cos * y) * 2 / height], dim=-1)
