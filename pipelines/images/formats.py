"""Decode images and frames to pixels: known formats of limited size, upright, on white, resized and cropped.

An image of 8 bits with 1 or 3 channels is a picture, which Pillow reads and converts to grey or RGB. All others are
arrays of the values as stored: NumPy's files, 16-bit PNG, and TIFF. Values keep their type while they are read, resized
and cropped; then `ImageSpec` maps their range to [-1, 1].
"""

from __future__ import annotations

import io
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, get_args

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLESPERPIXEL,
    TiffImageFile,
)

from tokenizer.spec import Array, ImageSpec, ValueType, name_type, require_finite

from ..config import UserError

WEB_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # formats that browsers show; uploads must have one of them
FORMATS = (*WEB_FORMATS, "TIFF", "PPM")  # PPM is the family: PBM, PGM, PNM and PPM
MAX_PIXELS, MAX_SIDE = 64 * 2**20, 16_384
MAX_FILE = 256 << 20  # bytes of an encoded image
CHUNK = 64  # images that a thread reads and decodes at a time
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that read and decode, mostly without holding the GIL."""
NO_IMAGE = "no image"  # why a row without an image cannot be decoded
NUMPY, ZIP = b"\x93NUMPY", b"PK"  # the first bytes of `.npy` and `.npz` files
PNG, TIFF = b"\x89PNG", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PARSING = Lock()  # held while an array is parsed, because Python 3.11 may fail if two threads parse headers at once
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
WHITE_IS_ZERO, SEPARATE = 0, 2  # values of PHOTOMETRIC_INTERPRETATION and PLANAR_CONFIGURATION
COLOURS = (1, 2, 5)  # values of PHOTOMETRIC_INTERPRETATION that are read as they are: grey, RGB, and inks
OWN_SIZE = (1, 1)  # as `least`: images stay at their own size
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # it prints lines about damaged files

Single = bytes | Path | Array | str | None
"""An encoded image, its file, its pixels, or (a string) the reason why there is no image."""
PixelArray = Array  # uint8, or float32 in [-1, 1] for images with a declared or measured range of values


class Unsupported(ValueError):
    """Pillow cannot read the values of an image, or not all of them."""


@dataclass(frozen=True)
class ClipWindow:
    """Consecutive frames of a clip. `read(index, deep)` returns a frame of the clip: its values as stored if `deep`, or
    an upright picture, unless the clip is an array."""

    read: Callable[[int, bool], Array | Image.Image]
    start: int
    frames: int

    def frame(self, k: int) -> ClipWindow:
        return ClipWindow(self.read, self.start + k, 1)

    def values(self) -> Iterator[Array]:
        return (np.asarray(self.read(index, True)) for index in range(self.start, self.start + self.frames))

    def decode(self, spec: ImageSpec) -> PixelArray:
        """Return the frames in one array `spec.shape`, each resized and cropped as images are. Raises `ValueError`,
        which names the frame."""
        parts, deep = [], not spec.is_picture
        for index in range(self.start, self.start + self.frames):
            try:
                frame = self.read(index, deep)
                if isinstance(frame, Image.Image):
                    parts.append(decode_picture(frame, spec))
                else:
                    parts.append(decode_array(frame, spec))
            except Exception as error:  # Pillow raises almost anything for damaged files
                raise ValueError(f"frame {index}: {str(error) or type(error).__name__}") from error
        return np.stack(parts).reshape(spec.shape)


Payload = Single | ClipWindow


# From payloads to pixels


def try_decode(
    payload: Payload, spec: ImageSpec, formats: tuple[str, ...] = FORMATS, *, least: tuple[int, int] | None = None
) -> PixelArray | str:
    try:
        return decode_image(payload, spec, formats, least=least)
    except Exception as error:  # Pillow raises almost anything for damaged files
        return str(error) or type(error).__name__


def decode_in_threads(payloads: Sequence[Payload], spec: ImageSpec) -> list[PixelArray | str]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(partial(try_decode, spec=spec), payloads))


def decode_image(
    payload: Payload | Image.Image,
    spec: ImageSpec,
    formats: tuple[str, ...] = FORMATS,
    *,
    least: tuple[int, int] | None = None,
) -> PixelArray:
    """Return the pixels `spec.shape` of an image or a clip: resized and cropped at the centre, upright, on white, the
    first frame of an animation.

    least: return an image (C, H, W) at its own size instead, enlarged until its sides (height, width) are at least
    these. Raises `ValueError` for a wrong type, number of channels or size, and for values that are not finite, and
    whatever Pillow raises for damaged files."""
    if isinstance(payload, ClipWindow):
        if least is not None:
            raise ValueError("a clip, which is not cut into tiles")
        return payload.decode(spec)
    if (picture := open_picture(payload, spec, formats)) is not None:
        return decode_picture(ImageOps.exif_transpose(picture), spec, least)
    return decode_array(payload, spec, least)


def open_picture(payload: Single | Image.Image, spec: ImageSpec, formats: tuple[str, ...]) -> Image.Image | None:
    """Open an image that becomes an 8-bit picture; return None for what is read as an array, in all `FORMATS`."""
    if formats == FORMATS and (not spec.is_picture or is_array(payload)):
        return None
    if isinstance(payload, Image.Image):
        return payload
    if isinstance(payload, np.ndarray):
        return Image.fromarray(payload)
    try:
        image = open_image(payload, formats, deep=True)
    except Unsupported:
        if formats == FORMATS:
            return None
        raise
    if isinstance(image, TiffImageFile):
        if spec.channels > 1 and getattr(image, "n_frames", 1) == spec.channels:
            return None
        require_plain_tiff(image)
    return image


def decode_picture(image: Image.Image, spec: ImageSpec, least: tuple[int, int] | None = None) -> PixelArray:
    """Return the pixels (C, H, W) of an upright picture in the mode of `spec`; see `decode_image`. Raises `ValueError`
    for an empty one."""
    if not (image.width and image.height):
        raise ValueError(f"{image.width} x {image.height} pixels: the image is empty")
    image = flatten(image, opaque=not spec.alpha).convert(spec.mode)
    height, width = spec.size if least is None else enlarged_size((image.height, image.width), least)
    if image.size != (width, height):
        resize = ImageOps.fit if least is None else Image.Image.resize
        image = resize(image, (width, height), Image.Resampling.LANCZOS)
    return channels_first(np.asarray(image), spec.channels)


def decode_array(payload: Single | Image.Image, spec: ImageSpec, least: tuple[int, int] | None = None) -> PixelArray:
    """Return the values (C, H, W) of an image or a frame, each channel resized by itself; see `decode_image`."""
    array = read_values(payload, spec)
    size = spec.size if least is None else enlarged_size((array.shape[1], array.shape[2]), least)
    array = fit_array(array, *size)
    return array if spec.is_bytes else spec.scale(array)


def enlarged_size(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (height, width) of these proportions that is at least `least` and at least `size`."""
    scale = max(least[0] / size[0], least[1] / size[1])
    return size if scale <= 1 else (max(least[0], round(size[0] * scale)), max(least[1], round(size[1] * scale)))


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


def channels_first(array: Array, channels: int) -> Array:
    """Return an array (H, W), (H, W, C) or (C, H, W) as (C, H, W); C is the last axis if both would do."""
    if array.ndim == 2 and channels == 1 and array.size:
        return array[None]
    if array.ndim == 3 and array.size and channels in (array.shape[-1], array.shape[0]):
        return array.transpose(2, 0, 1) if array.shape[-1] == channels else array
    raise ValueError(f"shape {array.shape}; data.channels={channels} needs (H, W, {channels}) or ({channels}, H, W)")


def flatten(image: Image.Image, *, opaque: bool = True) -> Image.Image:
    """Return the image with 8 bits per channel: scale 16-bit grey, put transparency on white. opaque: False keeps
    transparency as RGBA."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        if isinstance(clear := image.info.get("transparency"), int):  # one grey level of a PNG is transparent
            values = np.where(values == clear, 65535, values)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "LAB":
        return image.convert("RGB")  # the only conversion of LAB that Pillow supports
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB") if opaque else image
    return image


# Opening pictures


def read_image_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises `ValueError` if it is missing, unreadable, too large, or not a regular file
    (reading a pipe may never end)."""
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            if found.st_size > MAX_FILE:
                raise ValueError(f"larger than {MAX_FILE} bytes")
            return path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    raise ValueError("missing, or not a regular file")


def open_image(
    payload: bytes | Path | str | None, formats: tuple[str, ...] = FORMATS, *, deep: bool = False
) -> Image.Image:
    """Open an image of a known format and limited size. deep: also a TIFF with several pages or of another depth.
    Raises `ValueError`, and whatever Pillow raises."""
    data = read_image_file(payload) if isinstance(payload, Path) else payload
    if isinstance(data, str):
        raise ValueError(data)
    if not data:
        raise ValueError(NO_IMAGE if data is None else "the file is empty")
    if len(data) > MAX_FILE:
        raise ValueError(f"larger than {MAX_FILE} bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except (Image.UnidentifiedImageError, KeyError):  # the message contains a memory address, or a number
        raise Unsupported(f"not an image in one of the formats {', '.join(formats)}") from None
    check_pixel_count(*image.size)  # from the header: a file of 20 kB can claim 1 GB of pixels
    if image.format == "PPM" and image.mode not in ("1", "L", "I", "RGB"):  # floats, and inventions of Pillow
        raise ValueError(f"a PPM of mode {image.mode}, not black and white, grey or RGB; convert it to PNG")
    if isinstance(image, TiffImageFile) and not deep:
        require_plain_tiff(image)
    return image


def check_pixel_count(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels; the limit is {MAX_PIXELS} and {MAX_SIDE} per side")


def require_plain_tiff(image: TiffImageFile) -> None:
    if getattr(image, "is_animated", False):
        raise ValueError("a TIFF with several pages; save each page as a separate file, or set data.channels")
    require_plain_page(image)


def require_plain_page(image: TiffImageFile) -> None:
    """Raise `ValueError` for a TIFF whose values have no fixed black and white: 12 or 32 bits, signed values, floats;
    and for planes of 16 bits, which Pillow reads as noise."""
    bits = {int(depth) for depth in image.tag_v2.get(BITSPERSAMPLE, (1,))}
    inverted = image.mode.startswith("I;16") and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    planes = len(image.getbands()) > 1 and image.tag_v2.get(PLANAR_CONFIGURATION) == SEPARATE and 16 in bits
    if image.mode in ("I", "F") or not bits <= {1, 2, 4, 8, 16} or inverted or planes:
        raise ValueError("a TIFF whose values are not 8 or 16 bits from black to white; convert it to PNG")


# Reading arrays


def is_array(payload: Payload | Image.Image) -> bool:
    """Whether an encoded image is a `.npy` or `.npz` file, or an array other than 8-bit grey."""
    if isinstance(payload, np.ndarray):
        return payload.ndim != 2 or payload.dtype != np.uint8
    if isinstance(payload, Path):
        return payload.suffix.lower() in (".npy", ".npz")
    return isinstance(payload, bytes) and payload.startswith((NUMPY, ZIP))


def read_values(payload: Single | Image.Image, spec: ImageSpec) -> Array:
    """Return the values (C, H, W) of an image as stored. Raises `ValueError` as `decode_array` does."""
    array = channels_first(read_array(payload, spec.channels), spec.channels)
    found = name_type(array.dtype)
    if found not in get_args(ValueType):
        raise ValueError(f"its values are {found}; convert them to uint8, uint16 or floats")
    if found != spec.dtype:
        raise ValueError(f"its values are {found}, not {spec.dtype} (data.dtype)")
    check_pixel_count(array.shape[2], array.shape[1])
    require_finite(array)
    return array


def read_array(payload: Single | Image.Image, channels: int) -> Array:
    """Return the values of an encoded image as stored: (H, W), (H, W, C) or (C, H, W)."""
    if isinstance(payload, np.ndarray):
        return payload
    if isinstance(payload, Image.Image):
        return read_pages(payload, channels)
    data = read_image_file(payload) if isinstance(payload, Path) else payload
    if isinstance(data, bytes) and data.startswith((NUMPY, ZIP)):
        return read_numpy(data)
    if isinstance(payload, Path) and is_array(payload):
        raise ValueError("not a file of NumPy's format")
    if data is None:
        raise ValueError(NO_IMAGE)
    try:
        return read_pages(open_image(data, deep=True), channels)
    except Unsupported:
        if isinstance(data, bytes) and data.startswith(PNG):  # of 16-bit colours
            import torch
            from torchvision.io import decode_png

            found = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), apply_exif_orientation=True)
            return np.moveaxis(found.numpy(), 0, -1)
        if isinstance(data, bytes) and data.startswith(TIFF):
            return read_tiff(data, channels)
        raise


def read_numpy(data: bytes) -> Array:
    """Parse a `.npy` file, or the first array of a `.npz`. Raises `ValueError` for objects, which may hold code."""
    with PARSING:
        found = np.load(io.BytesIO(data))
        if isinstance(found, np.ndarray):
            return found
        if not found.files:
            raise ValueError("no array in this .npz file")
        return np.asarray(found[found.files[0]])


def read_pages(image: Image.Image, channels: int) -> Array:
    """Return an image's values, (H, W) or (H, W, C); the pages of a TIFF one after the other, as channels."""
    pages = [read_page(image)]
    while isinstance(image, TiffImageFile) and len(pages) <= channels:
        try:
            image.seek(len(pages))
        except EOFError:
            break
        check_pixel_count(*image.size)
        pages.append(read_page(image))
    return join_pages(pages)


def join_pages(pages: list[Array]) -> Array:
    if len({(page.shape, page.dtype) for page in pages}) > 1:
        raise ValueError("a TIFF whose pages differ in size or type")
    return pages[0] if len(pages) == 1 else np.concatenate([np.atleast_3d(page) for page in pages], axis=2)


def read_tiff(data: bytes, channels: int) -> Array:
    """Return the values of a TIFF that Pillow does not read, (H, W) or (H, W, C), as `read_pages` does. Raises
    `UserError` if that takes another package, and `ValueError` for more than `channels` of them or a limit exceeded."""
    import tifffile  # imported here, because few images need it

    pages, count = list[Array](), 0
    with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:
        every: Any = file.pages  # TiffPage, as keyframes are not used
        for page in every:
            count += page.samplesperpixel * page.imagedepth
            if count > channels:
                raise ValueError(f"a TIFF of {count} or more channels, not {channels} (data.channels)")
            check_pixel_count(max(page.imagewidth, page.tilewidth), max(page.imagelength, page.tilelength))
            if page.photometric not in COLOURS or page.tags.valueof("Orientation", default=1) != 1:
                raise ValueError("a TIFF that is rotated, or whose values are not grey, RGB or inks; convert it")
            sizes = page.databytecounts
            if len(sizes) < math.prod(page.chunked) or 0 in sizes:  # tifffile would fill in zeros
                raise ValueError("a TIFF of which a part is missing")
            try:
                array = page.asarray()
            except (ImportError, ValueError) as error:
                if isinstance(error, ValueError) and "imagecodecs" not in str(error):
                    raise
                codec = getattr(page.compression, "name", page.compression)
                message = f'a TIFF whose compression ({codec}) needs codecs: pip install "smalti[tiff]"'
                raise UserError(message) from error
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


# Type and range of a data set


def guess_type(payload: Payload, channels: int) -> ValueType | None:
    """Return the type of an image, or of a clip, if it is more than 8 bits and not converted to 8, as grey PNG of 16
    bits is if RGB is wanted; None for 8 bits, and for what cannot be read. Raises `UserError` if that takes another
    package."""
    try:
        if isinstance(payload, ClipWindow):
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


def good_values(payload: Payload, channels: int, dtype: ValueType) -> Array | None:
    """Return the values of an image or a window, (frames, C, H, W); None for another type, NaN, and what cannot be
    read."""
    try:
        frames = payload.values() if isinstance(payload, ClipWindow) else [read_array(payload, channels)]
        array = np.stack([channels_first(frame, channels) for frame in frames])
        require_finite(array)
    except Exception:  # decoding reports it
        return None
    return array if name_type(array.dtype) == dtype else None
