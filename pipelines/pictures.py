"""Pictures a person looks at: a grid of images as one array or PNG file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def grid_picture(images: Tensor, columns: int, *, min_side: int = 56) -> np.ndarray:
    """Images `(B, C, H, W)` in [-1, 1] as one uint8 (H, W, 3) array, small ones enlarged to `min_side` by repetition."""
    images = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    scale = max(1, -(-min_side // images.shape[-1]))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=columns, padding=2, pad_value=128).movedim(0, -1).numpy()


def save_picture(picture: np.ndarray, path: str | Path) -> None:
    """Write a uint8 (H, W, 3) array as an image file; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
