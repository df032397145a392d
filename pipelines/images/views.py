"""Images of any size, and the windows of the model's size that are cut out of them and put back.

A view says which windows an image has: itself, or tiles at every `stride` pixels, of which the last ones of a row and
of a column are flush with the border, so that every pixel is covered. `cut` and `paste` work on the last two axes, so
that an image may be `(C, H, W)`, a clip `(T, C, H, W)` or a map `(H, W)`. Images are read one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prior.arguments import check_count, to_tensor, whole_number
from prior.columns import Column
from prior.given import Given
from tokenizer import Tokenizer
from tokenizer.spec import ImageSpec, check_output_type, to_float

from ..config import UserError
from ..shuffling import spread_rows
from .formats import OWN_SIZE, decode_image
from .pictures import convert_image, refuse, to_images
from .sources import Source

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

Size = tuple[int, int]

PLACE = "place"  # the `encoder` of a vector column with the centre of a tile in its image, from 0 to 1 down and right


@dataclass(frozen=True)
class LazyImages:
    """Images of any size that are read on access, so that not all of them are in memory. `read` returns image k,
    `(C, H, W)`, uint8 or float in [-1, 1]; `names` are for errors."""

    names: Sequence[str]
    read: Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows: Sequence[int]) -> LazyImages:
        return LazyImages([self.names[row] for row in rows], lambda k: self.read(rows[k]))


# Windows ------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A window: the number of its image, its upper left pixel, and its centre, from 0 to 1 down and right."""

    image: int
    top: int
    left: int
    centre: tuple[float, float] = (0.5, 0.5)


@dataclass(frozen=True)
class View:
    """The windows of an image: tiles of `size` (H, W) at every `stride` pixels (down, right), or without a stride the
    image itself, which has this size."""

    size: Size
    stride: Size | None = None

    @classmethod
    def of(cls, spec: ImageSpec, stride: int | None) -> View:
        """Return the view of images for models of `spec`. Raises `ValueError` unless tiles then cover an image, and for
        tiles of clips."""
        height, width = spec.size
        if stride is None:
            return cls((height, width))
        if spec.frames > 1:
            raise ValueError("tile: clips are not cut into tiles")
        stride, most = whole_number("stride", stride), min(height, width)
        if not 1 <= stride <= most:
            raise ValueError(f"stride: must be from 1 to {most}, so that tiles leave no gaps (got {stride})")
        return cls((height, width), (stride, stride))

    @classmethod
    def side_by_side(cls, spec: ImageSpec) -> View:
        """Return the view by tiles that overlap only at the borders. Raises `ValueError` for clips."""
        return replace(cls.of(spec, 1), stride=spec.size)

    @property
    def is_tiled(self) -> bool:
        return self.stride is not None

    def sides(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return where the windows of an image of `size` (H, W) begin down and right."""
        down, right = (
            [*range(0, side - window, step), side - window]
            for side, window, step in zip(size, self.size, self.stride or size, strict=True)
        )
        return down, right

    def tiles(self, number: int, size: Sequence[int]) -> list[Tile]:
        tops, lefts = self.sides(size)
        return [Tile(number, top, left, self.centre((top, left), size)) for top in tops for left in lefts]

    def centre(self, corner: Any, size: Any) -> Any:
        """Return where the centre of a window is, from 0 to 1 down and right. corner: its upper left pixel."""
        return tuple((at + window / 2) / side for at, window, side in zip(corner, self.size, size, strict=True))

    def window(self, image: Any, top: int, left: int) -> Any:
        return image[..., top : top + self.size[0], left : left + self.size[1]]


def read_large(images: LazyImages, number: int, view: View) -> Tensor:
    """Return an image `(C, H, W)`, uint8 or float in [-1, 1]. Raises `ValueError` for one that is smaller than a
    tile."""
    pixels = images.read(number)
    size = pixels.shape[-2:]
    if any(side < least for side, least in zip(size, view.size, strict=True)):
        found, tile = (f"{height} x {width}" for height, width in (size, view.size))
        raise ValueError(f"{images.names[number]}: {found} pixels (height x width), smaller than a tile of {tile}")
    return pixels


def cut(
    images: LazyImages, view: View, batch_size: int, *, most: int | None = None, mixed: bool = True
) -> Iterator[tuple[Tensor, list[Tile]]]:
    """Yield batches of windows `(B, C, h, w)`, float in [-1, 1], and their tiles, image by image.

    most: cut at most this many windows of each image, evenly spread. mixed: whether a batch may span images."""
    check_count(batch_size, "batch_size")
    windows, tiles = list[Tensor](), list[Tile]()
    for number in range(len(images)):
        image = read_large(images, number, view)
        every = view.tiles(number, image.shape[-2:])
        rows = spread_rows(len(every), most).tolist()
        for row in rows:
            windows.append(to_float(view.window(image, every[row].top, every[row].left)))
            tiles.append(every[row])
            is_last = row == rows[-1] and (not mixed or number == len(images) - 1)
            if len(tiles) == batch_size or is_last:
                yield torch.stack(windows), tiles
                windows, tiles = [], []


def paste(
    parts: Iterable[Tensor], sizes: Iterable[Sequence[int]], view: View, weights: Literal["mean", "ramp", "last"]
) -> Iterator[Tensor]:
    """Yield images or maps `(..., H, W)`, float32, of these `sizes` (H, W), of all their windows in the order of `cut`.

    parts: batches of windows `(B, ..., h, w)`, which may span images. weights: where windows overlap, take their
    `mean`; weigh them by the distance from their border (`ramp`), so that there are no seams; or take the `last`."""
    windows = (window.float() for part in parts for window in part)
    for size in sizes:
        starts = view.sides(size)
        first = next(windows)
        image, ramps = first.new_zeros((*first.shape[:-2], *size)), list[Tensor]()
        if weights == "ramp":
            ramps = [side_weights(*each).to(image) for each in zip(size, view.size, starts, strict=True)]
        for row, top in enumerate(starts[0]):
            for column, left in enumerate(starts[1]):
                window = first if row == column == 0 else next(windows)
                place = view.window(image, top, left)
                if weights == "last":
                    place.copy_(window)
                elif weights == "mean":
                    place += window
                else:
                    place += window * ramps[0][row, :, None] * ramps[1][column]
        if weights == "mean":
            for axis, (side, length, firsts) in enumerate(zip(size, view.size, starts, strict=True)):
                covered = image.new_zeros(side)
                for start in firsts:
                    covered[start : start + length] += 1
                image /= covered[:, None] if axis == 0 else covered
        yield image


def side_weights(side: int, window: int, starts: Sequence[int]) -> Tensor:
    """Return the weights `(windows, window)` of the pixels of all windows along a side. They fall linearly over the
    overlap, and those of a pixel sum to one."""
    place = torch.arange(window)
    ramp = 1.0 + torch.minimum(place, place.flip(0))
    total = torch.zeros(side)
    for start in starts:
        total[start : start + window] += ramp
    return torch.stack([ramp / total[start : start + window] for start in starts])


# The given of tiles -------------------------------------------------------------------------------


def list_place_columns(columns: Mapping[str, Column]) -> list[str]:
    return [name for name, column in columns.items() if getattr(column, "encoder", None) == PLACE]


def check_places(given: Given) -> Given:
    for name in list_place_columns(given.columns):
        if name in given.rows:
            raise ValueError(f"condition: {name}: is the place of each tile and found from it; leave it out")
    return given


def give_places(given: Given, tiles: Sequence[Tile]) -> Given:
    """Return the given of tiles: the rows of their images, and their centres."""
    rows = given[torch.tensor([tile.image for tile in tiles], dtype=torch.long)]
    centres = torch.tensor([tile.centre for tile in tiles], dtype=torch.float32).view(-1, 2)
    return rows.with_rows(**dict.fromkeys(list_place_columns(given.columns), centres))


# Images of any size -------------------------------------------------------------------------------


def read_whole(source: Source, rows: Sequence[int], names: Sequence[str], spec: ImageSpec, hint: str) -> LazyImages:
    """Return images of a source at their own size. Access raises `UserError` for a bad one, with its name and the
    `hint`."""

    def read(number: int) -> Tensor:
        pixels = source.read(rows[number], spec)
        if isinstance(pixels, str):
            raise UserError(f"{names[number]}: {pixels}{hint}")
        return torch.from_numpy(np.array(pixels))  # Pillow's pixels are read-only

    return LazyImages(names, read)


def list_images(images: Any, spec: ImageSpec) -> LazyImages:
    """Return images of any size: `LazyImages`, a PIL image, a tensor `(B, C, H, W)`, an array `(B, H, W, C)` or
    `(H, W, C)`, for grey images also `(B, H, W)` or `(H, W)`, or a sequence of single images. Raises `ValueError` for
    anything else, and for no images."""
    if isinstance(images, LazyImages):
        return images
    if isinstance(images, Image.Image):
        images = [images]
    elif isinstance(images, np.ndarray):
        single = images.ndim == 2 or (images.ndim == 3 and images.shape[-1] == spec.channels)
        images = images[None] if single else images
        if images.ndim != 4 and not (images.ndim == 3 and spec.channels == 1):
            refuse(images[0] if single else images, spec)
    elif isinstance(images, Tensor):
        if images.ndim != 4:
            refuse(images, spec)
    elif not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        refuse(images, spec)
    if not len(images):
        raise ValueError("expected at least one image")
    return as_lazy(images, lambda image: convert_at_own_size(image, spec))


def as_lazy(images: Any, convert: Callable[[Any], Tensor] = lambda image: image) -> LazyImages:
    """Return the images of a tensor `(B, ...)` or a sequence, each of which `convert` converts on access."""
    return LazyImages([f"image {k}" for k in range(len(images))], lambda k: convert(images[k]))


def convert_at_own_size(image: Any, spec: ImageSpec) -> Tensor:
    """Convert a single image at its own size to `(C, H, W)`, uint8 or float in [-1, 1]; see `list_images`."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(decode_image(image, spec, least=OWN_SIZE).copy())
    sides = tuple(getattr(image, "shape", ()))
    size = sides[-2:] if isinstance(image, Tensor) else sides[:2]
    own = spec.at(*size) if len(size) == 2 else spec
    pixels = convert_image(image, own)
    return pixels if pixels.dtype == torch.uint8 else to_images([image], own)[0]


# To tokens and back -------------------------------------------------------------------------------


@torch.no_grad()
def encode_large(tokenizer: Tokenizer, image: Tensor, view: View, batch_size: int) -> Tensor:
    """Encode the tiles of an image `(C, H, W)` to tokens `(rows, columns, *grid.shape)`."""
    parts = cut(as_lazy(image[None]), view, batch_size)
    tokens = [tokenizer.encode(part.to(tokenizer.device, tokenizer.dtype)) for part, _ in parts]
    return torch.cat(tokens).unflatten(0, [len(starts) for starts in view.sides(image.shape[-2:])])


@torch.no_grad()
def decode_large(tokenizer: Tokenizer, tokens: Tensor, size: Sequence[int], view: View, batch_size: int) -> Tensor:
    """Decode tokens `(rows, columns, *grid.shape)` to an image `(C, H, W)` of `size` (H, W), float in [-1, 1]."""
    parts = (tokenizer.decode(part) for part in tokens.flatten(0, 1).split(batch_size))
    (image,) = paste(parts, [size], view, "ramp")
    return image


def encode_tiles(pipeline: ImagePipeline, images: Any, stride: int, *, batch_size: int = 256) -> list[Tensor]:
    """Encode images of any size from the model's size on, also of different sizes in one list; return the tokens of
    each image's tiles, `(rows, columns, *grid.shape)`. Tiles lie at every `stride` pixels and at the borders.
    `decode_tiles` inverts this."""
    view, several = View.of(pipeline.spec, stride), pipeline.list_images(images)
    read = (read_large(several, number, view) for number in range(len(several)))
    return [encode_large(pipeline.tokenizer, image, view, batch_size) for image in read]


def decode_tiles(
    pipeline: ImagePipeline,
    tokens: Sequence[Any],
    sizes: Sequence[Sequence[int]],
    stride: int,
    *,
    output_type: str = "pil",
    batch_size: int = 256,
) -> list[Any]:
    """Decode what `encode_tiles(images, stride)` returned: tokens `(rows, columns, *grid.shape)` for each image, whose
    `sizes` are (height, width). Return a list of images at these sizes, without seams; see `reconstruct`. Raises
    `ValueError` for tokens that do not fit a size."""
    check_output_type(output_type)
    view = View.of(pipeline.spec, stride)
    check_count(batch_size, "batch_size")
    if len(tokens) != len(sizes):
        raise ValueError(f"got {len(sizes)} sizes for the tokens of {len(tokens)} images; give one size per image")
    found = list[Any]()
    for number, (size, each) in enumerate(zip(sizes, tokens, strict=True)):
        if len(size) != 2 or size[0] < view.size[0] or size[1] < view.size[1]:
            raise ValueError(f"image {number}: its size must be at least {view.size} (got {tuple(size)})")
        ids = to_tensor(each, pipeline.device)
        wanted = (*(len(starts) for starts in view.sides(size)), *pipeline.tokenizer.grid.shape)
        if tuple(ids.shape) != wanted:
            raise ValueError(f"image {number}: expected tokens of shape {wanted} (got {tuple(ids.shape)})")
        image = decode_large(pipeline.tokenizer, ids, size, view, batch_size)
        found.append(pipeline.convert_images(image[None], output_type)[0])
    return found


def reconstruct_tiles(pipeline: ImagePipeline, images: Any, view: View, output_type: str, batch_size: int) -> list[Any]:
    """Return `decode_tiles(encode_tiles(images))`, one image after another."""
    check_output_type(output_type)
    several, found = pipeline.list_images(images), list[Any]()
    for number in range(len(several)):
        image = read_large(several, number, view)
        tokens = encode_large(pipeline.tokenizer, image, view, batch_size)
        decoded = decode_large(pipeline.tokenizer, tokens, image.shape[-2:], view, batch_size)
        found.append(pipeline.convert_images(decoded[None], output_type)[0])
    return found
