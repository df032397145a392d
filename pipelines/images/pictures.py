"""Convert between tensors and the images of users: PIL images, arrays, files, and grids of many images."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokenizer.spec import ImageSpec, to_float

from ..files import atomic_file
from .formats import decode_image

ARRAYS = (np.uint8, np.float16, np.float32, np.float64)
INNER = ("pipelines", "prior", "tokenizer", "torch")  # packages that are not user code
_warned = False  # about floats in [0, 1], once per process

LATENT = "latent"  # return tokens instead of images
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def grid_picture(pixels: np.ndarray, columns: int, *, min_side: int = 56) -> np.ndarray:
    """Arrange uint8 pixels (B, ..., H, W, 1 or 3) in one array (H, W, 3), the frames of clips below one another;
    enlarge them to a width of `min_side`."""
    from torchvision.utils import make_grid  # imported here, because it takes a second

    images = torch.from_numpy(pixels).flatten(1, -3).movedim(-1, 1)
    scale = max(1, -(-min_side // images.shape[-1]))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=columns, padding=2, pad_value=128).movedim(0, -1).numpy()


def save_picture(picture: np.ndarray, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a uint8 (H, W, 3) array to an image file, atomically; see `atomic_file`."""
    with atomic_file(path, overwrite=overwrite) as temporary:
        write_picture(picture, temporary)


def write_picture(picture: np.ndarray, path: Path) -> None:
    """Write an image file in place; for use in temporary folders or under temporary names."""
    Image.fromarray(picture).save(path)


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels (H, W, C) as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def npy_bytes(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def to_images(images: Any, spec: ImageSpec) -> Tensor:
    """Convert what `stack_images` accepts to float images `(B, *spec.shape)` in [-1, 1]. Warns once about floats that
    look like [0, 1]; raises `ValueError` for another size, type or range."""
    batch = stack_images(images, spec)
    if spec.is_bytes:
        warn_if_unit(batch)
    if batch.dtype == torch.uint8:
        return to_float(batch)
    if not batch.dtype.is_floating_point:
        raise ValueError(f"images must be uint8, or float in [-1, 1]; got {batch.dtype}")
    if not bool((batch.abs() <= 1 + 1e-3).all()):
        found = f"{float(batch.min())} to {float(batch.max())}"
        raise ValueError(f"float images must lie in [-1, 1]; got {batch.dtype} from {found}")
    return batch.float().clamp(-1, 1)


def stack_images(images: Any, spec: ImageSpec) -> Tensor:
    """Combine images in one tensor `(B, *spec.shape)`: uint8 levels or floats in [-1, 1].

    Takes a PIL image (resized and cropped to fit); a tensor `(B, *spec.shape)`; an array (B, H, W, C) of the type and
    range of the images, or (H, W, C) for one image, for grey images also without C; or a list of single images. Clips
    have one more axis before these, the frames; a single one may be a tensor, too, and in a list of clips each may be
    a list of frames. Raises `ValueError` for anything else.
    """
    if isinstance(images, (list, tuple)):
        parts = [convert_image(image, spec) for image in images]
        if len({part.dtype for part in parts}) != 1:
            refuse(images, spec)
        return torch.stack(parts)
    if is_single(images, spec):
        return convert_image(images, spec)[None]
    shape = tuple(images.shape[1:]) if isinstance(images, (Tensor, np.ndarray)) else None
    if shape not in ([spec.shape] if isinstance(images, Tensor) else array_shapes(spec)):
        refuse(images, spec)
    return convert_values(images, spec)


def is_single(image: Any, spec: ImageSpec) -> bool:
    """Whether this is one image in a form that may stand without a list: a PIL image, an array, a clip."""
    if isinstance(image, Tensor):
        return spec.frames > 1 and tuple(image.shape) == spec.shape
    if isinstance(image, np.ndarray):
        return image.shape in array_shapes(spec)
    return isinstance(image, Image.Image) and spec.frames == 1


def convert_image(image: Any, spec: ImageSpec) -> Tensor:
    """Convert a PIL image, a tensor `spec.shape`, an array (..., H, W, C) or (..., H, W), or a list of the frames of a
    clip to a tensor `spec.shape`: uint8 levels or floats in [-1, 1]."""
    if isinstance(image, (list, tuple)) and spec.frames > 1:
        if len(image) != spec.frames:
            raise ValueError(f"clips must have {spec.frames} frames each (got {len(image)})")
        return stack_images(image, spec.frame)
    if not is_single(image, spec) and not (isinstance(image, Tensor) and tuple(image.shape) == spec.shape):
        refuse(image, spec)
    if isinstance(image, Image.Image):
        return torch.from_numpy(decode_image(image, spec).copy())
    return convert_values(image, spec)


def convert_values(images: Tensor | NDArray[Any], spec: ImageSpec) -> Tensor:
    """Convert a tensor `(..., *spec.shape)`, or an array (..., H, W, C) or (..., H, W), to such a tensor: uint8 levels
    or floats in [-1, 1]."""
    if isinstance(images, Tensor):
        return images if spec.is_bytes else spec.to_unit(images)
    if spec.is_bytes and images.dtype not in ARRAYS:
        refuse(images, spec)
    has_channels = images.shape[-3:] == (*spec.size, spec.channels)
    array = np.moveaxis(images if has_channels else images[..., None], -1, -3)
    return torch.from_numpy(array.copy()) if spec.is_bytes else spec.to_unit(array)


def array_shapes(spec: ImageSpec) -> list[tuple[int, ...]]:
    lead = spec.shape[:-3]
    return [(*lead, *spec.size, spec.channels)] + [(*lead, *spec.size)] * (spec.channels == 1)


def refuse(images: Any, spec: ImageSpec) -> NoReturn:
    """Raise a `ValueError` that lists the valid forms of images."""
    arrays = [("B", *single) for single in array_shapes(spec)] + array_shapes(spec)
    forms = ", ".join(f"({', '.join(map(str, form))})" for form in arrays)
    is_list = isinstance(images, (list, tuple))
    found = [f"{'an empty ' * (is_list and not images)}{type(images).__name__}"]
    for image in images if is_list else [images]:
        found += [f"{tuple(image.shape)}, {image.dtype}"] if hasattr(image, "shape") else []
    tensors, kind = ", ".join(map(str, spec.shape)), "uint8" if spec.is_bytes else spec.dtype
    pictures = "PIL images" if spec.frames == 1 else f"lists of {spec.frames} frames (PIL images)"
    raise ValueError(
        f"{spec.noun}s must be {pictures}, {kind} or float tensors of shape (B, {tensors}), {kind} or float "
        f"arrays of shape {forms}, or a list of single {spec.noun}s; got {', '.join(dict.fromkeys(found))}"
    )


def from_unit(images: Any) -> Any:
    """Convert floats in [0, 1], as from torchvision's `ToTensor`, to the range [-1, 1] of a pipeline; tensors or arrays
    of any shape. Turns off the warning about images that look like [0, 1]. Raises `ValueError` for another range or
    type."""
    global _warned
    kind = type(images).__name__ if not isinstance(images, (Tensor, np.ndarray)) else str(images.dtype)
    if "float" not in kind:
        raise ValueError(f"from_unit takes a tensor or array of floats in [0, 1] (got {kind})")
    if 0 not in images.shape and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"from_unit takes floats in [0, 1] (got {float(images.min())} to {float(images.max())})")
    _warned = True  # the caller knows about ranges
    return images * 2 - 1


def warn_if_unit(batch: Tensor) -> None:
    """Warn, once per process, about images `(B, C, H, W)` that look like floats in [0, 1]: no value is negative, and
    not all are 8-bit levels in [-1, 1], as in a bright image."""
    global _warned
    if _warned or not batch.is_floating_point() or not batch.numel():
        return
    low, high = (float(value) for value in batch.aminmax())
    levels = (batch.float() + 1) * 127.5  # k/255 lies halfway between two levels where k is even
    if not (low >= 0 and 2 / 255 < high <= 1) or not bool(((levels - levels.round()).abs() > 0.1).any()):
        return
    warnings.warn(
        "float images are expected in [-1, 1], and these look like [0, 1], as from ToTensor: pass "
        "`pipelines.from_unit(images)`, or uint8",
        stacklevel=find_user_stacklevel(),
    )
    _warned = True


def find_user_stacklevel() -> int:
    """Return the `stacklevel` that points the caller's warning at the user's line; torch's decorators add levels."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in INNER:
        frame, level = frame.f_back, level + 1
    return level
