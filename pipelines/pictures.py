"""Pictures a person looks at: a grid of images as one array or PNG file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenizer.storage import FormatError, LimitError, read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS = 64 << 20, 64 << 20


def grid_picture(images: Tensor, columns: int, *, min_side: int = 56) -> np.ndarray:
    """Images `(B, C, H, W)` in [-1, 1] as one uint8 (H, W, 3) array, small ones repeated up to `min_side`."""
    from torchvision.utils import make_grid  # a second of imports, which loading a pipeline need not wait for

    images = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    scale = max(1, -(-min_side // images.shape[-1]))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=columns, padding=2, pad_value=128).movedim(0, -1).numpy()


def save_picture(picture: np.ndarray, path: str | Path) -> None:
    """Write a uint8 (H, W, 3) array as an image file; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def read_picture(path: Path) -> np.ndarray:
    """A PNG file as uint8 (H, W, 3). Raises a `PipelineLoadError` for one that is too large or can not be read."""
    data = read_bytes(path, MAX_PICTURE_BYTES)
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.width * image.height > MAX_PICTURE_PIXELS:
            raise LimitError(f"{path}: {image.width} x {image.height} pixels, at most {MAX_PICTURE_PIXELS} allowed")
        return np.asarray(image.convert("RGB"))
    except LimitError:
        raise
    except Image.UnidentifiedImageError:  # its own message names a memory address
        raise FormatError(f"{path}: not a PNG file") from None
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise FormatError(f"{path}: not a readable PNG file ({error})") from error
