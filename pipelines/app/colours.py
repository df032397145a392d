"""Tokens and bits as colours."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def token_picture(tokens: Tensor) -> np.ndarray:
    """The ids `(*grid.shape)` of an image as a picture, uint8 (H, W, 3), a pixel for each: levels and scales lie below
    each other, and a row of tokens is folded."""
    grid = tokens.cpu()
    if grid.ndim == 1:
        width = math.ceil(math.sqrt(len(grid)))
        rows = -(-len(grid) // width)
        colours = np.zeros((rows * width, 3), np.uint8)
        colours[: len(grid)] = golden(grid)
        return colours.reshape(rows, width, 3)
    return golden(grid.reshape(-1, grid.shape[-1]))


def golden(ids: Tensor) -> np.ndarray:
    """A colour for each id, uint8 (..., 3): hues a golden angle apart, so that neighbours differ."""
    hue = (ids.double() * 0.6180339887) % 1
    value = 0.55 + 0.45 * ((ids * 7919) % 97).double() / 96
    parts = [(torch.cos(2 * torch.pi * (hue + third / 3)) * 0.5 + 0.5) * value for third in range(3)]
    return (torch.stack(parts, -1) * 255).round().to(torch.uint8).numpy()


def heat(values: Tensor) -> np.ndarray:
    """`(H, W)` in [0, 1] as uint8 (H, W, 3): black, red, yellow, white."""
    parts = [(3 * values - channel).clamp(0, 1) for channel in range(3)]
    return (torch.stack(parts, -1) * 255).round().to(torch.uint8).numpy()
