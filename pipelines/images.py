"""An image data set: uint8 in, float in [-1, 1] out.

`load_images` finds the source (embedded digits, a local folder, parquet, a Hub id), decodes every image once so that
bad ones are known before training starts, and keeps the pixels in memory when they fit. With `data.streaming` images
are read when they are due, and bad ones replaced (`streamed`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .augment import augment_images, splitmix64
from .bad_images import append_report
from .config import UserError, is_first_process
from .decoding import WORKERS, Decoded, Problem, Report, decode_all, pixels_of, try_decode
from .schedule import samples_of
from .sources import DataConfig, Rows, SplitRows, open_source
from .splits import held_out_split, tell_splits, validation_count
from .streaming import drawn_by_blocks

__all__ = ["DataConfig", "ImageDataset", "Splits", "check_shape", "load_images", "pixels_of", "to_float", "to_uint8"]

Indices = Sequence[int] | NDArray[np.int64] | Tensor


class ImageDataset:
    """Images of one shape with optional labels, addressed by index.

    Attributes: `labels` (n,) int64 or None, `class_names`, `image_shape` (C, H, W).
    """

    finds_alone = False
    """Whether each process finds bad images of its own."""

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
        self._reported = 0

    @property
    def report(self) -> Report:
        """How many images were looked at, and which of them are bad."""
        return self._report

    def __len__(self) -> int:
        return len(self._positions)

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices and epochs, each `(batch_size,)`, of one step's global batch: a function of the arguments."""
        return samples_of(len(self), batch_size, seed, step)

    def pixels(self, indices: Indices) -> Tensor:
        """The images as uint8 (B, C, H, W). Raises IndexError, or UserError if a file has changed since the start."""
        wanted = self._check(indices)
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
        """The image; raises `UserError` if it is none."""
        if isinstance(image, str):
            raise UserError(f"{name}: {image}; it could be decoded when the run started")
        return image

    def batch(self, indices: Indices, *, seed: int = 0, epoch: int = 0, augment: bool = False) -> Tensor:
        """The images as float32 (B, C, H, W) in [-1, 1]. Augmentation depends on (seed, epoch, index) alone."""
        images = to_float(self.pixels(indices))
        return augment_images(images, self._check(indices), self._augment, seed, epoch) if augment else images

    def write_report(self, folder: Path, split: str) -> None:
        """Add the bad images that were found since the last time to `bad_images.jsonl` in the folder."""
        problems = self.report.problems
        if len(problems) > self._reported:
            new, self._reported = problems[self._reported :], len(problems)
            if self.finds_alone or is_first_process():
                append_report(folder, split, new)

    def _check(self, indices: Indices) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"indices go from {wanted.min()} to {wanted.max()}; there are {len(self)} images")
        return wanted


@dataclass(frozen=True)
class Splits:
    """The images to train on, the ones to evaluate on, and those by which training chooses, if there are any; no image
    is in two of them."""

    train: ImageDataset
    held_out: ImageDataset
    validation: ImageDataset | None = None

    def named(self) -> dict[str, ImageDataset]:
        """Those that there are, by name; the one to train on comes first."""
        parts = {"train": self.train, "validation": self.validation, "held_out": self.held_out}
        return {name: images for name, images in parts.items() if images is not None}

    def write_report(self, folder: Path) -> None:
        """Add the bad images that were found since the last time to `bad_images.jsonl` in the folder."""
        for name, images in self.named().items():
            images.write_report(folder, name)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)  # in place, which takes less than half of the time


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_float`, exact on its values: floats are clamped to [-1, 1] and rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_images(config: DataConfig, *, begun: bool = False) -> Splits:
    """Find the source, decode every image once and return its splits.

    begun: whether a run goes on with them, which is to hold out what it did; see `held_out_split`. Raises UserError for
    a source that is missing or empty or lacks a split, for labels that are missing or negative, and for images that
    can not be decoded (with `on_error=skip`, only if they are more than `max_bad_fraction`).
    """
    parts = choose_splits(open_source(config), config, begun)
    opened = {id(rows): rows for rows, _ in parts.values()}
    numbered, class_names = number_labels(list(opened.values()))
    labels = dict(zip(opened, numbered, strict=True))
    if config.streaming:
        from .streamed import StreamedImages

        streamed = {
            name: StreamedImages(config, rows, positions, chosen(labels[id(rows)], positions), class_names)
            for name, (rows, positions) in parts.items()
        }
        return Splits(**streamed)
    decoded, room = {}, config.cache_mb * 2**20
    for name, (rows, positions) in parts.items():
        decoded[name] = decode_all(rows, positions, config.image_shape, room)
        room -= part.nbytes if (part := decoded[name].pixels) is not None else 0
    judge([part.report for part in decoded.values()], config)
    read = {
        name: ImageDataset(config, rows, decoded[name], chosen(labels[id(rows)], decoded[name].positions), class_names)
        for name, (rows, _) in parts.items()
    }
    return Splits(**read)


def chosen(labels: NDArray[np.int64] | None, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The labels of the rows at `positions`, where there are labels."""
    return None if labels is None else labels[positions]


def check_shape(config: DataConfig, shape: tuple[int, int, int], whose: str = "pipeline") -> None:
    """Raise `UserError` unless the images will have the `shape` (C, H, W) that the tokenizer or pipeline takes."""
    if config.image_shape != shape:
        raise UserError(
            f"data.image_size, data.channels: the {whose}'s images are {shape} (channels, height, width), these are "
            f"{config.image_shape}"
        )


# splits and labels --------------------------------------------------------------------------------


def choose_splits(
    splits: SplitRows, config: DataConfig, begun: bool = False
) -> dict[str, tuple[Rows, NDArray[np.int64]]]:
    """The rows of `train`, of `validation` where there are any, and of `held_out`, each with the positions to use.
    Raises `UserError`."""
    if config.split not in splits:
        raise UserError(f"data.split: the source has no split {config.split!r}; it has {', '.join(splits)}")
    fraction, found = config.held_out_fraction, held_out_split(splits, config, begun=begun)
    tell_splits(splits, config, found, f"{100 * fraction:.3g}% of {config.split!r}", "held out")
    rows = splits[config.split]()
    count = 0 if found is not None else min(max(1, round(rows.size * fraction)), rows.size)
    positions = carve(rows, count, validation_count(rows.size, config.validation_fraction))
    parts = {name: (rows, part) for name, part in positions.items()}
    if found is not None:
        other = splits[found]()
        parts["held_out"] = other, np.arange(other.size)
    for part, name in (("train", config.split), ("held_out", found or "held_out")):
        if not len(parts[part][1]):
            raise UserError(f"data: no images for {name!r} (the split {config.split!r} has {rows.size})")
    return {name: (source, part[: config.limit]) for name, (source, part) in parts.items() if len(part)}


def carve(rows: Rows, held_out: int, validation: int) -> dict[str, NDArray[np.int64]]:
    """The positions of `rows` divided into `train`, `validation` and `held_out`, at random but always alike; each part
    ascends. The two that are carved grow from the two ends of one order, so that neither depends on the size of the
    other. Rows in blocks are divided by whole blocks, but for one that each part cuts.
    """
    order = drawn(rows.size) if rows.blocks is None else drawn_by_blocks(rows.blocks)
    parts = {
        "train": order[held_out : max(held_out, rows.size - validation)],
        "validation": order[max(held_out, rows.size - validation) :],
        "held_out": order[:held_out],
    }
    return {name: np.sort(part) for name, part in parts.items()}


def drawn(size: int) -> NDArray[np.int64]:
    """The positions below `size` in an order that is drawn at random but always alike."""
    return np.argsort(splitmix64(np.arange(size, dtype=np.uint64)), kind="stable")


def number_labels(parts: list[Rows]) -> tuple[list[NDArray[np.int64] | None], list[str]]:
    """Class ids for every row of every part, and the names of the classes, which all parts share."""
    names = parts[0].class_names
    if names is not None:
        known: list[Any] = list(range(len(names)))
    else:
        known = sorted({label for rows in parts for label in rows.labels or [] if is_label(label)})
    ids = {label: number for number, label in enumerate(known)}
    for rows in parts:
        for row, label in enumerate(rows.labels or []):
            if not is_label(label) or label not in ids:
                allowed = f"0 to {len(names) - 1}" if names is not None else "a string, or an integer from 0"
                raise UserError(
                    f"{rows.read([row])[0][0]}: the label is {label!r}, allowed is {allowed}; "
                    f"data.label_column=null uses the images without labels"
                )
    numbered = [None if r.labels is None else np.array([ids[label] for label in r.labels], np.int64) for r in parts]
    return numbered, names or [str(label) for label in known]


def is_label(label: Any) -> bool:
    """Whether a value can be a class: a name, or a whole number that is not negative."""
    return isinstance(label, str) or (isinstance(label, int) and label >= 0)


# bad images ---------------------------------------------------------------------------------------


def judge(reports: list[Report], config: DataConfig) -> None:
    """Stop, or warn, if images are bad."""
    found, problems = sum(r.found for r in reports), [problem for r in reports for problem in r.problems]
    if not problems:
        return
    counted = f"{len(problems)} of {found} images can not be decoded"
    if config.on_error == "fail":
        raise UserError(f"{counted} (data.on_error=skip leaves them out):{listed(problems)}")
    if len(problems) > config.max_bad_fraction * found or any(r.found == r.bad for r in reports):
        raise UserError(
            f"{counted}, more than data.max_bad_fraction={config.max_bad_fraction} allows:{listed(problems)}"
        )
    if is_first_process():
        first = problems[0]
        print(f"warning: {counted} and are left out; the first is {first.path}: {first.reason}", file=sys.stderr)


def listed(problems: list[Problem]) -> str:
    """A line for each of the first ten, and how many more there are."""
    more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "".join(f"\n  {problem.path}: {problem.reason}" for problem in problems[:10]) + more
