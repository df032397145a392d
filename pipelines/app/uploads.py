"""What a browser sends, checked: files in data URLs, masks, numbers. Nothing in it names a file.

Anyone may send anything, whatever the page lets a visitor do: each function raises `ValueError` with a sentence for
what is not as it should be.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images.decoding import WEB_FORMATS, Shape, open_image, try_decode

MEGABYTE = 2**20


def files_of(value: Any, most: int, count: int) -> list[bytes]:
    """The contents of up to `count` files of at most `most` bytes together, from the value of a picker."""
    found = parsed(value).get("files")
    if not isinstance(found, list) or not found:
        raise ValueError("pick a file first")
    if len(found) > count:
        raise ValueError(f"{len(found)} files; at most {count} {'is' if count == 1 else 'are'} taken at once")
    if not all(isinstance(file, str) for file in found):
        raise ValueError("a file should be a data URL")
    size = sum(len(file) * 3 // 4 for file in found)
    if size > most + 200 * count:  # what stands before the contents
        raise ValueError(f"{size / MEGABYTE:.1f} MB; at most {most / MEGABYTE:.1f} MB are taken at once")
    return [contents(file) for file in found]


def contents(file: str) -> bytes:
    """The bytes in a data URL."""
    head, comma, text = file[:200].partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise ValueError("a file should be a data URL in base64")
    try:
        return base64.b64decode(file[len(head) + 1 :], validate=True)
    except binascii.Error as error:
        raise ValueError("a file should be a data URL in base64") from error


def images_of(value: Any, shape: Shape, most: int, count: int = 1) -> Tensor:
    """uint8 `(n, C, H, W)` of the images that were picked, resized and cropped to the shape."""
    parts = []
    for number, data in enumerate(files_of(value, most, count), 1):
        pixels = try_decode(data, shape, WEB_FORMATS)
        if isinstance(pixels, str):
            raise ValueError(f"{f'image {number}' if count > 1 else 'the image'} cannot be read: {pixels}")
        parts.append(torch.from_numpy(pixels.copy()))
    return torch.stack(parts)


def pictures_of(value: Any, most: int, count: int) -> Iterator[Image.Image]:
    """The images that were picked, of whatever size they are, each decoded when it is its turn: a file of a few bytes
    may ask for a gigabyte, and many would not fit in memory together."""
    for number, data in enumerate(files_of(value, most, count), 1):
        try:
            image = open_image(data, WEB_FORMATS)
            image.load()
        except Exception as error:  # damaged files make Pillow raise almost anything
            raise ValueError(f"image {number} cannot be read: {error}") from error
        yield image


def painted(value: Any, shape: Shape, most: int) -> tuple[Tensor, Tensor]:
    """The image of a painting, uint8 `(1, C, H, W)`, and which of its pixels are not painted, bool `(H, W)`."""
    parts = parsed(value)
    _, height, width = shape
    if not parts.get("picture"):
        raise ValueError("pick an image first, and paint over what is to be drawn again")
    image = images_of(json.dumps({"files": [parts["picture"]]}), shape, most)
    mask = parts.get("mask")
    if not isinstance(mask, str) or len(mask) != height * width or set(mask) - {"0", "1"}:
        raise ValueError(f"the mask should be {height * width} digits, 0 or 1")
    hidden = np.frombuffer(mask.encode(), np.uint8).reshape(height, width) == ord("1")
    if not hidden.any():
        raise ValueError("nothing is painted: paint over what is to be drawn again")
    return image, torch.from_numpy(~hidden)


def parsed(value: Any) -> dict[str, Any]:
    """The mapping in a JSON text; an empty one for no text."""
    if not value:
        return {}
    try:
        found = json.loads(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError("a value of the page should be JSON") from error
    if not isinstance(found, dict):
        raise ValueError("a value of the page should be a JSON object")
    return found


def whole(value: Any, name: str, low: int, high: int) -> int:
    """A whole number in this range."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value != value // 1
        or not low <= value <= high
    ):
        raise ValueError(f"{name} should be a whole number from {low} to {high:,} (got {str(value)[:40]})")
    return int(value)
