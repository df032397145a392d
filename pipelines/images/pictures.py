"""Convert between tensors and the images of users: PIL images, arrays, files, and grids of many images."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import atomic_file
from .arrays import Values, decode_array, require_finite, type_of
from .decoding import pixels_of

Shape = tuple[int, int, int]
ARRAYS = (np.uint8, np.float16, np.float32, np.float64)
INNER = ("pipelines", "prior", "tokenizer", "torch")  # packages that are not user code
_warned = False  # about floats in [0, 1], once per process

OUTPUT_TYPES = ("pil", "np", "pt")
LATENT = "latent"  # return tokens instead of images
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def shown_channels(images: Tensor, show: Sequence[int] | None = None) -> Tensor:
    """Return the channels of `(B, C, H, W)` that pictures show: all of 1 or 3, the first of 2, and otherwise `show`, by
    default the first three."""
    if images.shape[1] in (1, 3):
        return images
    return images[:, :1] if images.shape[1] == 2 else images[:, list(show or (0, 1, 2))]


def show_of(tokenizer: Any) -> Sequence[int] | None:
    """Return the channels that pictures of a tokenizer's images show, if chosen."""
    return getattr(tokenizer.config, "show", None)


def picture_pixels(images: Tensor, tokenizer: Any) -> np.ndarray:
    """Return what pictures show of a tokenizer's images `(B, C, H, W)` in [-1, 1], as uint8 (B, H, W, 1 or 3)."""
    return to_uint8(shown_channels(images.cpu(), show_of(tokenizer))).movedim(1, -1).numpy()


def grid_picture(images: Tensor, columns: int, *, min_side: int = 56, show: Sequence[int] | None = None) -> np.ndarray:
    """Arrange images `(B, C, H, W)` in [-1, 1] in one uint8 (H, W, 3) array; enlarge them to a width of `min_side`.
    show: see `shown_channels`."""
    from torchvision.utils import make_grid  # imported here, because it takes a second

    images = to_uint8(shown_channels(images.cpu(), show))
    scale = max(1, -(-min_side // images.shape[-1]))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=columns, padding=2, pad_value=128).movedim(0, -1).numpy()


def save_picture(picture: np.ndarray, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a uint8 (H, W, 3) array to an image file, atomically; create its folder. Raises `PathError` for a link, and
    for an existing file unless `overwrite`."""
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


def to_images(images: Any, shape: Shape, values: Values | None = None) -> Tensor:
    """Convert anything that `as_batch` accepts to float images `(B, C, H, W)` in [-1, 1] of `shape` (C, H, W). Warns
    once about floats that look like [0, 1]; raises `ValueError` for another size, type or range.

    values: type and range of the images; None for 8 bits. Arrays and integer tensors then hold such values. Float
    tensors, and float arrays if the type is an integer, are in [-1, 1] as always."""
    if values is not None:
        return as_batch(from_values(images, shape, values), shape).float()
    batch = as_batch(images, shape)
    warn_if_unit(batch)
    if batch.dtype == torch.uint8:
        return to_float(batch)
    if not batch.dtype.is_floating_point:
        raise ValueError(f"images must be uint8, or float in [-1, 1]; got {batch.dtype}")
    if not bool((batch.abs() <= 1 + 1e-3).all()):
        found = f"{float(batch.min())} to {float(batch.max())}"
        raise ValueError(f"float images must lie in [-1, 1]; got {batch.dtype} from {found}")
    return batch.float().clamp(-1, 1)


def from_values(images: Any, shape: Shape, values: Values) -> Any:
    """Map images of this type and range to floats in [-1, 1], in the form in which they are given. Raises `ValueError`
    for another type, NaN, and floats beyond [-1, 1]."""
    if isinstance(images, (list, tuple)):
        return [from_values(image, shape, values) for image in images]
    if isinstance(images, Image.Image):
        return torch.from_numpy(decode_array(images, shape, values))
    if not isinstance(images, (np.ndarray, Tensor)):
        refuse(images, shape)
    array = images.detach().cpu() if isinstance(images, Tensor) else images
    array = array.float().numpy() if isinstance(array, Tensor) and array.is_floating_point() else np.asarray(array)
    found = type_of(array.dtype)
    require_finite(array)
    if found == "float32" and (isinstance(images, Tensor) or values.dtype != found):
        if array.size and np.abs(array).max() > 1 + 1e-3:
            raise ValueError(
                f"float images must lie in [-1, 1] (got {array.min():g} to {array.max():g}); those in the range of the "
                f"data are {values.dtype} arrays"
            )
        array = array.astype(np.float32).clip(-1, 1)
    elif found == values.dtype:
        array = values.to_unit(array)
    else:
        raise ValueError(f"images must be {values.dtype}, or float tensors in [-1, 1] (got {found})")
    return torch.from_numpy(array) if isinstance(images, Tensor) else array


def as_batch(images: Any, shape: Shape) -> Tensor:
    """Combine images of `shape` (C, H, W) in one tensor `(B, C, H, W)`; range and type do not change.

    Takes a PIL image (resized and cropped to fit, as uint8); a tensor `(B, C, H, W)`; an array `(B, H, W, C)`, or
    `(H, W, C)` for one image, for grey images also `(B, H, W)` or `(H, W)`; or a list of single images. Raises
    `ValueError` for anything else.
    """
    if isinstance(images, (list, tuple)):
        parts = [convert_image(image, shape) for image in images]
        if len({part.dtype for part in parts}) != 1:
            refuse(images, shape)
        return torch.stack(parts)
    if isinstance(images, np.ndarray):
        return convert_array(images, shape)
    if isinstance(images, Image.Image):
        return convert_image(images, shape)[None]
    if not isinstance(images, Tensor) or tuple(images.shape[1:]) != shape:
        refuse(images, shape)
    return images


def convert_image(image: Any, shape: Shape) -> Tensor:
    """Convert a PIL image, a tensor `(C, H, W)` or an array `(H, W, C)` or `(H, W)` to a tensor `(C, H, W)`."""
    if isinstance(image, Image.Image):
        read = pixels_of if shape[0] in (1, 3) else partial(decode_array, values=None)
        return torch.from_numpy(read(image, shape).copy())
    if isinstance(image, np.ndarray) and image.shape in single_shapes(shape):
        return convert_array(image, shape)[0]
    if not isinstance(image, Tensor) or tuple(image.shape) != shape:
        refuse(image, shape)
    return image


def convert_array(array: np.ndarray, shape: Shape) -> Tensor:
    """Copy an array `(B, H, W, C)`, `(B, H, W)`, `(H, W, C)` or `(H, W)` to a tensor `(B, C, H, W)`."""
    singles = single_shapes(shape)
    batch = array[None] if array.shape in singles else array
    if batch.shape[1:] not in singles or array.dtype not in ARRAYS:
        refuse(array, shape)
    channels, height, width = shape
    batch = batch.reshape(len(batch), height, width, channels)
    return torch.from_numpy(np.moveaxis(batch, -1, 1).copy())


def single_shapes(shape: Shape) -> list[tuple[int, ...]]:
    """Return the valid shapes of an array that holds one image."""
    channels, height, width = shape
    return [(height, width, channels)] + [(height, width)] * (channels == 1)


def refuse(images: Any, shape: Shape) -> NoReturn:
    """Raise a `ValueError` that lists the valid forms of images."""
    arrays = [("B", *single) for single in single_shapes(shape)] + single_shapes(shape)
    forms = ", ".join(f"({', '.join(map(str, form))})" for form in arrays)
    raise ValueError(
        f"images must be PIL images, uint8 or float tensors of shape (B, {', '.join(map(str, shape))}), uint8 or float "
        f"arrays of shape {forms}, or a list of single images; got {describe_type(images)}"
    )


def describe_type(images: Any) -> str:
    """Return the type of what was given as images, with its shape or the types of its items."""
    found = type(images).__name__
    if isinstance(images, (list, tuple)):
        kinds = sorted({str(getattr(image, "dtype", type(image).__name__)) for image in images})
        return f"{found} of {' and '.join(kinds)}" if kinds else f"empty {found}"
    return f"{found} of shape {tuple(images.shape)}, {images.dtype}" if hasattr(images, "shape") else found


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


def check_output_type(output_type: str, *others: str) -> None:
    """Raise `ValueError` for an unknown output type. others: further valid types."""
    allowed = [*OUTPUT_TYPES, *others]
    if output_type not in allowed:
        *most, last = map(repr, allowed)
        raise ValueError(f"output_type must be {', '.join(most)} or {last} (got {output_type!r})")


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels of any shape to float32 in [-1, 1]; images of another depth are there already."""
    if pixels.is_floating_point():
        return pixels
    return pixels.float().div_(127.5).sub_(1)  # in place takes less than half the time


def to_uint8(images: Tensor) -> Tensor:
    """Invert `to_float` exactly; clamp other floats to [-1, 1] and round them."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def convert_images(
    images: Tensor, output_type: str, values: Values | None = None, show: Sequence[int] | None = None
) -> Any:
    """Convert float images `(B, C, H, W)` in [-1, 1] to a list of PIL images (`pil`) or an array (B, H, W, C) (`np`) of
    the type and range `values`, by default uint8; `pt` returns them unchanged. show: see `shown_channels`."""
    check_output_type(output_type)
    if output_type == "pt":
        return images
    if output_type == "np" and values is not None:
        return values.from_unit(images.float().cpu().movedim(1, -1).numpy())
    if output_type == "pil":
        images = shown_channels(images, show)
    pixels = to_uint8(images.cpu()).movedim(1, -1).numpy()
    if output_type == "np":
        return pixels
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
