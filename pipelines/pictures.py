"""Images as people hand them over and look at them: PIL, arrays, and grids of many in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tokenizer.ownership import MARK
from tokenizer.storage import Inputs, atomic_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def grid_picture(images: Tensor, columns: int, *, min_side: int = 56) -> np.ndarray:
    """Images `(B, C, H, W)` in [-1, 1] as one uint8 (H, W, 3) array, small ones repeated up to `min_side`."""
    from torchvision.utils import make_grid  # a second of imports, which loading a pipeline need not wait for

    images = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    scale = max(1, -(-min_side // images.shape[-1]))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=columns, padding=2, pad_value=128).movedim(0, -1).numpy()


def save_picture(picture: np.ndarray, path: str | Path, *, inputs: Inputs = ()) -> None:
    """Write a uint8 (H, W, 3) array as an image file, whole or not at all; its folder is made. Raises `PathError` where
    a file would be overwritten that is not such a picture, or something of the `inputs`."""
    with atomic_file(path, inputs=inputs) as temporary:
        write_image(Image.fromarray(picture), temporary)


def write_image(image: Image.Image, path: Path) -> None:
    """Write a new image file that says that it is ours, in a comment of its format; of BMP, which has none, at its
    end."""
    comment = PngInfo()
    comment.add_text("Software", MARK.decode())
    options: dict[str, dict[str, Any]] = {
        ".png": {"pnginfo": comment},
        ".jpg": {"comment": MARK},
        ".jpeg": {"comment": MARK},
        ".webp": {"xmp": MARK},
    }
    image.save(path, **options.get(path.suffix.lower(), {}))
    if path.suffix.lower() == ".bmp":
        with path.open("ab") as file:
            file.write(MARK)


def to_images(images: Any, shape: tuple[int, int, int]) -> Tensor:
    """Float `(B, C, H, W)` in [-1, 1] of `shape` (C, H, W), from PIL images (resized and cropped to fit), uint8 or
    float tensors. Raises `ValueError` for another size, type or range."""
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)) and images and all(isinstance(image, Image.Image) for image in images):
        from .decoding import pixels_of

        images = torch.stack([torch.from_numpy(pixels_of(image, shape).copy()) for image in images])
    if not isinstance(images, Tensor) or tuple(images.shape[1:]) != shape:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images should be PIL images, or uint8 or float of shape (B, {', '.join(map(str, shape))}); got {found}"
        )
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.dtype.is_floating_point or not bool((images.abs() <= 1 + 1e-3).all()):
        raise ValueError(
            f"float images should lie in [-1, 1] (uint8 ones in 0 to 255); got {images.dtype}, "
            f"{float(images.min())} to {float(images.max())}"
        )
    return images.float().clamp(-1, 1)


def check_output_type(output_type: str) -> None:
    """Raise `ValueError` for an unknown output type."""
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type must be 'pil', 'np' or 'pt' (got {output_type!r})")


def convert_images(images: Tensor, output_type: str) -> Any:
    """Float `(B, C, H, W)` in [-1, 1] as PIL images, uint8 (B, H, W, C), or as they are."""
    check_output_type(output_type)
    if output_type == "pt":
        return images
    pixels = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()
    if output_type == "np":
        return pixels
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
