"""Images larger than the model, as overlapping tiles of the model's size.

Tiles lie at every `stride` pixels; the last ones of a row and of a column are flush with the border, so that every
pixel is covered. Images are loaded one after another, and a batch of tiles may span several of them, so memory is
bounded by one image, its map and one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prior.arguments import check_count, whole_number
from prior.columns import Column
from prior.given import Given
from tokenizer import Tokenizer
from tokenizer.files import one_line
from tokenizer.spec import ImageSpec, to_float

from ..config import UserError
from ..shuffling import spread
from .arrays import decode_whole_array
from .decoding import Payload, try_decode_whole, whole_pixels
from .pictures import convert_image, refuse, to_images

Shape = tuple[int, ...]


PLACE = "place"
"""The `encoder` of a vector column with the centre of a tile in its image, from 0 to 1 down and right."""
Stride = int | tuple[int, int]
"""The distance of tiles in pixels, or those down and right."""


class Place(NamedTuple):
    """A tile: the number of its image, its upper left pixel, and its centre, from 0 to 1 down and right."""

    image: int
    top: int
    left: int
    centre: tuple[float, float] = (0.5, 0.5)


def list_place_columns(columns: Mapping[str, Column]) -> list[str]:
    """Return the names of the columns that hold the place of a tile in its image."""
    return [name for name, column in columns.items() if getattr(column, "encoder", None) == PLACE]


def check_places(given: Given) -> Given:
    """Raise `ValueError` if columns that tiles fill in have values."""
    for name in list_place_columns(given.columns):
        if name in given.rows:
            raise ValueError(f"condition: {name}: is the place of each tile and found from it; leave it out")
    return given


def give_places(given: Given, places: Sequence[Place]) -> Given:
    """Return what is given of tiles: the rows of their images, and their centres."""
    rows = given[torch.tensor([place.image for place in places], dtype=torch.long)]
    centres = torch.tensor([place.centre for place in places], dtype=torch.float32).view(-1, 2)
    return rows.with_rows(**dict.fromkeys(list_place_columns(given.columns), centres))


@dataclass(frozen=True)
class LazyImages:
    """Images of any size that are loaded on access, so that not all of them are in memory. `load` returns image k,
    `(C, H, W)`, uint8 or float in [-1, 1]; `name` returns its name for errors."""

    count: int
    load: Callable[[int], Tensor]
    name: Callable[[int], str] = "image {}".format

    def __len__(self) -> int:
        return self.count

    def select(self, numbers: Sequence[int]) -> LazyImages:
        """Return the images `numbers`."""
        return LazyImages(len(numbers), lambda k: self.load(numbers[k]), lambda k: self.name(numbers[k]))


# Images of any size -------------------------------------------------------------------------------


def whole_files(payloads: Callable[[int], Payload], names: Sequence[str], spec: ImageSpec, hint: str) -> LazyImages:
    """Return encoded images at their own size, which are read on access. payloads: returns image k. Access raises
    `UserError` for a bad one, with the `hint`."""

    def load(number: int) -> Tensor:
        pixels = try_decode_whole(payloads(number), spec)
        if isinstance(pixels, str):
            raise UserError(one_line(f"{names[number]}: {pixels}{hint}"))
        return torch.from_numpy(np.array(pixels))  # Pillow's pixels are read-only

    return LazyImages(len(names), load, names.__getitem__)


def list_images(images: Any, tokenizer: Tokenizer) -> LazyImages:
    """Return images of any size: `LazyImages`, a PIL image, a tensor `(B, C, H, W)`, an array `(B, H, W, C)` or
    `(H, W, C)`, for grey images also `(B, H, W)` or `(H, W)`, or a sequence of single images. Raises `ValueError` for
    anything else, for no images, and for a tokenizer of clips."""
    if (spec := tokenizer.spec).frames > 1:
        raise ValueError("clips are not cut into tiles")
    if isinstance(images, LazyImages):
        return images
    channels = spec.channels
    if isinstance(images, Image.Image):
        images = [images]
    elif isinstance(images, np.ndarray):
        single = images.ndim == 2 or (images.ndim == 3 and images.shape[-1] == channels)
        images = images[None] if single else images
        if images.ndim != 4 and not (images.ndim == 3 and channels == 1):
            refuse(images[0] if single else images, spec)
    elif isinstance(images, Tensor):
        if images.ndim != 4:
            refuse(images, spec)
    elif not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        refuse(images, spec)
    if not len(images):
        raise ValueError("expected at least one image")
    return LazyImages(len(images), lambda k: convert_whole(images[k], spec))


def as_lazy(images: LazyImages | Tensor) -> LazyImages:
    """Return `images` or, of a tensor `(B, C, H, W)`, its images."""
    return images if isinstance(images, LazyImages) else LazyImages(len(images), images.__getitem__)


def convert_whole(image: Any, spec: ImageSpec) -> Tensor:
    """Convert a single image at its own size to `(C, H, W)`, uint8 or float in [-1, 1]; see `list_images`."""
    if isinstance(image, Image.Image):
        found = whole_pixels(image, spec.channels) if spec.is_picture else decode_whole_array(image, spec)
        return torch.from_numpy(found.copy())
    sides = tuple(getattr(image, "shape", ()))
    size = sides[-2:] if isinstance(image, Tensor) else sides[:2]
    own = spec.at(*size) if len(size) == 2 else spec
    pixels = convert_image(image, own)
    return pixels if pixels.dtype == torch.uint8 else to_images([image], own)[0]


def load_image(images: LazyImages, number: int, shape: Shape) -> Tensor:
    """Return an image `(C, H, W)`, uint8 or float in [-1, 1]. Raises `ValueError` for an image that is smaller than a
    tile of `shape` (C, H, W)."""
    pixels = images.load(number)
    height, width = pixels.shape[1:]
    if height < shape[1] or width < shape[2]:
        raise ValueError(
            f"{images.name(number)}: {height} x {width} pixels (height x width), smaller than a tile of "
            f"{shape[1]} x {shape[2]}"
        )
    return pixels


# Tiles --------------------------------------------------------------------------------------------


def check_stride(stride: int, shape: Shape) -> int:
    """Return the stride. Raises `ValueError` unless tiles of `shape` (C, H, W) then cover the image."""
    stride, most = whole_number("stride", stride), min(shape[1:])
    if not 1 <= stride <= most:
        raise ValueError(
            f"stride: must be from 1 to {most}, so that tiles of {shape[1]} x {shape[2]} leave no gaps (got {stride})"
        )
    return stride


def tile_starts(side: int, tile: int, stride: int) -> list[int]:
    """Return where tiles begin along a side: every `stride` pixels, and flush with its end."""
    return [*range(0, side - tile, stride), side - tile]


def tile_sides(size: Sequence[int], shape: Shape, stride: Stride) -> tuple[list[int], list[int]]:
    """Return where the tiles of an image of `size` (H, W) begin down and right."""
    down, right = stride if isinstance(stride, tuple) else (stride, stride)
    return tile_starts(size[0], shape[1], down), tile_starts(size[1], shape[2], right)


def tile_places(size: Sequence[int], shape: Shape, stride: Stride) -> list[tuple[int, int]]:
    """Return the upper left pixels of the tiles of an image of `size` (H, W)."""
    tops, lefts = tile_sides(size, shape, stride)
    return [(top, left) for top in tops for left in lefts]


def place_of(number: int, top: int, left: int, size: Sequence[int], shape: Shape) -> Place:
    """Return the place of a tile of image `number`, which has this `size` (H, W)."""
    return Place(number, top, left, ((top + shape[1] / 2) / size[0], (left + shape[2] / 2) / size[1]))


def cut_tiles(
    images: Iterable[tuple[int, Tensor]], shape: Shape, stride: Stride, batch_size: int, most: int | None = None
) -> Iterator[tuple[Tensor, list[Place]]]:
    """Yield batches of tiles `(B, C, H, W)`, float in [-1, 1], and their places, in the order of the images (number,
    pixels). most: cut at most this many tiles of each image, evenly spaced."""
    stride = stride if isinstance(stride, tuple) else check_stride(stride, shape)
    check_count(batch_size, "batch_size")
    tiles, places = list[Tensor](), list[Place]()
    for number, image in images:
        every = tile_places(image.shape[1:], shape, stride)
        for top, left in (every[k] for k in spread(len(every), most).tolist()):
            tile = image[:, top : top + shape[1], left : left + shape[2]]
            tiles.append(to_float(tile))
            places.append(place_of(number, top, left, image.shape[1:], shape))
            if len(tiles) == batch_size:
                yield torch.stack(tiles), places
                tiles, places = [], []
    if tiles:
        yield torch.stack(tiles), places


def stitch_maps(
    images: LazyImages,
    map_tiles: Callable[[Tensor, list[Place]], Tensor],
    shape: Shape,
    stride: int,
    batch_size: int,
    device: torch.device,
) -> list[Tensor]:
    """Return the map `(H, W)` of each image: the average over its tiles of what `map_tiles` returns, `(B, H, W)`, for a
    batch of tiles and their places."""
    maps = list[Tensor]()

    def load() -> Iterator[tuple[int, Tensor]]:
        for number in range(len(images)):
            image = load_image(images, number, shape)
            maps.append(torch.zeros(image.shape[1:], device=device))
            yield number, image

    for tiles, places in cut_tiles(load(), shape, stride, batch_size):
        found = map_tiles(tiles.to(device), places)
        for part, (number, top, left, _) in zip(found, places, strict=True):
            maps[number][top : top + shape[1], left : left + shape[2]] += part
    for each in maps:
        for axis, (side, tile) in enumerate(zip(each.shape, shape[1:], strict=True)):
            covered = torch.zeros(side, device=device)
            for start in tile_starts(side, tile, stride):
                covered[start : start + tile] += 1
            each /= covered[:, None] if axis == 0 else covered
    return maps
