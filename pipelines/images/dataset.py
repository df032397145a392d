"""Data sets of images: a division of a source, decoded and in memory or on access, and the batches made of it.

Batches move to the device as uint8 and become augmented floats in [-1, 1] there.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.spec import ImageSpec, to_float

from ..config import UserError, is_first_process, tell
from ..shuffling import Indices, positions_of, samples_of, spread_rows
from .augment import AugmentConfig, draw_changes, mirror_images, move_images
from .binarize import binarize
from .checking import BadImage, PixelCache, StackedCache, write_bad_images
from .classes import warn_about_absent
from .formats import CHUNK, Payload, PixelArray, decode_in_threads, try_decode
from .settings import DataConfig, require_spec
from .sources import Source
from .splits import SplitFacts, SplitPart, name_units
from .views import LazyImages, read_whole

if TYPE_CHECKING:
    from ..processes.group import ProcessGroup

Epochs = NDArray[np.int64] | int
COLOUR_SAMPLE, GREY_SPREAD = 32, 16
"""Number of images in which colour is looked for, and the largest difference between the channels of a grey pixel."""
TEST_DRAWS = 5  # samples of each test image with `data.binarize=drawn`, over which figures are averaged
HINT = " (data.on_error=skip skips such images)"


class ImageDataset:
    """Images of one shape with optional labels, addressed by index.

    Attributes: `labels` (n,) int64 or None, `class_names`, `spec`, `bad` (the skipped images), `config`, with the range
    if it was measured, and `units`, a number (n,) that is the same for images which are never divided.
    """

    def __init__(
        self,
        config: DataConfig,
        part: SplitPart,
        labels: NDArray[np.int64] | None = None,
        class_names: Sequence[str] = (),
        *,
        bad: Sequence[BadImage] = (),
        memory: PixelCache | None = None,
    ) -> None:
        """part: the good images. labels: those of all images of the source. memory: the images, as far as they are in
        memory, from `reserve`."""
        self.config, self.spec = config, config.spec
        self._source, self._positions, units = part
        self.labels = torch.from_numpy(labels[self._positions]) if labels is not None else None
        self.class_names = list(class_names)
        self.bad = list(bad)
        self.units = units[self._positions]
        held = memory.pixels if isinstance(memory, StackedCache) else None
        self._pixels = None if held is None else torch.from_numpy(held)
        self._binarize = config.binarize

    @staticmethod
    def reserve(count: int, room: int, spec: ImageSpec) -> PixelCache:
        return StackedCache(count, room, spec)

    @staticmethod
    def decode_one(payload: Payload, spec: ImageSpec) -> PixelArray | str:
        return try_decode(payload, spec)

    def __len__(self) -> int:
        return len(self._positions)

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return indices and epochs, each `(batch_size,)`, of one step's global batch: a pure function."""
        return samples_of(len(self), batch_size, seed, step)

    def examples(self, count: int, seed: int) -> Tensor:
        """Return a batch of up to `count` images, the same on all processes."""
        return self.batch(self.samples(min(count, len(self)), seed, 0)[0])

    @property
    def origin(self) -> tuple[Source, NDArray[np.int64]]:
        """The source, and the positions of the images in it."""
        return self._source, self._positions

    def names(self, indices: Indices) -> list[str]:
        """Return the name of each image: its path within the source, or its table row."""
        rows = self._positions[self._rows_of(indices)].tolist()
        root = "" if self.config.path is None else os.path.join(self.config.path, "")
        return [self._source.name(row).removeprefix(root) for row in rows]

    def objects(self) -> list[str] | None:
        """Return the object of each image, with `data.group`; None without it."""
        if self.config.group is None:
            return None
        names, rows = self._source.objects, self._positions.tolist()
        if names is not None:
            return [names[row] for row in rows]
        paths = self._source.paths or []
        return name_units([paths[row] for row in rows], self.config)

    # Pixels

    def pixels(self, indices: Indices) -> Tensor:
        """Return the images `(B, *spec.shape)` as uint8 levels, or as float32 in [-1, 1] if they are not of 8 bits.
        Raises `IndexError`, and `UserError` for a bad image."""
        return self._read(self._rows_of(indices), 0, 0)

    def batch(self, indices: Indices, *, seed: int = 0, epoch: int = 0, augment: bool = False) -> Tensor:
        """Return images as float32 `(B, *spec.shape)` in [-1, 1]. Augmentation depends on (seed, epoch, index) alone,
        and stochastic pixels on (epoch, index)."""
        return self.prepare(*self.raw_batch(indices, epoch, seed, augment=augment))

    def raw_batch(self, indices: Indices, epochs: Epochs, seed: int, *, augment: bool = True) -> tuple[Tensor, ...]:
        """Return the arguments of `prepare`: images as `pixels` returns them and, if augmented, the changes of each in
        its epoch. epochs: (B,), or one for all."""
        rows = self._rows_of(indices)
        pixels = self._read(rows, epochs, seed)
        changes = self._draw_changes(rows, epochs, seed) if augment else None
        return (pixels,) if changes is None else (pixels, changes)

    def prepare(self, pixels: Tensor, changes: Tensor | None = None) -> Tensor:
        """Convert a `raw_batch` to float32 `(B, *spec.shape)` in [-1, 1], on its device."""
        return prepare_images(pixels, changes, self.config.augment)

    def decode(self, indices: list[int], spec: ImageSpec) -> list[PixelArray | str]:
        """Read the images from the source as `spec`. Each becomes pixels `spec.shape`, or the reason why it cannot be
        decoded."""
        return decode_in_threads(self._source.payloads(self._positions[indices].tolist()), spec)

    def _rows_of(self, indices: Indices) -> NDArray[np.int64]:
        return positions_of(indices, len(self))

    def _draw_changes(self, rows: NDArray[np.int64], epochs: Epochs, seed: int) -> Tensor | None:
        return draw_changes(rows, epochs, self.config.augment, seed)

    def _read(self, rows: NDArray[np.int64], epochs: Epochs, seed: int) -> Tensor:
        """Return the images as `pixels` does. epochs: with `data.binarize=drawn`, the number of each image's draw,
        (B,), or one for all."""
        if self._pixels is not None:
            pixels = self._pixels[torch.from_numpy(rows)]
        else:
            images = self.decode(rows.tolist(), self.spec)
            good = [self._require_good(row, image) for row, image in zip(rows.tolist(), images, strict=True)]
            pixels = torch.from_numpy(np.stack(good)) if good else torch.empty((0, *self.spec.shape), dtype=torch.uint8)
        return pixels if self._binarize is None else binarize(pixels, self._binarize, self._positions[rows], epochs)

    def _require_good(self, row: int, image: PixelArray | str) -> PixelArray:
        if isinstance(image, str):
            raise UserError(f"{self._source.name(int(self._positions[row]))}: {image}{HINT}")
        return image

    # Other forms of the data set

    @property
    def is_stochastic(self) -> bool:
        return self._binarize == "drawn"

    def grey(self) -> ImageDataset:
        """Return the images as they are without `data.binarize`."""
        found = copy.copy(self)
        found._binarize = None
        return found

    def whole_images(self, indices: Indices) -> LazyImages:
        """Return images at their own size, read on access; stochastic ones depend on their pixels alone."""
        rows, how = self._positions[self._rows_of(indices)].tolist(), self._binarize
        found = read_whole(self._source, rows, self.names(indices), self.spec, HINT)
        return found if how is None else replace(found, read=lambda k: binarize(found.read(k)[None], how)[0])

    def preload(self, rows: Tensor, group: ProcessGroup) -> ImageDataset:
        """Load the images at `rows` `(n,)` into memory as a data set. Each image is decoded by one process."""
        parts = group.map(lambda part: self.grey().pixels(part).numpy(), rows.split(CHUNK))
        found = copy.copy(self)
        found.labels = None if self.labels is None else self.labels[rows]
        found._positions, found._pixels = self._positions[rows.numpy()], torch.from_numpy(np.concatenate(parts))
        found.units = self.units[rows.numpy()]
        return found

    def split_into_frames(self) -> ImageDataset:
        """Return the frames of clips, each an image; images stay as they are."""
        frames, found = self.spec.frames, copy.copy(self)
        found.spec, found._source = self.spec.frame, self._source.split_clips()
        found.labels = None if self.labels is None else self.labels.repeat_interleave(frames)
        found._positions = (self._positions[:, None] * frames + np.arange(frames)).ravel()
        found.units = self.units.repeat(frames)
        found._pixels = None if self._pixels is None else self._pixels.view(-1, *found.spec.shape)
        return found


def prepare_images(pixels: Tensor, changes: Tensor | None, config: AugmentConfig) -> Tensor:
    """Convert `pixels` `(B, ..., C, H, W)`, uint8 or float in [-1, 1], to floats in [-1, 1], augmented by `changes`,
    from `draw_changes`, on their device. All frames of a clip move in the same way. The result for an image is the same
    to the bit in any batch."""
    if changes is None:
        return to_float(pixels)
    flat, changes = pixels.flatten(0, -4), changes.repeat_interleave(math.prod(pixels.shape[1:-3]), 0)
    if config.flip:  # flip the bytes, a quarter of the size of the floats
        flat = mirror_images(flat, changes)
    images = move_images(to_float(flat), changes) if config.moves else to_float(flat)
    return images.view(pixels.shape)


@dataclass(frozen=True)
class Splits:
    """Disjoint sets of images for training, for evaluation and, if any, for choosing the best weights. facts, note,
    is_carved: see `Division`."""

    train: ImageDataset
    held_out: ImageDataset
    validation: ImageDataset | None = None
    facts: SplitFacts | None = None
    note: str | None = None
    is_carved: bool = False

    def by_name(self) -> dict[str, ImageDataset]:
        """Return the splits that exist, by name, `train` first."""
        parts = {"train": self.train, "validation": self.validation, "held_out": self.held_out}
        return {name: images for name, images in parts.items() if images is not None}

    def write_bad_images(self, folder: Path) -> None:
        write_bad_images(folder, {name: images.bad for name, images in self.by_name().items()})


def require_same_values(splits: Splits, tokenizer: Any, whose: str = "pipeline") -> Splits:
    """Return the splits. Raises `UserError` if their type and range, perhaps measured, are not the tokenizer's."""
    require_spec(tokenizer.spec, splits.train.spec, whose)
    return splits


def report_division(splits: Splits) -> None:
    """Print how many units each part has, what has changed since an earlier step, and the classes without training
    images."""
    if not is_first_process():
        return
    if splits.note:
        tell(splits.note)
    train = splits.train
    if splits.facts is not None:
        print(splits.facts.describe(), flush=True)
    elif splits.is_carved:
        tell(f"{train.config.source} is divided as in 0.3, by position: added images would move others")
    if train.labels is not None:
        warn_about_absent(train.class_names, {*train.labels.tolist()})


def warn_about_colour(images: ImageDataset) -> None:
    """Print one line if most of a sample of the images are coloured but are converted to grey."""
    if not (images.spec.is_picture and images.spec.channels == 1) or not is_first_process():
        return
    decoded = images.decode(spread_rows(len(images), COLOUR_SAMPLE).tolist(), replace(images.spec, channels=3))
    coloured = [int(np.ptp(image, axis=-3).max()) > GREY_SPREAD for image in decoded if not isinstance(image, str)]
    if 2 * sum(coloured) > len(coloured):
        tell("warning: data.channels=1 converts these colour images to grey; data.channels=3 keeps the colours")
