"""Crops of images at their own scale: random ones to train on, and a centred grid of them to evaluate on.

Row r is crop r mod K of image r // K. The place of a training crop is a function of (seed, epoch, row), like an
augmentation. Whole images stay in memory if they fit, and are otherwise decoded for each crop.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.files import one_line

from ..config import UserError
from ..shuffling import DRAWS, positions_of, uniforms
from .augment import draw_changes
from .dataset import (
    UNCHANGED,
    DataConfig,
    ImageDataset,
    Indices,
    Splits,
    check_bad,
    number_labels,
    open_source,
    settle_values,
)
from .decoding import CHUNK, WORKERS, BadImage, Decoded, Pixels, Rows, try_decode_whole
from .splits import Inherited, choose_splits

DOWN, RIGHT = DRAWS, DRAWS + 1
"""Columns of the random numbers of a row for the place of its crop, after those of its augmentation."""
Epochs = NDArray[np.int64] | int


def load_crops(
    config: DataConfig, inherited: Inherited | None = None, *, check: bool = True, together: bool = False
) -> Splits:
    """Return the crops of each split; like `load_images` for a config with `crop`."""
    division = choose_splits(open_source(config), config, inherited)
    parts = division.parts
    config = settle_values(config, parts["train"])
    opened = {id(part.rows): part.rows for part in parts.values()}
    numbered, class_names = number_labels(list(opened.values()))
    labels = dict(zip(opened, numbered, strict=True))
    decoded, whole, room = dict[str, Decoded](), dict[str, list[Pixels | None]](), config.cache_mb * 2**20
    for name, (rows, positions, _) in parts.items():
        if check or config.on_error == "skip":
            decoded[name], whole[name] = decode_whole(rows, positions, config, room if check else 0, together)
        else:
            decoded[name], whole[name] = Decoded(positions, None, []), [None] * len(positions)
        room -= sum(image.nbytes for image in whole[name] if image is not None)
    check_bad([(part.bad, len(parts[name].positions)) for name, part in decoded.items()], config)
    datasets = dict[str, ImageDataset]()
    for name, (rows, _, units) in parts.items():
        ids, good = labels[id(rows)], decoded[name]
        own = None if ids is None else ids[good.positions]
        datasets[name] = CropImages(config, rows, good, own, class_names, units, whole[name], random=name == "train")
    return Splits(**datasets, facts=division.facts, note=division.note, is_carved=division.is_carved)


def decode_whole(
    rows: Rows, positions: NDArray[np.int64], config: DataConfig, room: int, together: bool = False
) -> tuple[Decoded, list[Pixels | None]]:
    """Decode images at their own size. Return the good and the bad ones, and the pixels of the good ones, None for
    those beyond `room` bytes. together: all processes call this; each checks a share of those beyond."""
    share = together and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    bad, kept, is_full = list[tuple[int, BadImage]](), dict[int, Pixels](), False

    def decode(some: NDArray[np.int64]) -> list[Pixels | str]:
        return [read_whole(rows, int(row), config) for row in some]

    with ThreadPoolExecutor(WORKERS) as pool:
        for number, start in enumerate(range(0, len(positions), CHUNK)):  # the images of one chunk in memory
            if is_full and number % world != rank:
                continue
            some = positions[start : start + CHUNK]
            images = [image for part in pool.map(decode, np.array_split(some, WORKERS)) for image in part]
            for k, image in enumerate(images, start):
                if isinstance(image, str):
                    row = int(positions[k])
                    bad.append((k, BadImage(rows.name(row), row, image)))
                elif image.nbytes <= room and not is_full:
                    kept[k], room = image, room - image.nbytes
                else:
                    is_full = True
    if share:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, bad)
        bad = sorted(set(chain.from_iterable(parts)))
    good = np.setdiff1d(np.arange(len(positions)), [k for k, _ in bad])
    return Decoded(positions[good], None, [image for _, image in bad]), [kept.get(k) for k in good.tolist()]


def read_whole(rows: Rows, row: int, config: DataConfig) -> Pixels | str:
    """Return an image (C, H, W) at its own size, enlarged if it is smaller than a crop; or why it cannot be decoded."""
    return try_decode_whole(rows.read([row])[0], config.spec, config.spec.size)


class CropImages(ImageDataset):
    """Crops of images: `crops_per_image` of each, at `random` places or, else, the largest square grid of at most that
    many, evenly spread (one: the centre). `pixels` draws the places of seed 0 and epoch 0."""

    def __init__(
        self,
        config: DataConfig,
        rows: Rows,
        decoded: Decoded,
        labels: NDArray[np.int64] | None,
        class_names: list[str],
        units: NDArray[np.uint64],
        whole: list[Pixels | None],
        *,
        random: bool,
    ) -> None:
        side = math.isqrt(config.crops_per_image)
        self._per_image, self._side = config.crops_per_image if random else side**2, 0 if random else side
        repeated = Decoded(decoded.positions.repeat(self._per_image), None, decoded.bad)
        own = None if labels is None else labels.repeat(self._per_image)
        super().__init__(config, rows, repeated, own, class_names, units)
        self._whole, self._config = whole, config

    def pixels(self, indices: Indices) -> Tensor:
        """Return crops (B, C, H, W), as `ImageDataset.pixels` returns images."""
        return self.crop(positions_of(indices, len(self)), 0, 0)

    def raw_batch(self, indices: Indices, epochs: Epochs, seed: int, *, augment: bool = True) -> tuple[Tensor, ...]:
        """See `ImageDataset.raw_batch`. Random places depend on (seed, epoch, index), with or without `augment`."""
        wanted = positions_of(indices, len(self))
        pixels = self.crop(wanted, epochs, seed)
        changes = draw_changes(wanted, epochs, self._augment, seed) if augment and self._augment != UNCHANGED else None
        return (pixels,) if changes is None else (pixels, changes)

    def crop(self, rows: NDArray[np.int64], epochs: Epochs, seed: int) -> Tensor:
        """Return the crops (B, C, H, W) of `rows` (B,). epochs: (B,), or one for all."""
        if self._pixels is not None:  # preloaded
            return self._pixels[torch.from_numpy(rows)]
        places = self.places(rows, epochs, seed)
        found = np.empty((len(rows), *self.spec.shape), self.spec.stored_type)
        missing = [at for at, row in enumerate(rows) if self._whole[row // self._per_image] is None]
        once = sorted({int(self._positions[rows[at]]) for at in missing})  # a batch may have several crops of an image
        for start in range(0, len(once), WORKERS):  # few large images in memory
            some = once[start : start + WORKERS]
            with ThreadPoolExecutor(WORKERS) as pool:
                images = dict(zip(some, pool.map(self._read, some), strict=True))
            for at in missing:
                if (image := images.get(int(self._positions[rows[at]]))) is not None:
                    found[at] = self._cut(image, places[at])
        for at, row in enumerate(rows):
            if (image := self._whole[row // self._per_image]) is not None:
                found[at] = self._cut(image, places[at])
        return torch.from_numpy(found)

    def places(self, rows: NDArray[np.int64], epochs: Epochs, seed: int) -> NDArray[np.float64]:
        """Return where crops lie in the room that they have down and right, (B, 2) in [0, 1)."""
        if self._side:
            return (np.stack(np.divmod(rows % self._per_image, self._side), 1) + 0.5) / self._side
        draws, epochs = np.empty((len(rows), 2)), np.broadcast_to(epochs, rows.shape)
        for epoch in np.unique(epochs):
            draws[epochs == epoch] = uniforms(seed, int(epoch), rows[epochs == epoch], columns=(DOWN, RIGHT))
        return draws

    def centres(self, rows: NDArray[np.int64], epoch: int, seed: int) -> Tensor:
        """Return where the centres of crops are in their images, from 0 to 1 down and right, float32 (B, 2)."""
        owners, first = np.unique(rows // self._per_image, return_index=True)

        def size_of(row: int) -> tuple[int, ...]:
            image = self._whole[row // self._per_image]
            return (self._read(int(self._positions[row])) if image is None else image).shape[1:]

        with ThreadPoolExecutor(WORKERS) as pool:
            sizes = np.array(list(pool.map(size_of, rows[first].tolist())))
        sizes = sizes[np.searchsorted(owners, rows // self._per_image)]
        tile = np.array(self.spec.size)
        corners = self._corners(sizes, self.places(rows, epoch, seed))
        return torch.from_numpy(((corners + tile / 2) / sizes).astype(np.float32))

    def _corners(self, sizes: NDArray[np.int64], places: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the upper left pixels (..., 2) of crops of images of these sizes (..., 2)."""
        room = sizes - np.array(self.spec.size) + 1  # places along each side, all equally likely
        return (places * room).astype(np.int64)

    def _cut(self, image: Pixels, place: NDArray[np.float64]) -> Pixels:
        height, width = self.spec.size
        top, left = self._corners(np.array(image.shape[1:]), place)
        return image[:, top : top + height, left : left + width]

    def _read(self, row: int) -> Pixels:
        image = read_whole(self._rows, row, self._config)
        if isinstance(image, str):
            raise UserError(one_line(f"{self._rows.name(row)}: {image} (data.on_error=skip skips such images)"))
        return image
