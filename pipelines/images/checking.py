"""Decode every image of a data set once, so that bad images are found before training starts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm import tqdm

from tokenizer.files import PathError
from tokenizer.spec import ImageSpec

from ..config import UserError, is_first_process, tell
from ..files import replace_file
from ..prefetch import prefetch
from .formats import CHUNK, WORKERS, Payload, PixelArray
from .settings import DataConfig
from .sources import Source

BAD_IMAGES = "bad_images.jsonl"
AHEAD = 2 * WORKERS  # tasks of the threads that decode


class BadImage(NamedTuple):
    """An image that cannot be decoded: its path or name, its row in the split, and the reason."""

    path: str
    row: int
    reason: str


class PixelCache:
    """Decoded images of any sizes in memory: the first ones of `count`, until one does not fit in `room` bytes."""

    at_once = max(1, CHUNK // AHEAD)  # images that a thread decodes at a time

    def __init__(self, count: int, room: int) -> None:
        self.images: list[PixelArray | None] = [None] * count
        self.room, self.is_full = room, room <= 0

    def add(self, k: int, image: PixelArray) -> None:
        self.is_full = self.is_full or image.nbytes > self.room
        if not self.is_full:
            self.images[k] = image
            self.room -= image.nbytes

    def select(self, good: NDArray[np.int64]) -> None:
        self.images = [self.images[k] for k in good.tolist()]


class StackedCache(PixelCache):
    """Decoded images of one shape in memory: all of `count`, or none if they do not fit in `room` bytes."""

    at_once = CHUNK

    def __init__(self, count: int, room: int, spec: ImageSpec) -> None:
        super().__init__(0, room)
        size = count * math.prod(spec.shape) * spec.stored_type.itemsize
        self.is_full = size > room
        self.pixels = None if self.is_full else np.empty((count, *spec.shape), spec.stored_type)
        self.room -= 0 if self.is_full else size

    def add(self, k: int, image: PixelArray) -> None:
        if self.pixels is not None:
            self.pixels[k] = image

    def select(self, good: NDArray[np.int64]) -> None:
        if self.pixels is not None and len(good) < len(self.pixels):
            self.pixels = self.pixels[good]


def decode_all(
    source: Source,
    positions: NDArray[np.int64],
    decode: Callable[[Payload], PixelArray | str],
    memory: PixelCache,
    distributed: bool = False,
) -> tuple[NDArray[np.int64], list[BadImage]]:
    """Decode each image at `positions` once, into `memory` as far as it fits; return the positions of the good ones,
    and the bad ones.

    decode: returns pixels, or the reason why there are none. distributed: all processes call this with the same
    arguments; each decodes a share of the images that do not fit."""
    share = distributed and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    found = list[tuple[int, BadImage]]()

    def list_pieces() -> Iterator[range]:
        for start in range(0, len(positions), CHUNK):
            chunk = range(start, min(start + CHUNK, len(positions)))
            for first in range(0, len(chunk), memory.at_once):
                if not memory.is_full or start // CHUNK % world == rank:
                    yield chunk[first : first + memory.at_once]

    def decode_piece(piece: range) -> tuple[range, list[PixelArray | str]]:
        rows = positions[piece.start : piece.stop].tolist()
        return piece, [decode(payload) for payload in source.payloads(rows)]

    hidden = not sys.stderr.isatty() or not is_first_process()
    total = len(positions) // (world if memory.is_full else 1)
    with tqdm(total=total, desc="checking images", unit="image", leave=False, disable=hidden) as bar:
        for piece, images in prefetch(decode_piece, list_pieces(), AHEAD, WORKERS):
            for k, image in zip(piece, images, strict=True):
                if isinstance(image, str):
                    row = int(positions[k])
                    found.append((k, BadImage(source.name(row), row, image)))
                else:
                    memory.add(k, image)
            bar.update(len(piece))
    if share:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, found)
        found = sorted(set(chain.from_iterable(parts)))
    good = np.setdiff1d(np.arange(len(positions)), [k for k, _ in found])
    memory.select(good)
    return positions[good], [bad for _, bad in found]


def check_bad(parts: list[tuple[list[BadImage], int]], config: DataConfig) -> None:
    """Raise `UserError` if bad images are not allowed or too many; otherwise warn about them. parts: for each split,
    its bad images and its number of images, good and bad."""
    bad, found = [image for images, _ in parts for image in images], sum(count for _, count in parts)
    if not bad:
        return
    counted = f"{len(bad)} of {found} images cannot be decoded"
    if len(bad) == found:  # nothing would be left
        raise UserError(f"{counted}:", *list_bad(bad))
    if config.on_error == "fail":
        raise UserError(f"{counted} (data.on_error=skip skips them):", *list_bad(bad))
    if len(bad) > config.max_bad_fraction * found:
        allowed = f"data.max_bad_fraction={config.max_bad_fraction} allows (raise it to skip them all)"
        raise UserError(f"{counted}, more than {allowed}:", *list_bad(bad))
    if any(len(images) == count for images, count in parts):
        raise UserError(f"{counted}, which leaves no image to train on or to hold out:", *list_bad(bad))
    if is_first_process():
        tell(f"warning: {counted} and are skipped; the first is {bad[0].path}: {bad[0].reason}")


def list_bad(bad: list[BadImage]) -> list[str]:
    lines = [f"  {image.path}: {image.reason}" for image in bad[:10]]
    return lines + [f"  and {len(bad) - 10} more"] * (len(bad) > 10)


def write_bad_images(folder: Path, bad: Mapping[str, list[BadImage]]) -> None:
    """Write `bad_images.jsonl`, a line `{"split", "path", "row", "reason"}` for each skipped image of each split; no
    file if no image was skipped."""
    lines = [json.dumps({"split": name, **image._asdict()}) for name, images in bad.items() for image in images]
    if lines:
        try:
            replace_file(folder / BAD_IMAGES, "".join(line + "\n" for line in lines).encode())
        except (OSError, PathError) as error:
            tell(f"warning: {folder / BAD_IMAGES} cannot be written: {error}")
