"""Images of more than 8 bits or with other than 1 or 3 channels: NumPy arrays, 16-bit PNG, and TIFF.

Their values keep their type while they are read, resized and cropped; then `ImageSpec` maps their range to [-1, 1].
"""

from __future__ import annotations

import io
import logging
import math
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, get_args

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLESPERPIXEL, TiffImageFile

from tokenizer.spec import Array, ImageSpec, ValueType, name_type, require_finite

from ..config import UserError
from .decoding import (
    CHUNK,
    MAX_FILE,
    MAX_PIXELS,
    MAX_SIDE,
    NO_IMAGE,
    WHITE_IS_ZERO,
    WORKERS,
    Payload,
    Rows,
    Single,
    Unsupported,
    Window,
    enlarged_size,
    open_image,
    read_file,
)

NUMPY, ZIP = b"\x93NUMPY", b"PK"
"""The first bytes of `.npy` and `.npz` files."""
PNG, TIFF = b"\x89PNG", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PARSING = Lock()
"""Held while the header of an array is parsed, because Python 3.11 may fail if two threads parse at once."""
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
COLOURS = (1, 2, 5)
"""Values of PHOTOMETRIC_INTERPRETATION that are read as they are: grey, RGB, and inks."""
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # it prints lines about damaged files


# Reading


def is_array(payload: Payload) -> bool:
    """Whether an encoded image is a `.npy` or `.npz` file, or an array other than 8-bit grey."""
    if isinstance(payload, np.ndarray):
        return payload.ndim != 2 or payload.dtype != np.uint8
    if isinstance(payload, Path):
        return payload.suffix.lower() in (".npy", ".npz")
    return isinstance(payload, bytes) and payload.startswith((NUMPY, ZIP))


def decode_array(payload: Single | Image.Image, spec: ImageSpec) -> Array:
    """Return an image, or a frame, (C, H, W), resized and cropped at the centre: uint8 levels or float32 in [-1, 1].
    Raises `ValueError` for another type or number of channels, and for values that are not finite."""
    array = fit_array(read_values(payload, spec), *spec.size)
    return array if spec.is_bytes else spec.scale(array)


def decode_whole_array(payload: Single | Image.Image, spec: ImageSpec, least: tuple[int, int] = (1, 1)) -> Array:
    """Like `decode_array`, but at the image's own size; an image with a side below `least` (height, width) is enlarged
    until it has both."""
    array = read_values(payload, spec)
    array = fit_array(array, *enlarged_size((array.shape[1], array.shape[2]), least))
    return array if spec.is_bytes else spec.scale(array)


def read_values(payload: Single | Image.Image, spec: ImageSpec) -> Array:
    """Return the values (C, H, W) of an image as stored. Raises `ValueError` as `decode_array` does."""
    array = channels_first(read_array(payload, spec.channels), spec.channels)
    found = name_type(array.dtype)
    if found not in get_args(ValueType):
        raise ValueError(f"its values are {found}; convert them to uint8, uint16 or floats")
    if found != spec.dtype:
        raise ValueError(f"its values are {found}, not {spec.dtype} (data.dtype)")
    if max(array.shape[1:]) > MAX_SIDE or array[0].size > MAX_PIXELS:
        raise ValueError(f"{array.shape[2]} x {array.shape[1]} pixels; the limit is {MAX_PIXELS} and {MAX_SIDE} a side")
    require_finite(array)
    return array


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
    try:
        return read_pages(open_image(data, deep=True), channels)
    except Unsupported:
        if isinstance(data, bytes) and data.startswith(PNG):
            return read_png(data)
        if isinstance(data, bytes) and data.startswith(TIFF):
            return read_tiff(data, channels)
        raise


def read_npy(data: bytes) -> Array:
    """Parse a `.npy` file. Raises `ValueError` for objects, and for a file that is shorter than its header says."""
    file = io.BytesIO(data)
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    with PARSING:
        shape, by_column, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which may hold code and is not read")
    if (count := int(np.prod(shape, dtype=object))) * dtype.itemsize > len(data) - file.tell():
        raise ValueError(f"the file is too short for its array of shape {shape}")
    values = np.frombuffer(data, dtype, count, file.tell())
    return values.reshape(shape, order="F" if by_column else "C").copy()


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
    return join_pages(pages)


def join_pages(pages: list[Array]) -> Array:
    """Return the pages of a TIFF as channels of one array. Raises `ValueError` if they differ."""
    if len({(page.shape, page.dtype) for page in pages}) > 1:
        raise ValueError("a TIFF whose pages differ in size or type")
    return pages[0] if len(pages) == 1 else np.concatenate([np.atleast_3d(page) for page in pages], axis=2)


def read_png(data: bytes) -> Array:
    """Return the values (H, W, C) of a PNG of 16-bit colours."""
    import torch
    from torchvision.io import decode_png

    found = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), apply_exif_orientation=True)
    return np.moveaxis(found.numpy(), 0, -1)


def read_tiff(data: bytes, channels: int) -> Array:
    """Return the values of a TIFF, (H, W) or (H, W, C), as `read_pages` does, with the package tifffile. Raises
    `UserError` without it, and `ValueError` for more than `channels` of them or a limit exceeded."""
    if find_spec("tifffile") is None:
        raise UserError('a TIFF that Pillow cannot read; the package tifffile may: pip install "smalti[tiff]"')
    import tifffile

    pages, count = list[Array](), 0
    with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:
        every: Any = file.pages  # TiffPage, as keyframes are not used
        for page in every:
            count += page.samplesperpixel * page.imagedepth
            if count > channels:
                raise ValueError(f"a TIFF of {count} or more channels, not {channels} (data.channels)")
            width, height = max(page.imagewidth, page.tilewidth), max(page.imagelength, page.tilelength)
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise ValueError(f"{width} x {height} pixels; the limit is {MAX_PIXELS} and {MAX_SIDE} a side")
            if page.photometric not in COLOURS or page.tags.valueof("Orientation", default=1) != 1:
                raise ValueError("a TIFF that is rotated, or whose values are not grey, RGB or inks; convert it")
            sizes = page.databytecounts
            if len(sizes) < math.prod(page.chunked) or 0 in sizes:  # tifffile would fill in zeros
                raise ValueError("a TIFF of which a part is missing")
            array = page.asarray()
            pages.append(np.moveaxis(array, 0, -1) if page.axes == "SYX" else array)
    if not pages:
        raise ValueError("a TIFF without pages")
    return join_pages(pages)


def read_page(image: Image.Image) -> Array:
    """Return the values of an image's current page, upright, without conversion to 8 bits. Raises `Unsupported` if
    Pillow does not read them all."""
    if image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        raise ValueError("a TIFF whose values go from white to black; convert it")
    if is_reduced(image):
        if image.format == "PNG":
            image.load()  # which reports damage in plainer words than torchvision
        raise Unsupported("colours of 16 bits, or more channels than Pillow reads; save them as .npy")
    upright = ImageOps.exif_transpose(image)
    if image.mode in ("1", "P", "PA"):
        upright = upright.convert({"1": "L", "P": "RGB", "PA": "RGBA"}[image.mode])
    array = np.asarray(upright)
    return array.astype(np.uint16) if image.mode == "I" and image.format in ("PNG", "PPM") else array


def is_reduced(image: Image.Image) -> bool:
    """Whether Pillow reads the values of an opened image as 8 bits although they have more, or only some channels."""
    deep = image.mode in DEEP_MODES
    if isinstance(image, TiffImageFile):
        samples, bits = image.tag_v2.get(SAMPLESPERPIXEL, 1), max(image.tag_v2.get(BITSPERSAMPLE, (1,)))
        return samples > len(image.getbands()) or (bits > 8 and not deep)
    return not deep and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def channels_first(array: Array, channels: int) -> Array:
    """Return an array (H, W), (H, W, C) or (C, H, W) as (C, H, W); C is the last axis if both would do."""
    if array.ndim == 2 and channels == 1 and array.size:
        return array[None]
    if array.ndim == 3 and array.size and channels in (array.shape[-1], array.shape[0]):
        return np.moveaxis(array, -1, 0) if array.shape[-1] == channels else array
    raise ValueError(f"shape {array.shape}; data.channels={channels} needs (H, W, {channels}) or ({channels}, H, W)")


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
    bits is if RGB is wanted; None for 8 bits, and for what cannot be read. Raises `UserError` if that takes another
    package."""
    try:
        if isinstance(payload, Window):
            array = np.asarray(payload.read(payload.start, True))
            found = "uint8" if channels == 3 and array.ndim == 2 else name_type(array.dtype)
        else:
            array = read_array(payload, channels)
            found = name_type((array if is_array(payload) else channels_first(array, channels)).dtype)
    except UserError as error:
        raise UserError(f"data.dtype: the first training image: {error}; data.dtype=uint8 reads 8 bits") from error
    except Exception:  # decoding reports it
        return None
    return found if found in ("uint16", "float32") else None  # type: ignore[return-value]


def measure_range(
    rows: Rows, positions: NDArray[np.int64], channels: int, dtype: ValueType
) -> tuple[float, float] | None:
    """Return the smallest and the largest value of the images or clips at `positions` that have this type; None without
    any."""

    def bounds(chunk: list[int]) -> list[tuple[float, float]]:
        arrays = (good_values(payload, channels, dtype) for payload in rows.read(chunk))
        return [(float(array.min()), float(array.max())) for array in arrays if array is not None]

    chunks = [positions[start : start + CHUNK].tolist() for start in range(0, len(positions), CHUNK)]
    with ThreadPoolExecutor(WORKERS) as pool:
        found = [pair for pairs in pool.map(bounds, chunks) for pair in pairs]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


def stored_values(payload: Payload, channels: int) -> Array:
    """Return the values of an image (C, H, W), or of a clip's window (T, C, H, W)."""
    if not isinstance(payload, Window):
        return channels_first(read_array(payload, channels), channels)
    frames = range(payload.start, payload.start + payload.frames)
    return np.stack([channels_first(np.asarray(payload.read(frame, True)), channels) for frame in frames])


def clipped_share(payload: Payload, spec: ImageSpec) -> float:
    """Return the share of an image's values that lie beyond the range; 0 if it cannot be read."""
    array = good_values(payload, spec.channels, spec.dtype)
    return 0.0 if array is None else float(((array < spec.low) | (array > spec.high)).mean())


def good_values(payload: Payload, channels: int, dtype: ValueType) -> Array | None:
    """Return an image's values (C, H, W); None for another type, NaN, and what cannot be read."""
    try:
        array = stored_values(payload, channels)
        require_finite(array)
    except Exception:  # decoding reports it
        return None
    return array if name_type(array.dtype) == dtype else None
