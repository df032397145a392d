"""Decodes image files to pixels: known formats of a reasonable size, upright, on white, in one shape."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    TILELENGTH,
    TILEWIDTH,
    TiffImageFile,
)
from torch import Tensor
from tqdm import tqdm

from ..config import is_first_process

WEB_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What browsers show; nothing else is read of what somebody uploads."""
FORMATS = (*WEB_FORMATS, "TIFF")
MAX_PIXELS, MAX_SIDE = 64 * 2**20, 16_384
WHITE_IS_ZERO = 0  # of PHOTOMETRIC_INTERPRETATION
MAX_FILE = 256 << 20  # bytes of an encoded image
CHUNK = 64  # images that one thread reads and decodes at a time
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Number of threads that read and decode; most of that work does not hold Python's lock."""
IMAGE, LABEL = "image", "label"  # the usual columns

Shape = tuple[int, int, int]
Payload = bytes | Path | NDArray[np.uint8] | str | None
"""An encoded image, the file of one, pixels, or (a string) the reason why there is no image."""
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Rows:
    """One split as its source gives it, still encoded. `read` returns what there is of each requested row, `name` what
    messages call a row; `labels` are as in the source, numbers of `class_names` if there are any."""

    size: int
    read: Callable[[Sequence[int]], list[Payload]]
    name: Callable[[int], str]
    labels: list[Any] | None
    class_names: list[str] | None = None


SplitRows = dict[str, Callable[[], Rows]]
"""The splits of a source by name; calling one opens it."""


class BadImage(NamedTuple):
    """An image that cannot be decoded: its path or what messages call it, its row in the split, and the reason."""

    path: str
    row: int
    reason: str


@dataclass(frozen=True)
class Decoded:
    """The good images of one split: their rows, and their pixels (n, C, H, W) if kept in memory; and the bad ones."""

    positions: NDArray[np.int64]
    pixels: Tensor | None
    bad: list[BadImage]


def decode_all(rows: Rows, positions: NDArray[np.int64], shape: Shape, room: int, together: bool = False) -> Decoded:
    """Decode the images at `positions`; keep the pixels if they fit in `room` bytes, and list the bad ones.

    together: all processes of a group are here with the same arguments. If pixels are not kept, each checks its share.
    """
    keep = len(positions) * int(np.prod(shape)) <= room
    share = together and not keep and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    store = np.empty((len(positions) if keep else 0, *shape), dtype=np.uint8)
    starts = range(rank * CHUNK, len(positions), world * CHUNK)
    chunks = [positions[start : start + CHUNK].tolist() for start in starts]
    found: list[tuple[int, BadImage]] = []
    hidden = not sys.stderr.isatty() or not is_first_process()
    bar = tqdm(total=sum(map(len, chunks)), desc="checking images", unit="image", leave=False, disable=hidden)
    with bar, ThreadPoolExecutor(WORKERS) as pool:
        for start, images in zip(starts, pool.map(partial(decode_rows, rows, shape), chunks), strict=True):
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


def decode_rows(rows: Rows, shape: Shape, indices: list[int]) -> list[Pixels | str]:
    """Return the pixels (C, H, W) of each of these rows, or the reason why there are none."""
    return [try_decode(payload, shape) for payload in rows.read(indices)]


def decode_in_threads(payloads: Sequence[Payload], shape: Shape) -> list[Pixels | str]:
    """Return the pixels (C, H, W) of each encoded image, or the reason why there are none."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(partial(try_decode, shape=shape), payloads))


def try_decode(payload: Payload, shape: Shape, formats: tuple[str, ...] = FORMATS) -> Pixels | str:
    """Return the pixels (C, H, W), or the reason why there are none."""
    try:
        return decode(payload, shape, formats)
    except Exception as error:  # damaged files make Pillow raise almost anything, and each is one bad image
        return str(error) or type(error).__name__


def decode(payload: Payload, shape: Shape, formats: tuple[str, ...] = FORMATS) -> Pixels:
    """Return the pixels (C, H, W) of an image as its source gives it."""
    image = Image.fromarray(payload) if isinstance(payload, np.ndarray) else open_image(payload, formats)
    return pixels_of(image, shape)


def pixels_of(image: Image.Image, shape: Shape) -> Pixels:
    """Pixels (C, H, W): the first frame, upright, on white, resized to cover the shape and cropped at the centre."""
    channels, height, width = shape
    if not (image.width and image.height):
        raise ValueError(f"{image.width} x {image.height} pixels: there is nothing in this image")
    image = flatten(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises `ValueError` if it is missing, cannot be read, is too large, or is not a
    regular file (which may never end)."""
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            if found.st_size > MAX_FILE:
                raise ValueError(f"a file of more than {MAX_FILE} bytes")
            return path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    raise ValueError("no such file, or not a regular one")


def open_image(payload: bytes | Path | str | None, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image of one of these formats and of reasonable size. Raises `ValueError`, and what Pillow raises."""
    data = read_file(payload) if isinstance(payload, Path) else payload
    if isinstance(data, str):
        raise ValueError(data)
    if not data:
        raise ValueError("no image" if data is None else "the file is empty")
    if len(data) > MAX_FILE:
        raise ValueError(f"a file of more than {MAX_FILE} bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.UnidentifiedImageError:  # its own message names a memory address
        raise ValueError(f"not an image in one of the formats {', '.join(formats)}") from None
    width, height = image.size  # from the header: a file of 20 kB may ask for 1 GB
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels; the limit is {MAX_PIXELS} in all and {MAX_SIDE} a side")
    if isinstance(image, TiffImageFile):
        require_plain_tiff(image)
    return image


def require_plain_tiff(image: TiffImageFile) -> None:
    """Raise `ValueError` for a TIFF that is more than one picture, or whose values have no fixed black and white:
    numbers of 12 or 32 bits, signed ones and fractions."""
    if getattr(image, "is_animated", False):
        raise ValueError("a TIFF of several pages; save each as a file of its own")
    bits = {int(depth) for depth in image.tag_v2.get(BITSPERSAMPLE, (1,))}
    inverted = image.mode.startswith("I;16") and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    if image.mode in ("I", "F") or not bits <= {1, 2, 4, 8, 16} or inverted:
        raise ValueError("a TIFF of other values than 8 or 16 bits from black to white; convert it to PNG")
    width, height = (int(image.tag_v2.get(side, 0)) for side in (TILEWIDTH, TILELENGTH))
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(f"tiles of {width} x {height}; the limit is {MAX_PIXELS} pixels in all and {MAX_SIDE} a side")


def flatten(image: Image.Image) -> Image.Image:
    """The image in 8 bits a channel without transparency: 16-bit grey is scaled, alpha is composited on white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        if isinstance(clear := image.info.get("transparency"), int):  # one grey of a PNG
            values = np.where(values == clear, 65535, values)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "LAB":
        return image.convert("RGB")  # Pillow has no other way from it
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image
