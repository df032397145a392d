"""DiffAugment (Zhao et al. 2020, arXiv:2006.10738): what a critic of few images sees is changed at random each time.

A critic that sees the same few images again and again learns them by heart, and then says of all others, and of
reconstructions, that they are not real. Here real images and reconstructions go through the same kinds of random change
before the critic, in its own turn and in the tokenizer's; a gradient passes through. Images are in [-1, 1], so the 0
that fills gaps is grey. Every image has its own draws, from torch's random numbers on the images' device, which a
training step seeds: no kinds, no draws.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

SHIFT = 0.125  # of a side, at most, by which an image moves
HOLE = 0.5  # of a side, which is cut out


def augment(images: Tensor, kinds: Collection[str]) -> Tensor:
    """Images `(B, C, H, W)`, each changed by all of `kinds`, in the order of `KINDS`. Raises `ValueError` for a kind
    that there is not."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"augment: must be of {', '.join(KINDS)} (got {unknown[0]!r})")
    for kind, change in KINDS.items():
        images = change(images) if kind in kinds else images
    return images


def color(images: Tensor) -> Tensor:
    """Brightness moves by up to 0.5; distances from an image's grey (saturation) are scaled by 0 to 2, and from its
    mean (contrast) by 0.5 to 1.5. A grey image has no saturation."""
    images = images + (uniform(images) - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * uniform(images))
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.5 + uniform(images))


def translation(images: Tensor) -> Tensor:
    """An image moves by whole pixels, up to an eighth of its side each way; 0 where it was."""
    for axis in (2, 3):
        side = images.shape[axis]
        most = int(SHIFT * side + 0.5)
        shifts = torch.randint(-most, most + 1, (len(images), 1), device=images.device)
        source = torch.arange(side, device=images.device) + shifts  # (B, side): which row stands there now
        inside = on_axis(((source >= 0) & (source < side)).to(images.dtype), axis)
        index = on_axis(source.clamp(0, side - 1), axis).expand_as(images)
        images = images.gather(axis, index) * inside
    return images


def cutout(images: Tensor) -> Tensor:
    """A rectangle of half the height and half the width is 0; its middle may be at any pixel."""
    inside = images.new_ones(len(images), 1, 1, 1)
    for axis in (2, 3):
        side = images.shape[axis]
        hole = int(HOLE * side + 0.5)
        starts = torch.randint(-(hole // 2), side - hole // 2, (len(images), 1), device=images.device)
        rows = torch.arange(side, device=images.device)
        inside = inside * on_axis(((rows >= starts) & (rows < starts + hole)).to(images.dtype), axis)
    return images * (1 - inside)


def uniform(images: Tensor) -> Tensor:
    """`(B, 1, 1, 1)`, a number in [0, 1) for each image."""
    return torch.rand(len(images), 1, 1, 1, device=images.device).to(images.dtype)


def on_axis(values: Tensor, axis: int) -> Tensor:
    """`(B, n)` as `(B, 1, n, 1)` for axis 2, `(B, 1, 1, n)` for axis 3."""
    return values[:, None, :, None] if axis == 2 else values[:, None, None, :]


KINDS: dict[str, Callable[[Tensor], Tensor]] = {"color": color, "translation": translation, "cutout": cutout}
