"""An image data set: uint8 in, float in [-1, 1] out. Training batches travel as bytes, and become floats on the device.

`load_images` finds the source (embedded digits, a local folder, parquet, a Hub id), decodes every image once so that
bad ones are known before training starts, and keeps the pixels in memory if they fit. With `data.streaming` images are
read only when they are needed, and bad ones are replaced (`streamed`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.files import one_line

from ..config import UserError, is_first_process
from ..shuffling import positions_of, samples_of
from .augment import AugmentConfig, draw_changes, mirror_images, move_images
from .bad import Report, append_report
from .base import WORKERS, DataConfig, Rows
from .decoding import Decoded, try_decode
from .pictures import to_float

Indices = Sequence[int] | NDArray[np.int64] | Tensor


class ImageDataset:
    """Images of one shape with optional labels, addressed by index.

    Attributes: `labels` (n,) int64 or None, `class_names`, `image_shape` (C, H, W).
    """

    finds_alone = False
    """Whether each process finds its own bad images."""

    def __init__(
        self, config: DataConfig, rows: Rows, decoded: Decoded, labels: NDArray[np.int64] | None, class_names: list[str]
    ) -> None:
        self.image_shape = config.image_shape
        self.labels = torch.from_numpy(labels) if labels is not None else None
        self.class_names = class_names
        self._report = decoded.report
        self._rows = rows
        self._positions = decoded.positions
        self._pixels = decoded.pixels
        self._augment = config.augment
        path = config.path
        self._folder = path if path is None or path.is_dir() else path.parent
        self._reported = 0

    @property
    def report(self) -> Report:
        """The number of images that were looked at, and the bad ones."""
        return self._report

    def __len__(self) -> int:
        return len(self._positions)

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices and epochs, each `(batch_size,)`, of one step's global batch: a function of the arguments."""
        return samples_of(len(self), batch_size, seed, step)

    def names(self, indices: Indices) -> list[str]:
        """What each image is called: the path of its file within the source, or its row of a table."""
        rows = self._positions[positions_of(indices, len(self))].tolist()
        folders = () if self._folder is None else (str(self._folder), os.path.abspath(self._folder))
        roots = [os.path.join(folder, "") for folder in folders]
        names = [name for name, _ in self._rows.read(rows)]
        return [next((name.removeprefix(root) for root in roots if name.startswith(root)), name) for name in names]

    def pixels(self, indices: Indices) -> Tensor:
        """The images as uint8 (B, C, H, W). Raises IndexError, or UserError if a file has changed since the start."""
        wanted = positions_of(indices, len(self))
        if self._pixels is not None:
            return self._pixels[torch.from_numpy(wanted)]
        images = [self._replaced(k, *found) for k, found in zip(wanted.tolist(), self._decoded(wanted), strict=True)]
        return torch.from_numpy(np.stack(images)) if images else torch.empty((0, *self.image_shape), dtype=torch.uint8)

    def _decoded(self, indices: NDArray[np.int64]) -> list[tuple[str, NDArray[np.uint8] | str]]:
        """(path or row, pixels or the reason why there are none) of each image."""
        named = self._rows.read(self._positions[indices].tolist())
        with ThreadPoolExecutor(WORKERS) as pool:
            images = pool.map(partial(try_decode, shape=self.image_shape), [payload for _, payload in named])
            return [(name, image) for (name, _), image in zip(named, images, strict=True)]

    def _replaced(self, index: int, name: str, image: NDArray[np.uint8] | str) -> NDArray[np.uint8]:
        """The image; raises `UserError` if it cannot be decoded."""
        if isinstance(image, str):
            raise UserError(one_line(f"{name}: {image}; it could be decoded when the run started"))
        return image

    def batch(self, indices: Indices, *, seed: int = 0, epoch: int = 0, augment: bool = False) -> Tensor:
        """The images as float32 (B, C, H, W) in [-1, 1]. Augmentation depends on (seed, epoch, index) alone."""
        return self.prepare(*self.raw_batch(indices, epoch, seed, augment=augment))

    def raw_batch(
        self, indices: Indices, epochs: NDArray[np.int64] | int, seed: int, *, augment: bool = True
    ) -> tuple[Tensor, ...]:
        """What `prepare` makes a batch of: the images as uint8 (B, C, H, W) and, where they are augmented in their
        `epochs`, (B,) or one for all, what happens to them."""
        pixels, wanted = self.pixels(indices), positions_of(indices, len(self))
        changes = draw_changes(wanted, epochs, self._augment, seed) if augment else None
        return (pixels,) if changes is None else (pixels, changes)

    def prepare(self, pixels: Tensor, changes: Tensor | None = None) -> Tensor:
        """The images of a `raw_batch` as float32 (B, C, H, W) in [-1, 1], on the device where the batch is."""
        return prepare_images(pixels, changes, self._augment)

    def write_report(self, folder: Path, split: str) -> None:
        """Append the bad images found since the last call to `bad_images.jsonl` in the folder."""
        problems = self.report.problems
        if len(problems) > self._reported:
            new, self._reported = problems[self._reported :], len(problems)
            if self.finds_alone or is_first_process():
                append_report(folder, split, new)


def prepare_images(pixels: Tensor, changes: Tensor | None, config: AugmentConfig) -> Tensor:
    """uint8 `pixels` (B, C, H, W) as floats in [-1, 1], augmented by `changes` (`draw_changes`), on the device of both.

    The result for an image is the same, bit for bit, in any batch.
    """
    if changes is not None and config.flip:  # of bytes, which are a quarter of the floats
        pixels = mirror_images(pixels, changes)
    images = to_float(pixels)
    return images if changes is None or not config.moves else move_images(images, changes)


@dataclass(frozen=True)
class Splits:
    """The images to train on, those to evaluate on, and, if any, those that choose the best weights; no image is in two
    of them."""

    train: ImageDataset
    held_out: ImageDataset
    validation: ImageDataset | None = None

    def named(self) -> dict[str, ImageDataset]:
        """The splits that exist, by name, `train` first."""
        parts = {"train": self.train, "validation": self.validation, "held_out": self.held_out}
        return {name: images for name, images in parts.items() if images is not None}

    def write_report(self, folder: Path) -> None:
        """Append the bad images found since the last call to `bad_images.jsonl` in the folder."""
        for name, images in self.named().items():
            images.write_report(folder, name)
