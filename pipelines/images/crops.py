"""Crops of images at their own scale: random ones to train on, and a centred grid of them to evaluate on.

Row r is crop r mod K of image r // K. The place of a training crop is a function of (seed, epoch, row), like an
augmentation. Whole images stay in memory if they fit, and are otherwise decoded for each crop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.spec import ImageSpec

from ..prefetch import prefetch
from ..shuffling import DRAWS, uniforms
from .checking import PixelCache
from .dataset import Epochs, ImageDataset
from .formats import WORKERS, Payload, PixelArray, try_decode
from .settings import DataConfig
from .splits import SplitPart
from .views import View

DOWN, RIGHT = DRAWS, DRAWS + 1
"""Columns of the random numbers of a row for the place of its crop, after those of its augmentation."""


class CropImages(ImageDataset):
    """Several crops of each image, which is only enlarged if it is smaller than a crop."""

    def __init__(
        self, config: DataConfig, part: SplitPart, *classes: Any, memory: PixelCache | None = None, **more: Any
    ) -> None:
        self._per_image = self.count_crops(config)
        repeated = part._replace(positions=part.positions.repeat(self._per_image))
        super().__init__(config, repeated, *classes, memory=memory, **more)
        self._whole = [None] * len(part.positions) if memory is None else memory.images
        self._view = View(self.spec.size)

    @staticmethod
    def count_crops(config: DataConfig) -> int:
        raise NotImplementedError

    @staticmethod
    def reserve(count: int, room: int, spec: ImageSpec) -> PixelCache:
        return PixelCache(count, room)

    @staticmethod
    def decode_one(payload: Payload, spec: ImageSpec) -> PixelArray | str:
        return try_decode(payload, spec, least=spec.size)

    def places(self, rows: NDArray[np.int64], epochs: Epochs, seed: int) -> NDArray[np.float64]:
        """Return where crops lie in the room that they have down and right, (B, 2) in [0, 1)."""
        raise NotImplementedError

    def centres(self, rows: NDArray[np.int64], epoch: int, seed: int) -> Tensor:
        """Return the centres of crops in their images, from 0 to 1 down and right, float32 (B, 2)."""
        places, found = self.places(rows, epoch, seed).tolist(), np.empty((len(rows), 2), np.float32)
        for crops, image in self._list_images(rows):
            for k in crops:
                found[k] = self._view.centre(self._find_corner(image, places[k]), image.shape[-2:])
        return torch.from_numpy(found)

    def _read(self, rows: NDArray[np.int64], epochs: Epochs, seed: int) -> Tensor:
        if self._pixels is not None:  # preloaded
            return super()._read(rows, epochs, seed)
        places = self.places(rows, epochs, seed).tolist()
        found = np.empty((len(rows), *self.spec.shape), self.spec.stored_type)
        for crops, image in self._list_images(rows):
            for k in crops:
                found[k] = self._view.window(image, *self._find_corner(image, places[k]))
        return torch.from_numpy(found)

    def _list_images(self, rows: NDArray[np.int64]) -> Iterator[tuple[list[int], PixelArray]]:
        """Yield each image of which `rows` are crops, and which of the rows these are. Images that are not in memory
        are decoded, few at a time."""
        crops: dict[int, list[int]] = {}
        for k, owner in enumerate((rows // self._per_image).tolist()):
            crops.setdefault(owner, []).append(k)
        is_held = all(self._whole[owner] is not None for owner in crops)
        load = map if is_held else partial(prefetch, ahead=WORKERS, threads=WORKERS)
        yield from zip(crops.values(), load(self._load, crops), strict=True)

    def _load(self, owner: int) -> PixelArray:
        if (image := self._whole[owner]) is not None:
            return image
        row = owner * self._per_image
        return self._require_good(row, self._source.read(int(self._positions[row]), self.spec, self.spec.size))

    def _find_corner(self, image: PixelArray, place: Sequence[float]) -> tuple[int, ...]:
        """Return the upper left pixel of a crop of an image; all of those possible are equally likely."""
        sides = zip(place, image.shape[-2:], self._view.size, strict=True)
        return tuple(int(at * (side - window + 1)) for at, side, window in sides)


class RandomCrops(CropImages):
    """Crops at random places, which depend on (seed, epoch, index); `pixels` draws those of seed 0 and epoch 0."""

    @staticmethod
    def count_crops(config: DataConfig) -> int:
        return config.crops_per_image

    def places(self, rows: NDArray[np.int64], epochs: Epochs, seed: int) -> NDArray[np.float64]:
        draws, epochs = np.empty((len(rows), 2)), np.broadcast_to(epochs, rows.shape)
        for epoch in np.unique(epochs):
            draws[epochs == epoch] = uniforms(seed, int(epoch), rows[epochs == epoch], columns=(DOWN, RIGHT))
        return draws


class CentredCrops(CropImages):
    """The largest square grid of at most `crops_per_image` crops, evenly spread (one: the centre)."""

    @staticmethod
    def count_crops(config: DataConfig) -> int:
        return math.isqrt(config.crops_per_image) ** 2

    def places(self, rows: NDArray[np.int64], epochs: Epochs, seed: int) -> NDArray[np.float64]:
        side = math.isqrt(self._per_image)
        return (np.stack(np.divmod(rows % self._per_image, side), 1) + 0.5) / side
