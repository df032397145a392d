"""Decode image files to pixels: known formats of limited size, upright, on white, in one shape."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    TILELENGTH,
    TILEWIDTH,
    TiffImageFile,
)
from torch import Tensor
from tqdm import tqdm

from tokenizer.spec import ImageSpec

from ..config import is_first_process

WEB_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Formats that browsers show; uploads must have one of them."""
FORMATS = (*WEB_FORMATS, "TIFF", "PPM")
"""PPM is the family: PBM, PGM, PNM and PPM."""
MAX_PIXELS, MAX_SIDE = 64 * 2**20, 16_384
WHITE_IS_ZERO, SEPARATE = 0, 2  # values of PHOTOMETRIC_INTERPRETATION and PLANAR_CONFIGURATION
MAX_FILE = 256 << 20  # bytes of an encoded image
CHUNK = 64  # images that a thread reads and decodes at a time
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that read and decode, mostly without holding the GIL."""
IMAGE, LABEL = "image", "label"  # default columns
NO_IMAGE = "no image"
"""Why a row without an image cannot be decoded."""


@dataclass(frozen=True)
class Window:
    """Consecutive frames of a clip. `read(index, deep)` returns a frame of the clip: its values as stored if `deep`, or
    a picture, unless the clip is an array."""

    read: Callable[[int, bool], NDArray[Any] | Image.Image]
    start: int
    frames: int

    def frame(self, k: int) -> Window:
        """Return frame k of the window."""
        return Window(self.read, self.start + k, 1)


Single = bytes | Path | NDArray[Any] | str | None
"""An encoded image, its file, its pixels, or (a string) the reason why there is no image."""
Payload = Single | Window
Pixels = NDArray[Any]
"""uint8, or float32 in [-1, 1] for images with a declared or measured range of values."""


def hash_bytes(data: bytes) -> int:
    """Return a hash below 2^64."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def hash_names(names: Iterable[str]) -> NDArray[np.uint64]:
    """Return the hash of each name."""
    known: dict[str, int] = {}
    for name in (names := list(names)):
        if name not in known:
            known[name] = hash_bytes(unicodedata.normalize("NFC", name).encode("utf-8", "surrogatepass"))
    return np.fromiter((known[name] for name in names), np.uint64, len(names))


class Identity(NamedTuple):
    """What an image without a path, or a shard (by its path), is known by, and the function that returns a hash of it
    for every row."""

    by: Literal["column", "bytes", "pixels", "path"]
    hashes: Callable[[], NDArray[np.uint64]]


@dataclass(frozen=True)
class Rows:
    """One split of a source, still encoded. `read` returns the payloads of rows, `name` the name of a row for messages.
    `labels` are the source's own: indices into `class_names`, if it has class names. `paths` are those of image files,
    `table` is the data set of `datasets` with all columns. `objects` are those in the column `data.group`, and
    `identity` tells images without paths from one another."""

    size: int
    read: Callable[[Sequence[int]], list[Payload]]
    name: Callable[[int], str]
    labels: list[Any] | None
    class_names: list[str] | None = None
    paths: list[str] | None = None
    table: Any = None
    objects: list[str] | None = None
    identity: Identity | None = None


SplitRows = dict[str, Callable[[], Rows]]
"""The splits of a source by name; a call opens the split."""


class Unsupported(ValueError):
    """Pillow cannot read the values of an image, or not all of them."""


class BadImage(NamedTuple):
    """An image that cannot be decoded: its path or name, its row in the split, and the reason."""

    path: str
    row: int
    reason: str


@dataclass(frozen=True)
class Decoded:
    """The good images of a split (rows, and pixels (n, C, H, W) if held in memory) and the bad ones."""

    positions: NDArray[np.int64]
    pixels: Tensor | None
    bad: list[BadImage]


def decode_all(
    rows: Rows,
    positions: NDArray[np.int64],
    spec: ImageSpec,
    room: int,
    together: bool = False,
) -> Decoded:
    """Decode the images at `positions`; keep the pixels if they fit in `room` bytes, and list bad images.

    together: all processes call this with the same arguments. If pixels are not kept, each process checks a share.
    """
    keep = len(positions) * int(np.prod(spec.shape)) * spec.stored_type.itemsize <= room
    share = together and not keep and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    store = np.empty((len(positions) if keep else 0, *spec.shape), dtype=spec.stored_type)
    starts = range(rank * CHUNK, len(positions), world * CHUNK)
    chunks = [positions[start : start + CHUNK].tolist() for start in starts]
    found: list[tuple[int, BadImage]] = []
    hidden = not sys.stderr.isatty() or not is_first_process()
    bar = tqdm(total=sum(map(len, chunks)), desc="checking images", unit="image", leave=False, disable=hidden)
    with bar, ThreadPoolExecutor(WORKERS) as pool:
        for start, images in zip(starts, pool.map(lambda chunk: decode_rows(rows, spec, chunk), chunks), strict=True):
            for k, image in enumerate(images, start=start):
                if isinstance(image, str):
                    row = int(positions[k])
                    found.append((k, BadImage(rows.name(row), row, image)))
                elif keep:
                    store[k] = image
            bar.update(len(images))
    if share:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, found)
        found = sorted(chain.from_iterable(parts))
    good = np.ones(len(positions), dtype=bool)
    good[[k for k, _ in found]] = False
    if found and keep:
        store = store[good]
    return Decoded(positions[good], torch.from_numpy(store) if keep else None, [bad for _, bad in found])


def decode_rows(rows: Rows, spec: ImageSpec, indices: list[int]) -> list[Pixels | str]:
    """Return the pixels `spec.shape` of each row, or the reason why it cannot be decoded."""
    return [try_decode(payload, spec) for payload in rows.read(indices)]


def decode_in_threads(payloads: Sequence[Payload], spec: ImageSpec) -> list[Pixels | str]:
    """Return the pixels `spec.shape` of each encoded image, or the reason why it cannot be decoded."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(partial(try_decode, spec=spec), payloads))


def try_decode(payload: Payload, spec: ImageSpec, formats: tuple[str, ...] = FORMATS) -> Pixels | str:
    """Return the pixels `spec.shape`, or the reason why the image cannot be decoded."""
    try:
        return decode(payload, spec, formats)
    except Exception as error:  # Pillow raises almost anything for damaged files
        return str(error) or type(error).__name__


def try_decode_whole(payload: Payload, spec: ImageSpec, least: tuple[int, int] = (1, 1)) -> Pixels | str:
    """Return the pixels (C, H, W) of an image at its own size, or the reason why it cannot be decoded. An image with a
    side below `least` (height, width) is enlarged until it has both."""
    from .arrays import decode_whole_array

    try:
        if isinstance(payload, Window):
            raise ValueError("a clip, which is not cut into tiles")
        image = open_plain(payload, spec, FORMATS)
        if image is None:
            return decode_whole_array(payload, spec, least)
        return whole_pixels(image, spec.channels, least)
    except Exception as error:  # as in `try_decode`
        return str(error) or type(error).__name__


def decode(payload: Payload, spec: ImageSpec, formats: tuple[str, ...] = FORMATS) -> Pixels:
    """Return the pixels `spec.shape` of an image or a clip."""
    from .arrays import decode_array
    from .clip_files import decode_window

    if isinstance(payload, Window):
        return decode_window(payload, spec)
    image = open_plain(payload, spec, formats)
    return decode_array(payload, spec) if image is None else pixels_of(image, spec)


def open_plain(payload: Single, spec: ImageSpec, formats: tuple[str, ...]) -> Image.Image | None:
    """Open an image that becomes 8-bit grey or RGB; return None for what is read as an array, in all `FORMATS`."""
    from .arrays import is_array

    if formats == FORMATS and (not spec.is_picture or is_array(payload)):
        return None
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


def pixels_of(image: Image.Image, spec: ImageSpec) -> Pixels:
    """Return pixels (C, H, W): the first frame, upright, on white, resized and cropped at the centre."""
    image = to_mode(image, spec.channels)
    if image.size != (spec.width, spec.height):
        image = ImageOps.fit(image, (spec.width, spec.height), Image.Resampling.LANCZOS)
    return channels_first(image)


def whole_pixels(image: Image.Image, channels: int, least: tuple[int, int] = (1, 1)) -> Pixels:
    """Return pixels (C, H, W) of the whole image at its own size: the first frame, upright, on white. An image with a
    side below `least` (height, width) is enlarged until it has both."""
    image = to_mode(image, channels)
    height, width = enlarged_size((image.height, image.width), least)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return channels_first(image)


def enlarged_size(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (height, width) of these proportions that is at least `least` and at least `size`."""
    scale = max(least[0] / size[0], least[1] / size[1])
    return size if scale <= 1 else (max(least[0], round(size[0] * scale)), max(least[1], round(size[1] * scale)))


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Return the first frame of an image, upright, on white, in grey or RGB. Raises `ValueError` for an empty image."""
    if not (image.width and image.height):
        raise ValueError(f"{image.width} x {image.height} pixels: the image is empty")
    return flatten(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")


def channels_first(image: Image.Image) -> Pixels:
    """Return the pixels (C, H, W) of a grey or RGB image."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def read_file(path: Path) -> bytes:
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
    data = read_file(payload) if isinstance(payload, Path) else payload
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
    width, height = image.size  # from the header: a file of 20 kB can claim 1 GB of pixels
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels; the limit is {MAX_PIXELS} and {MAX_SIDE} per side")
    if image.format == "PPM" and image.mode not in ("1", "L", "I", "RGB"):  # floats, and inventions of Pillow
        raise ValueError(f"a PPM of mode {image.mode}, not black and white, grey or RGB; convert it to PNG")
    if isinstance(image, TiffImageFile):
        require_small_tiles(image)
        if not deep:
            require_plain_tiff(image)
    return image


def require_plain_tiff(image: TiffImageFile) -> None:
    """Raise `ValueError` for a TIFF with several pages, and like `require_plain_page`."""
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


def require_small_tiles(image: TiffImageFile) -> None:
    """Raise `ValueError` for a TIFF with tiles too large to decode."""
    width, height = (int(image.tag_v2.get(side, 0)) for side in (TILEWIDTH, TILELENGTH))
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"tiles of {width} x {height}; the limit is {MAX_PIXELS} pixels in total and {MAX_SIDE} per side"
        )


def flatten(image: Image.Image) -> Image.Image:
    """Return the image with 8 bits per channel and no transparency: scale 16-bit grey, composite alpha on white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        if isinstance(clear := image.info.get("transparency"), int):  # one grey level of a PNG is transparent
            values = np.where(values == clear, 65535, values)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "LAB":
        return image.convert("RGB")  # the only conversion of LAB that Pillow supports
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image
