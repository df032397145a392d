"""Which pixels of images are known, told in one of two ways: `known`, True = keep this pixel, or `mask`, white or
True = draw it again, as diffusers and `smalti complete` have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Image as Picture
from torch import Tensor

from prior.orders import as_tensor

from .images.decoding import pixels_of

Known = Tensor | np.ndarray | None
"""bool `(H, W)` or `(B, H, W)`, True = keep this pixel."""
Mask = Picture | Tensor | np.ndarray | list[Any] | None
"""A picture, or one for each image; or `(H, W)`, `(B, H, W)` or `(B, 1, H, W)`: bool, whole numbers of 0 to 255 (or 0
and 1), or floats in [0, 1]. White, True and the upper half are drawn again."""
WHITE = 128


def known_pixels(known: Any, mask: Any, images: Any, batch: Tensor) -> Tensor:
    """What is known, bool `(B, H, W)`, of `images`, which are `(B, C, H, W)` as a `batch`. Raises `TypeError` unless
    one of the two is given, `ValueError` for another shape or type."""
    if (known is None) == (mask is None):
        raise TypeError("give known (True = keep this pixel) or mask (white = draw it again): one of the two")
    return check_known(known, batch) if mask is None else ~hidden_pixels(mask, images, batch)


def check_known(known: Any, batch: Tensor) -> Tensor:
    """`known` as bool `(B, H, W)`. Raises `ValueError` for another shape or type."""
    several = known if isinstance(known, (list, tuple)) else [known]
    if any(isinstance(one, Picture) for one in several):
        raise ValueError(
            "known should be a bool tensor or array, True = keep this pixel, and not a picture; give mask=picture if "
            "it is white where pixels are to be drawn"
        )
    known = as_tensor(known, batch.device)
    shape = (len(batch), *batch.shape[2:])
    if known.dtype != torch.bool or tuple(known.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"known should be bool of shape {shape[1:]} or {shape}, got {known.dtype} of {tuple(known.shape)}"
        )
    return known.expand(shape)


def hidden_pixels(mask: Any, images: Any, batch: Tensor) -> Tensor:
    """The pixels that a `Mask` wants to be drawn again, bool `(B, H, W)`. A picture has the size of the batch, or that
    of its own image, which is then resized and cropped as that is. Raises `ValueError` for another size or type."""
    count, _, height, width = batch.shape
    several = mask if isinstance(mask, (list, tuple)) else [mask]
    if any(isinstance(one, Picture) for one in several):
        given = list(images) if isinstance(images, (list, tuple)) else [images] * count
        if len(several) not in (1, count) or not all(isinstance(one, Picture) for one in several):
            raise ValueError(f"mask should be a picture, or a list of {count}, one for each image (got {len(several)})")
        each = several * count if len(several) == 1 else several
        parts = [white_in(one, image, (height, width)) for one, image in zip(each, given, strict=True)]
        return torch.stack(parts).to(batch.device)
    mask = as_tensor(mask, batch.device)
    mask = mask[:, 0] if mask.ndim == 4 and mask.shape[1] == 1 else mask
    shape = (count, height, width)
    if tuple(mask.shape) not in (shape, shape[1:], (1, *shape[1:])):
        raise ValueError(f"mask should have shape {shape[1:]} or {shape}, got {tuple(mask.shape)}")
    return is_white(mask).expand(shape)


def is_white(mask: Tensor) -> Tensor:
    """Where `mask`, of any shape, is True, or in the upper half of its range."""
    if mask.dtype == torch.bool or not mask.numel():
        return mask.bool()
    if not mask.dtype.is_floating_point and not mask.dtype.is_complex:
        mask = mask.long()  # torch compares few of the unsigned types
    elif mask.dtype.is_complex:
        raise ValueError(f"mask should be bool, whole numbers of 0 to 255, or floats in [0, 1] (got {mask.dtype})")
    low, high = (float(value) for value in mask.aminmax())
    if not 0 <= low <= high <= (1 if mask.dtype.is_floating_point else 255):
        raise ValueError(
            f"mask should be bool, whole numbers of 0 to 255, or floats in [0, 1] (got {mask.dtype}, {low} to {high})"
        )
    return mask >= (0.5 if high <= 1 else WHITE)


def white_in(mask: Picture, image: Any, size: tuple[int, int]) -> Tensor:
    """Where the picture `mask` of `image` is white, bool `(H, W)`."""
    (height, width), mask = size, ImageOps.exif_transpose(mask)
    if mask.mode in ("I", "F"):  # numbers, as those of an array; of a picture's 32 bits there is no white
        mask = Image.fromarray(255 * is_white(torch.from_numpy(np.array(mask))).byte().numpy())
    allowed = [(width, height)]
    if isinstance(image, Picture):
        allowed.append(ImageOps.exif_transpose(image).size)
    if mask.size not in allowed:
        sizes = " or ".join(f"{w} x {h}" for w, h in dict.fromkeys(allowed))
        raise ValueError(f"mask has {mask.width} x {mask.height} pixels; it should have {sizes}, as its image")
    return torch.from_numpy(pixels_of(mask, (1, height, width))[0] >= WHITE)
