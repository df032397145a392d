"""Images of more than 8 bits or with other than 1 or 3 channels: NumPy arrays, 16-bit PNG, and TIFF with several pages.

Their values keep their type while they are read, resized and cropped; then `Values` maps their range to [-1, 1].
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from ..config import UserError
from .decoding import (
    MAX_FILE,
    MAX_PIXELS,
    MAX_SIDE,
    NO_IMAGE,
    WHITE_IS_ZERO,
    WORKERS,
    Payload,
    Single,
    Window,
    open_image,
    read_file,
)

Array = NDArray[Any]
ValueType = Literal["uint8", "uint16", "float32"]
NUMPY, ZIP = b"\x93NUMPY", b"PK"
"""The first bytes of `.npy` and `.npz` files."""
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class Values(NamedTuple):
    """The type of an image's values, and the range that becomes [-1, 1]; values beyond it are clipped."""

    dtype: ValueType
    low: float
    high: float

    def to_unit(self, array: Array) -> NDArray[np.float32]:
        """Map values to float32 in [-1, 1]."""
        unit = (array.astype(np.float64) - self.low) * (2 / (self.high - self.low)) - 1
        return unit.clip(-1, 1).astype(np.float32)

    def from_unit(self, images: Array) -> Array:
        """Invert `to_unit`: map floats in [-1, 1] to the range, rounded if the type is integer."""
        array = (images.astype(np.float64).clip(-1, 1) + 1) * ((self.high - self.low) / 2) + self.low
        if self.dtype == "float32":
            return array.astype(np.float32)
        return array.round().clip(0, np.iinfo(self.dtype).max).astype(self.dtype)


def values_of(tokenizer: Any) -> Values | None:
    """Return the type and range of a tokenizer's images; None for 8 bits from 0 to 255."""
    config = tokenizer.config
    found = getattr(config, "range", None)
    return None if found is None else Values(config.dtype, *found)


def is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer's images are those of most files: 8 bits, 1 or 3 channels."""
    return values_of(tokenizer) is None and tokenizer.image_shape[0] in (1, 3)


def require_plain(tokenizer: Any, verb: str) -> None:
    """Raise `UserError` for a verb that reads and writes pictures only."""
    if tokenizer.frames > 1:
        raise UserError(f"{verb}: takes images, not clips of {tokenizer.frames} frames (the Python methods take clips)")
    if not is_plain(tokenizer):
        raise UserError(
            f"{verb}: takes 8-bit images with 1 or 3 channels; those of this tokenizer have {tokenizer.image_shape[0]} "
            f"channels of {type_name(tokenizer)} (the Python methods take arrays)"
        )


def type_name(tokenizer: Any) -> str:
    """Return the type of a tokenizer's values."""
    values = values_of(tokenizer)
    return "uint8" if values is None else values.dtype


# Reading


def is_array(payload: Payload) -> bool:
    """Whether an encoded image is a `.npy` or `.npz` file."""
    if isinstance(payload, Path):
        return payload.suffix.lower() in (".npy", ".npz")
    return isinstance(payload, bytes) and payload.startswith((NUMPY, ZIP))


def decode_array(payload: Single | Image.Image, shape: tuple[int, int, int], values: Values | None) -> Array:
    """Return an image of `shape` (C, H, W), resized and cropped at the centre: float32 in [-1, 1], or uint8 without
    `values`. Raises `ValueError` for another type or number of channels, and for values that are not finite."""
    channels, height, width = shape
    array = channels_first(read_array(payload, channels), channels)
    wanted, found = "uint8" if values is None else values.dtype, type_of(array.dtype)
    if found != wanted:
        raise ValueError(f"its values are {found}, not {wanted} (data.dtype)")
    if max(array.shape[1:]) > MAX_SIDE or array[0].size > MAX_PIXELS:
        raise ValueError(f"{array.shape[2]} x {array.shape[1]} pixels; the limit is {MAX_PIXELS} and {MAX_SIDE} a side")
    require_finite(array)
    array = fit_array(array, height, width)
    return array if values is None else values.to_unit(array)


def read_array(payload: Single | Image.Image, channels: int) -> Array:
    """Return the values of an encoded image as stored: (H, W), (H, W, C) or (C, H, W)."""
    if isinstance(payload, np.ndarray):
        return payload
    if isinstance(payload, Image.Image):
        return read_pages(payload, channels)
    data = read_file(payload) if isinstance(payload, Path) else payload
    if isinstance(data, bytes) and data.startswith(NUMPY):
        return read_npy(data)
    if isinstance(data, bytes) and data.startswith(ZIP):
        return read_npz(data)
    if isinstance(payload, Path) and is_array(payload):
        raise ValueError("not a file of NumPy's format")
    if data is None:
        raise ValueError(NO_IMAGE)
    return read_pages(open_image(data, deep=True), channels)


def read_npy(data: bytes) -> Array:
    """Parse a `.npy` file. Raises `ValueError` for objects, and for a file that is shorter than its header says."""
    file = io.BytesIO(data)
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which may hold code and is not read")
    if int(np.prod(shape, dtype=object)) * dtype.itemsize > len(data):
        raise ValueError(f"the file is too short for its array of shape {shape}")
    return np.load(io.BytesIO(data))  # objects are refused by default, too


def read_npz(data: bytes) -> Array:
    """Parse the first array of a `.npz` file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            if not names:
                raise ValueError("no array in this .npz file")
            with archive.open(names[0]) as file:
                content = file.read(MAX_FILE + 1)
    except zipfile.BadZipFile as error:
        raise ValueError(f"damaged .npz file: {error}") from error
    if len(content) > MAX_FILE:
        raise ValueError(f"larger than {MAX_FILE} bytes")
    return read_npy(content)


def read_pages(image: Image.Image, channels: int) -> Array:
    """Return an image's values, (H, W) or (H, W, C); the pages of a TIFF one after the other, as channels."""
    pages = [read_page(image)]
    while isinstance(image, TiffImageFile) and len(pages) <= channels:
        try:
            image.seek(len(pages))
        except EOFError:
            break
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"a page of {image.width} x {image.height} pixels; the limit is {MAX_PIXELS}")
        pages.append(read_page(image))
    if len({(page.shape, page.dtype) for page in pages}) > 1:
        raise ValueError("a TIFF whose pages differ in size or type")
    return pages[0] if len(pages) == 1 else np.concatenate([np.atleast_3d(page) for page in pages], axis=2)


def read_page(image: Image.Image) -> Array:
    """Return the values of an image's current page, upright, without conversion to 8 bits."""
    if image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        raise ValueError("a TIFF whose values go from white to black; convert it")
    halved = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if halved and image.mode not in DEEP_MODES:
        raise ValueError(
            "colours of 16 bits, which Pillow reads as 8; save them as .npy, or as a TIFF page per channel"
        )
    upright = ImageOps.exif_transpose(image)
    if image.mode in ("1", "P", "PA"):
        upright = upright.convert({"1": "L", "P": "RGB", "PA": "RGBA"}[image.mode])
    array = np.asarray(upright)
    return array.astype(np.uint16) if image.mode == "I" and image.format == "PNG" else array


def channels_first(array: Array, channels: int) -> Array:
    """Return an array (H, W), (H, W, C) or (C, H, W) as (C, H, W); C is the last axis if both would do."""
    if array.ndim == 2 and channels == 1 and array.size:
        return array[None]
    if array.ndim == 3 and array.size and channels in (array.shape[-1], array.shape[0]):
        return np.moveaxis(array, -1, 0) if array.shape[-1] == channels else array
    raise ValueError(f"shape {array.shape}; data.channels={channels} needs (H, W, {channels}) or ({channels}, H, W)")


def type_of(dtype: np.dtype[Any]) -> str:
    """Return `uint8`, `uint16`, `float32` for any float, or the name of another type."""
    return "float32" if dtype.kind == "f" else dtype.newbyteorder("=").name


def require_finite(array: Array) -> None:
    """Raise `ValueError` for NaN and infinities."""
    if array.dtype.kind == "f" and (count := int((~np.isfinite(array)).sum())):
        raise ValueError(f"{count:,} of {array.size:,} values are NaN or infinite")


def fit_array(array: Array, height: int, width: int) -> Array:
    """Resize and crop (C, H, W) as images are, each channel by itself: uint8, or else float32. An array of the right
    size is unchanged."""
    if array.shape[1:] == (height, width):
        return array
    planes = array if array.dtype == np.uint8 else array.astype(np.float32)
    return np.stack(
        [
            np.asarray(ImageOps.fit(Image.fromarray(plane), (width, height), Image.Resampling.LANCZOS))
            for plane in np.ascontiguousarray(planes)
        ]
    )


# Type and range of a data set


def guess_type(payload: Payload, channels: int) -> ValueType | None:
    """Return the type of an image, or of a clip, if it is more than 8 bits and not converted to 8, as grey PNG of 16
    bits is if RGB is wanted; None for 8 bits, and for what cannot be read."""
    try:
        if isinstance(payload, Window):
            array = np.asarray(payload.read(payload.start, True))
            found = "uint8" if channels == 3 and array.ndim == 2 else type_of(array.dtype)
        elif is_array(payload):
            found = type_of(read_array(payload, channels).dtype)
        elif isinstance(payload, Path) and payload.suffix.lower() in (".png", ".tif", ".tiff"):
            image = open_image(payload, deep=True)
            if image.mode not in DEEP_MODES or (channels == 3 and not getattr(image, "is_animated", False)):
                return None
            found = "float32" if image.mode == "F" else "uint16"
        else:
            return None
    except Exception:  # decoding reports it
        return None
    return {"uint16": "uint16", "float32": "float32"}.get(found)  # type: ignore[return-value]


def measure_range(payloads: Iterable[Payload], channels: int) -> tuple[float, float] | None:
    """Return the smallest and the largest finite value of the images or clips; None without any."""

    def bounds(payload: Payload) -> tuple[float, float] | None:
        try:
            array = read_values(payload, channels)
            require_finite(array)
            return float(array.min()), float(array.max())
        except Exception:  # decoding reports it
            return None

    with ThreadPoolExecutor(WORKERS) as pool:
        found = [pair for pair in pool.map(bounds, payloads) if pair is not None]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


def read_values(payload: Payload, channels: int) -> Array:
    """Return the values of an image (C, H, W), or of a clip's window (T, C, H, W)."""
    if not isinstance(payload, Window):
        return channels_first(read_array(payload, channels), channels)
    frames = range(payload.start, payload.start + payload.frames)
    return np.stack([channels_first(np.asarray(payload.read(frame, True)), channels) for frame in frames])


def clipped_share(payload: Payload, channels: int, values: Values) -> float:
    """Return the share of an image's values that lie beyond the range; 0 if it cannot be read."""
    try:
        array = read_values(payload, channels)
    except Exception:  # decoding reports it
        return 0.0
    return float(((array < values.low) | (array > values.high)).mean())
