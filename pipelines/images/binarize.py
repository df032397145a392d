"""Grey images in black and white, for models that were trained so (`data.binarize`): one function for data sets and for
the images that users give to a pipeline."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.spec import to_float, to_uint8

from ..shuffling import FIXED, GIVEN, draw_pixels

Binarize = Literal["drawn", "threshold"]
MID_GREY = 128  # the darkest value that is white with `threshold`


def binarize(
    pixels: Tensor, how: Binarize, rows: NDArray[np.int64] | None = None, draws: NDArray[np.int64] | int = 0
) -> Tensor:
    """Make images `(B, C, H, W)`, uint8 or float in [-1, 1], black and white; those that are stay as they are.

    how: `threshold` cuts at mid grey; `drawn` makes each pixel white with probability value / 255. A draw depends on
    the image's row in its data set and its number among the row's draws, each `(B,)` or one for all; without rows, on
    the sha256 of the image's pixels, so that an image of a user is the same wherever and however often it is given.
    """
    grey = to_uint8(pixels.cpu()) if pixels.is_floating_point() else pixels.cpu()
    if how == "threshold":
        found = (grey >= MID_GREY).to(torch.uint8)
    elif rows is not None:
        found = draw_pixels(grey, rows, draws, FIXED)
    else:
        found = draw_pixels(grey, hash_pixels(grey), draws, GIVEN)
    found = found * 255
    return (to_float(found) if pixels.is_floating_point() else found).to(pixels.device)


def hash_pixels(images: Tensor) -> NDArray[np.int64]:
    """Return the first 8 bytes of the sha256 of each image's pixels, uint8 `(B, ...)`, as a number."""
    digests = [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images]
    return np.array([int.from_bytes(digest[:8], "little", signed=True) for digest in digests], np.int64)
