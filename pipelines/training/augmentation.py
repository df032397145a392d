"""DiffAugment (Zhao et al. 2020, arXiv:2006.10738): differentiable augmentation of a critic's input.

A critic memorises a small training set and rejects all other images. Real images and reconstructions are therefore
augmented at random before they reach the critic, both in its own loss and in the tokenizer's, and gradients pass
through. Images are in [-1, 1], so gaps filled with 0 are grey. Each image is augmented independently with torch's
global generator of its device, which every training step seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

SHIFT = 0.125  # largest translation, as a fraction of a side
HOLE = 0.5  # side of the cut-out rectangle, as a fraction of the image's


def augment(images: Tensor, kinds: Collection[str]) -> Tensor:
    """Augment images `(B, C, H, W)` by all of `kinds`, in the order of `AUGMENTATIONS`."""
    for kind, change in AUGMENTATIONS.items():
        images = change(images) if kind in kinds else images
    return images


def color(images: Tensor) -> Tensor:
    """Shift brightness by up to 0.5, and scale saturation (distance from grey) by 0 to 2 and contrast (distance from
    the mean) by 0.5 to 1.5."""
    images = images + (uniform(images) - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * uniform(images))
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.5 + uniform(images))


def translation(images: Tensor) -> Tensor:
    """Shift each image by whole pixels, up to an eighth of its side, and fill with 0."""
    for axis in (2, 3):
        side = images.shape[axis]
        most = int(SHIFT * side + 0.5)
        shifts = torch.randint(-most, most + 1, (len(images), 1), device=images.device)
        source = torch.arange(side, device=images.device) + shifts  # (B, side): source row of each row
        inside = on_axis(((source >= 0) & (source < side)).to(images.dtype), axis)
        index = on_axis(source.clamp(0, side - 1), axis).expand_as(images)
        images = images.gather(axis, index) * inside
    return images


def cutout(images: Tensor) -> Tensor:
    """Zero a rectangle of half the height and half the width, centred on a random pixel."""
    inside = images.new_ones(len(images), 1, 1, 1)
    for axis in (2, 3):
        side = images.shape[axis]
        hole = int(HOLE * side + 0.5)
        starts = torch.randint(-(hole // 2), side - hole // 2, (len(images), 1), device=images.device)
        rows = torch.arange(side, device=images.device)
        inside = inside * on_axis(((rows >= starts) & (rows < starts + hole)).to(images.dtype), axis)
    return images * (1 - inside)


def uniform(images: Tensor) -> Tensor:
    """Draw a number in [0, 1) per image, `(B, 1, 1, 1)`."""
    return torch.rand(len(images), 1, 1, 1, device=images.device).to(images.dtype)


def on_axis(values: Tensor, axis: int) -> Tensor:
    """Reshape `(B, n)` to `(B, 1, n, 1)` for axis 2, `(B, 1, 1, n)` for axis 3."""
    return values[:, None, :, None] if axis == 2 else values[:, None, None, :]


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"color": color, "translation": translation, "cutout": cutout}
