"""Images larger than the model, to the tokens of their tiles and back.

Where tiles overlap, the image is their average, weighted by the distance from the border of each tile. The weights of
a pixel sum to one, and fall linearly over the overlap, so that there are no seams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prior.arguments import as_tensor, check_count
from tokenizer import Tokenizer
from tokenizer.spec import check_output_type

from .tiles import LazyImages, Stride, check_stride, cut_tiles, load_image, tile_sides, tile_starts

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline


def side_weights(side: int, tile: int, stride: int) -> Tensor:
    """Return the weights `(tiles, tile)` of the pixels of all tiles along a side; those of a pixel sum to one."""
    starts, place = tile_starts(side, tile, stride), torch.arange(tile)
    ramp = 1.0 + torch.minimum(place, place.flip(0))
    total = torch.zeros(side)
    for start in starts:
        total[start : start + tile] += ramp
    return torch.stack([ramp / total[start : start + tile] for start in starts])


@torch.no_grad()
def encode_image(tokenizer: Tokenizer, image: Tensor, stride: Stride, batch_size: int) -> Tensor:
    """Encode the tiles of an image `(C, H, W)` to tokens `(rows, columns, *grid.shape)`."""
    shape = tokenizer.image_shape
    tiles = cut_tiles([(0, image)], shape, stride, batch_size)
    tokens = [tokenizer.encode(part.to(tokenizer.device, tokenizer.dtype)) for part, _ in tiles]
    return torch.cat(tokens).unflatten(0, [len(starts) for starts in tile_sides(image.shape[1:], shape, stride)])


@torch.no_grad()
def decode_image(tokenizer: Tokenizer, tokens: Tensor, size: Sequence[int], stride: int, batch_size: int) -> Tensor:
    """Decode tokens `(rows, columns, *grid.shape)` to an image `(C, H, W)` of `size` (H, W), float in [-1, 1]."""
    (channels, height, width), device = tokenizer.image_shape, tokenizer.device
    tops, lefts = tile_sides(size, tokenizer.image_shape, stride)
    rows, columns = side_weights(size[0], height, stride), side_weights(size[1], width, stride)
    rows, columns = rows.to(device), columns.to(device)
    image, number = torch.zeros(channels, *size, device=device), 0
    for part in tokens.flatten(0, 1).split(batch_size):
        for tile in tokenizer.decode(part).float():
            row, column = divmod(number, len(lefts))
            place = (..., slice(tops[row], tops[row] + height), slice(lefts[column], lefts[column] + width))
            image[place] += tile * rows[row, :, None] * columns[column]
            number += 1
    return image


# What a pipeline does -----------------------------------------------------------------------------


def encode_tiles(pipeline: ImagePipeline, images: Any, stride: int, *, batch_size: int = 256) -> list[Tensor]:
    """Encode images of any size from the model's size on, also of different sizes in one list; return the tokens of
    each image's tiles, `(rows, columns, *grid.shape)`. Tiles lie at every `stride` pixels and at the borders.
    `decode_tiles` inverts this."""
    shape, several = check_images(pipeline, images, stride, batch_size)
    loaded = (load_image(several, number, shape) for number in range(len(several)))
    return [encode_image(pipeline.tokenizer, image, stride, batch_size) for image in loaded]


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
    shape = pipeline.tokenizer.image_shape
    check_output_type(output_type)
    check_stride(stride, shape), check_count(batch_size, "batch_size")
    if len(tokens) != len(sizes):
        raise ValueError(f"got {len(sizes)} sizes for the tokens of {len(tokens)} images; give one size per image")
    found = list[Any]()
    for number, (size, each) in enumerate(zip(sizes, tokens, strict=True)):
        if len(size) != 2 or size[0] < shape[1] or size[1] < shape[2]:
            raise ValueError(
                f"image {number}: expected a size (height, width) of at least {shape[1:]} (got {tuple(size)})"
            )
        ids = as_tensor(each, pipeline.device)
        wanted = (*(len(starts) for starts in tile_sides(size, shape, stride)), *pipeline.tokenizer.grid.shape)
        if tuple(ids.shape) != wanted:
            raise ValueError(
                f"image {number}: expected tokens of shape {wanted} for {size[0]} x {size[1]} pixels with stride "
                f"{stride} (got {tuple(ids.shape)})"
            )
        image = decode_image(pipeline.tokenizer, ids, size, stride, batch_size)
        found.append(pipeline.convert_images(image[None], output_type)[0])
    return found


def reconstruct_tiles(
    pipeline: ImagePipeline, images: Any, stride: int, output_type: str, batch_size: int
) -> list[Any]:
    """Return `decode_tiles(encode_tiles(images))`, one image after another."""
    shape, several = check_images(pipeline, images, stride, batch_size)
    check_output_type(output_type)
    found = list[Any]()
    for number in range(len(several)):
        image = load_image(several, number, shape)
        decoded = reconstruct_image(pipeline.tokenizer, image, stride, batch_size)
        found.append(pipeline.convert_images(decoded[None], output_type)[0])
    return found


def reconstruct_image(tokenizer: Tokenizer, image: Tensor, stride: int, batch_size: int = 256) -> Tensor:
    """Return the reconstruction of an image `(C, H, W)`, float in [-1, 1], blended from its tiles."""
    tokens = encode_image(tokenizer, image, stride, batch_size)
    return decode_image(tokenizer, tokens, image.shape[1:], stride, batch_size)


def check_images(
    pipeline: ImagePipeline, images: Any, stride: int, batch_size: int
) -> tuple[tuple[int, ...], LazyImages]:
    """Return the shape of a tile, and the images. Raises `ValueError`."""
    shape = pipeline.tokenizer.image_shape
    check_stride(stride, shape), check_count(batch_size, "batch_size")
    return shape, pipeline.list_images(images)
