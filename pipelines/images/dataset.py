"""An image data set: which images there are, which are trained on, and batches of them.

`load_images` finds the source (digits, a folder, tables), chooses its splits or holds part of one out, numbers the
classes, and decodes every image once, so that bad ones are known before training starts; pixels stay in memory if they
fit. Batches travel as uint8, and become augmented floats in [-1, 1] on the device. With `data.streaming` shards are
read in sequence instead (`streaming`).
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from tokenizer.files import PathError, one_line, quote

from ..config import Config, UserError, is_first_process, tell
from ..files import replace_file
from ..shuffling import positions_of, samples_of, splitmix64
from . import tables
from .augment import AugmentConfig, draw_changes, mirror_images, move_images
from .decoding import CHUNK, IMAGE, LABEL, BadImage, Decoded, Rows, SplitRows, decode_all, decode_in_threads
from .folder import holds_files, open_folder
from .pictures import to_float

if TYPE_CHECKING:
    from ..processes.group import ProcessGroup

Side = Annotated[int, Field(ge=4, le=4096)]
Indices = Sequence[int] | NDArray[np.int64] | Tensor

VALIDATION_NAMES = ("validation", "val", "valid", "dev")
"""Names of a split to evaluate on if there is no `test`."""
SHARE, LEAST, MOST = 0.05, 10, 2000
"""The share of the split to train on that is kept for validation, and its limits: fewer than 10 images would choose by
chance, and figures while training use at most 2,000."""
LONGEST, JOINER = 200, "\u200d"  # a joiner, which is not printable by itself, makes one emoji of two
WITHOUT = "data.label_column=null uses all images without labels"
BAD_IMAGES = "bad_images.jsonl"
UNCHANGED = AugmentConfig()


class DataConfig(Config):
    """Which images, and in what shape."""

    # `default=` is written out: it is how a type checker knows, in a user's script, what may be left out.

    source: str = Field(
        default="digits",
        description="`digits` (5,000 MNIST digits), a folder of images, parquet or webdataset (.tar) files as a file, "
        "folder, pattern or URL, or a Hub id",
    )
    streaming: bool = Field(
        default=False,
        description="for shards (parquet, .tar) that do not fit on the disk: read them in sequence, in an approximate "
        "order, and check nothing beforehand; of a folder of image files only the check is left out",
    )
    shuffle_window: int = Field(
        default=10_000,
        ge=1,
        description="with streaming, images are shuffled among this many, which are kept in memory, encoded",
    )
    split: str = Field(
        default="train",
        description="the split to train on; in a folder of images, a folder of that name, or for `train` all of it",
    )
    held_out: str | None = Field(
        default=None,
        description="the split to evaluate on; null: `test`, or where there is none the only one of "
        "validation, val, valid, dev; where there is none of these either, part of `split` is held out",
    )
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1, description="the share of `split` that is held out")
    validation_fraction: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="the share of `split` that is kept from training to choose the best weights; null: a twentieth, if "
        "that is 10 images or more, but at most 2,000; 0: none, and the held-out images are used instead",
    )
    image_size: Side | tuple[Side, Side] = Field(
        default=28, description="height and width, one number or [height, width]; others are resized and cropped"
    )
    channels: Literal[1, 3] = Field(default=1, description="1 for grey, 3 for RGB")
    image_column: str = Field(default=IMAGE, description="the column that holds the images; in a .tar, their suffix")
    label_column: str | None = Field(
        default=LABEL, description="the column that holds the classes; null for no classes"
    )
    augment: AugmentConfig = Field(default=AugmentConfig(), description="random changes of the training images")
    on_error: Literal["skip", "fail"] = Field(
        default="fail", description="what to do about images that cannot be decoded: leave them out, or end the run"
    )
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="with `skip`, a larger share of bad images is an error"
    )
    limit: int | None = Field(default=None, ge=1, description="use at most this many images of each split")
    cache_mb: int = Field(default=2048, ge=0, description="keep decoded images in memory up to this many MiB")

    @model_validator(mode="after")
    def _splits_differ(self) -> DataConfig:
        if self.split == self.held_out:
            raise ValueError(f"split and held_out are both {self.split!r}: evaluation needs images not trained on")
        return self

    @property
    def path(self) -> Path | None:
        """The path of the source on this machine; None for the digits, a Hub id, a pattern or a URL."""
        path = Path(os.path.expanduser(self.source))
        return path if self.source != "digits" and path.exists() else None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        return (self.channels, *size)


# Loading


def load_images(config: DataConfig, *, together: bool = False, stream: bool = False, check: bool = True) -> Splits:
    """Find the source, decode every image once and return its splits.

    together: all processes that were launched are here, each of which then decodes a share of what memory cannot keep.
    stream: with `data.streaming`, the images to train on come in sequence, as `StreamedImages`, and not the first 2,000
    of them in any order. check: False decodes no image before it is asked for, unless bad ones are to be left out.
    Raises `UserError` for a source that is missing, empty or lacks a split, for labels that are missing or negative,
    and for images that cannot be decoded (with `on_error=skip`, only if there are more than `max_bad_fraction`).
    """
    streamed: ImageDataset | None = None
    if is_stream(config):
        from .streaming import open_stream

        some, streamed = open_stream(config, stream)
        parts = {name: (rows, np.arange(rows.size)) for name, rows in some.items()}
    else:
        parts = choose_splits(open_source(config), config)
    opened = {id(rows): rows for rows, _ in parts.values()}
    numbered, class_names = number_labels(list(opened.values()))
    labels = dict(zip(opened, numbered, strict=True))
    decoded, room = dict[str, Decoded](), config.cache_mb * 2**20
    for name, (rows, positions) in parts.items():
        if streamed is None and (config.streaming or not check) and config.on_error == "fail":
            decoded[name] = Decoded(positions, None, [])
        else:
            decoded[name] = decode_all(rows, positions, config.image_shape, room if check else 0, together)
        room -= part.nbytes if (part := decoded[name].pixels) is not None else 0
    check_bad([(part.bad, len(parts[name][1])) for name, part in decoded.items()], config)
    datasets = dict[str, ImageDataset]()
    for name, (rows, _) in parts.items():
        ids = labels[id(rows)]
        of_good = None if ids is None else ids[decoded[name].positions]
        datasets[name] = ImageDataset(config, rows, decoded[name], of_good, class_names)
    if streamed is not None and stream:
        streamed.class_names = class_names
        datasets["train"] = streamed
    return Splits(**datasets)


def is_stream(config: DataConfig) -> bool:
    """Whether images come in sequence, from shards."""
    path = config.path
    return config.streaming and config.source != "digits" and not (path and path.is_dir() and holds_files(path))


def open_source(config: DataConfig) -> SplitRows:
    """Return the splits of `config.source` by name. A path that exists wins over a Hub id of the same name."""
    path = Path(os.path.expanduser(config.source))
    if config.source == "digits":
        return tables.digits()
    if path.is_dir() and holds_files(path):
        return open_folder(path, config)
    return tables.open_tables(config)


def check_shape(config: DataConfig, shape: tuple[int, int, int], whose: str = "pipeline") -> None:
    """Raise `UserError` unless the images will have the `shape` (C, H, W) that the tokenizer or pipeline takes."""
    if config.image_shape != shape:
        raise UserError(
            f"data.image_size, data.channels: the {whose}'s images are {shape} (channels, height, width), these are "
            f"{config.image_shape}"
        )


# The data set


class ImageDataset:
    """Images of one shape with optional labels, addressed by index.

    Attributes: `labels` (n,) int64 or None, `class_names`, `image_shape` (C, H, W), `bad`, the images left out.
    """

    def __init__(
        self, config: DataConfig, rows: Rows, decoded: Decoded, labels: NDArray[np.int64] | None, class_names: list[str]
    ) -> None:
        self.image_shape = config.image_shape
        self.labels = torch.from_numpy(labels) if labels is not None else None
        self.class_names = class_names
        self.bad = decoded.bad
        self._rows = rows
        self._positions = decoded.positions
        self._pixels = decoded.pixels
        self._augment = config.augment
        self._path = config.path

    def __len__(self) -> int:
        return len(self._positions)

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return indices and epochs, each `(batch_size,)`, of one step's global batch: a function of the arguments."""
        return samples_of(len(self), batch_size, seed, step)

    def examples(self, count: int, seed: int) -> Tensor:
        """Return up to `count` images, the same on all processes, as `batch` does."""
        return self.batch(self.samples(min(count, len(self)), seed, 0)[0])

    def names(self, indices: Indices) -> list[str]:
        """Return what each image is called: the path of its file within the source, or its row of a table."""
        rows = self._positions[positions_of(indices, len(self))].tolist()
        root = "" if self._path is None else os.path.join(self._path, "")
        return [self._rows.name(row).removeprefix(root) for row in rows]

    def pixels(self, indices: Indices) -> Tensor:
        """Return the images as uint8 (B, C, H, W). Raises `IndexError`, and `UserError` for a bad image."""
        wanted = positions_of(indices, len(self))
        if self._pixels is not None:
            return self._pixels[torch.from_numpy(wanted)]
        rows = self._positions[wanted].tolist()
        images = decode_in_threads(self._rows.read(rows), self.image_shape)
        for row, image in zip(rows, images, strict=True):
            if isinstance(image, str):
                raise UserError(
                    one_line(f"{self._rows.name(row)}: {image} (data.on_error=skip leaves such images out)")
                )
        return torch.from_numpy(np.stack(images)) if images else torch.empty((0, *self.image_shape), dtype=torch.uint8)

    def preload(self, rows: Tensor, group: ProcessGroup) -> ImageDataset:
        """The images at `rows` `(n,)` as a data set in memory: each is decoded by one process, and held by all."""
        parts = group.map(lambda part: self.pixels(part).numpy(), rows.split(CHUNK))
        found = copy.copy(self)
        found.labels = None if self.labels is None else self.labels[rows]
        found._positions, found._pixels = self._positions[rows.numpy()], torch.from_numpy(np.concatenate(parts))
        return found

    def batch(self, indices: Indices, *, seed: int = 0, epoch: int = 0, augment: bool = False) -> Tensor:
        """Return images as float32 (B, C, H, W) in [-1, 1]. Augmentation depends on (seed, epoch, index) alone."""
        return self.prepare(*self.raw_batch(indices, epoch, seed, augment=augment))

    def raw_batch(
        self, indices: Indices, epochs: NDArray[np.int64] | int, seed: int, *, augment: bool = True
    ) -> tuple[Tensor, ...]:
        """Return what `prepare` takes: images as uint8 (B, C, H, W) and, if they are augmented in their `epochs`, (B,)
        or one for all, the changes of each."""
        pixels, wanted = self.pixels(indices), positions_of(indices, len(self))
        changes = draw_changes(wanted, epochs, self._augment, seed) if augment and self._augment != UNCHANGED else None
        return (pixels,) if changes is None else (pixels, changes)

    def prepare(self, pixels: Tensor, changes: Tensor | None = None) -> Tensor:
        """Return a `raw_batch` as float32 (B, C, H, W) in [-1, 1], on the device where it is."""
        return prepare_images(pixels, changes, self._augment)


def prepare_images(pixels: Tensor, changes: Tensor | None, config: AugmentConfig) -> Tensor:
    """Return uint8 `pixels` (B, C, H, W) as floats in [-1, 1], augmented by `changes` (`draw_changes`), on the device
    of both. The result for an image is the same, bit for bit, in any batch."""
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

    def by_name(self) -> dict[str, ImageDataset]:
        """Return the splits that exist, by name, `train` first."""
        parts = {"train": self.train, "validation": self.validation, "held_out": self.held_out}
        return {name: images for name, images in parts.items() if images is not None}

    def write_bad_images(self, folder: Path) -> None:
        """Write `bad_images.jsonl` in a run folder, a line `{"split", "path", "row", "reason"}` for each image that was
        left out; nothing if there is none."""
        lines = [
            json.dumps({"split": name, **bad._asdict()})
            for name, images in self.by_name().items()
            for bad in images.bad
        ]
        if lines:
            try:
                replace_file(folder / BAD_IMAGES, "".join(line + "\n" for line in lines).encode())
            except (OSError, PathError) as error:
                tell(f"warning: {folder / BAD_IMAGES} cannot be written: {error}")


# Bad images


def check_bad(parts: list[tuple[list[BadImage], int]], config: DataConfig) -> None:
    """Raise `UserError` if bad images are not allowed or too many; else warn if there are any. parts: the bad images of
    each split, and how many images it had with them."""
    bad, found = [image for images, _ in parts for image in images], sum(count for _, count in parts)
    if not bad:
        return
    counted = f"{len(bad)} of {found} images cannot be decoded"
    if config.on_error == "fail":
        raise UserError(f"{counted} (data.on_error=skip leaves them out):{list_bad(bad)}")
    if len(bad) > config.max_bad_fraction * found:
        raise UserError(
            f"{counted}, more than data.max_bad_fraction={config.max_bad_fraction} allows (raise it to leave them all "
            f"out):{list_bad(bad)}"
        )
    if any(len(images) == count for images, count in parts):
        raise UserError(f"{counted}, all of a part that is trained on or held out:{list_bad(bad)}")
    if is_first_process():
        tell(one_line(f"warning: {counted} and are left out; the first is {bad[0].path}: {bad[0].reason}"))


def list_bad(bad: list[BadImage]) -> str:
    """Return a line for each of the first ten bad images, and the number of further ones."""
    more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
    return "".join("\n  " + one_line(f"{image.path}: {image.reason}") for image in bad[:10]) + more


# Splits: choices (figures while training, the best weights) use `validation` images, which are carved from the split to
# train on; reported results use the held-out images.


def choose_splits(
    splits: SplitRows, config: DataConfig, quiet: bool = False
) -> dict[str, tuple[Rows, NDArray[np.int64]]]:
    """Return the rows of `train`, `held_out` and, if there are any, `validation`, each with the positions to use.
    quiet: without a line about what is not as expected. Raises `UserError`."""
    require_split(splits, config)
    found = choose_held_out(splits, config)
    if not quiet:
        say_splits(splits, config, found, f"{100 * config.held_out_fraction:.3g}% of {config.split!r}", "held out")
    rows = splits[config.split]()
    count = 0 if found is not None else min(max(1, round(rows.size * config.held_out_fraction)), rows.size)
    positions = carve(rows.size, count, validation_count(rows.size, config.validation_fraction))
    parts = {name: (rows, part) for name, part in positions.items()}
    if found is not None:
        other = splits[found]()
        parts["held_out"] = other, np.arange(other.size)
    for part, name in (("train", config.split), ("held_out", found or "held_out")):
        if not len(parts[part][1]):
            raise UserError(f"data: no images for {name!r} (the split {config.split!r} has {rows.size})")
    return {name: (source, part[: config.limit]) for name, (source, part) in parts.items() if len(part)}


def require_split(names: Collection[str], config: DataConfig) -> None:
    """Raise `UserError` if there is no split to train on."""
    if config.split not in names:
        raise UserError(f"data.split: the source has no split {config.split!r}; it has {', '.join(names)}")


def choose_held_out(names: Collection[str], config: DataConfig) -> str | None:
    """Return the split among `names` to evaluate on; None if part of `config.split` is to be held out.

    Raises `UserError` if `config.held_out` names a split that does not exist. `test` is allowed, and asks for part of
    `config.split`.
    """
    others, wanted = [name for name in names if name != config.split], config.held_out
    if wanted is None:
        found = ["test"] if "test" in others else [name for name in VALIDATION_NAMES if name in others]
        return found[0] if len(found) == 1 else None
    if wanted in others:
        return wanted
    if wanted != "test":
        near = nearest_name(wanted, others)
        hint = f"; did you mean {near!r}?" if near else ""
        part = "" if "test" in others else f" (data.held_out=test holds out part of {config.split!r})"
        raise UserError(
            f"data.held_out: {config.source} has no split {wanted!r}; it has {', '.join(names)}{hint}{part}"
        )
    return None


def nearest_name(wanted: str, names: list[str]) -> str | None:
    """Return the split that was probably meant, if one has a similar name; those of validation splits count as the same
    name."""
    known = {name: name for name in names}
    there = [name for name in VALIDATION_NAMES if name in names]
    if len(there) == 1:
        known |= dict.fromkeys(VALIDATION_NAMES, there[0])
    near = difflib.get_close_matches(wanted, known, 1)
    return known[near[0]] if near else None


def say_splits(names: Collection[str], config: DataConfig, found: str | None, part: str, use: str) -> None:
    """Print one line about what replaces `test` and which splits are not used; nothing if this is as expected or as
    configured. part: what is used if no split was `found`; use: what it is used for."""
    left = [name for name in names if name not in (config.split, found)]
    usual = found == "test" or (found is None and not left)
    if (config.held_out is not None and found is not None) or (usual and not left) or not is_first_process():
        return
    why = "" if found == "test" else f"there is no {config.held_out or 'test'!r}, so "
    rest = f"; not used: {', '.join(left)}" if left else ""
    remedy = " (data.held_out=NAME takes another)" if left else ""
    taken = part if found is None else repr(found)
    tell(one_line(f"data.held_out: {config.source}: {why}{taken} is {use}{rest}{remedy}"))


def validation_count(size: int, fraction: float | None) -> int:
    """Return the number of validation images among the `size` images of the split to train on; see `DataConfig`."""
    if fraction is None:
        count = min(round(SHARE * size), MOST)
        return count if count >= LEAST else 0
    return max(1, round(fraction * size)) if fraction else 0


def carve(size: int, held_out: int, validation: int) -> dict[str, NDArray[np.int64]]:
    """Divide the positions below `size` into `train`, `validation` and `held_out` in a fixed random way; each part
    ascends. `held_out` is the start and `validation` the end of one random order, so that neither depends on the size
    of the other."""
    order = np.argsort(splitmix64(np.arange(size, dtype=np.uint64)), kind="stable")
    cut = max(held_out, size - validation)
    parts = {"train": order[held_out:cut], "validation": order[cut:], "held_out": order[:held_out]}
    return {name: np.sort(part) for name, part in parts.items()}


# Classes


def number_labels(parts: list[Rows]) -> tuple[list[NDArray[np.int64] | None], list[str]]:
    """Return the class ids of the rows of every part, and the names of the classes, which all parts share. Raises
    `UserError` for labels that cannot be classes, and for one class in two spellings."""
    names = parts[0].class_names
    if len({tuple(rows.class_names) for rows in parts if rows.class_names is not None}) > 1:
        raise UserError(f"data.label_column: splits have other classes than each other; {WITHOUT}")
    if names is not None:
        known: list[Any] = list(range(len(names)))
    else:
        found = {label for rows in parts for label in rows.labels or [] if is_label(label)}
        known = sorted(found, key=lambda label: (isinstance(label, str), label))  # a tar may have numbers and words
    class_names = list(dict.fromkeys(names or map(str, known)))  # the number 1 and the word "1" are one class
    check_class_names(class_names, spellings=names is None)
    places = {name: place for place, name in enumerate(class_names)}
    ids = {label: places[names[label] if names else str(label)] for label in known}
    for rows in parts:
        for row, label in enumerate(rows.labels or []):
            if not is_label(label) or label not in ids:
                raise UserError(one_line(f"{rows.name(row)}: {describe_label(label, names, some=bool(ids))}"))
    numbered = [None if r.labels is None else np.array([ids[label] for label in r.labels], np.int64) for r in parts]
    return numbered, class_names


def check_class_names(names: list[str], spellings: bool) -> None:
    """Raise `UserError` for a name that no class may have and, with `spellings`, for names that differ only in
    capitals, spaces around them, or how accented letters are written. Single letters in two cases are two classes."""
    known: dict[str, str] = {}
    for name in names:
        if not is_class_name(name):
            raise UserError(f"the class {quote(name)} is no name: at most {LONGEST} printable characters; {WITHOUT}")
        plain = unicodedata.normalize("NFC", name).strip()
        other = known.setdefault(plain.casefold() if len(plain) > 1 else plain, name)
        if spellings and other != name:
            raise UserError(
                f"the classes {quote(other)} and {quote(name)} are one in two spellings; give both one name"
            )


def describe_label(label: Any, names: list[str] | None, some: bool) -> str:
    """Return what is wrong with what cannot be a class. some: whether any image has one."""
    if label is None:
        other = "while other images have one: in folders, each image lies in that of its class"
        return f"no class, {other if some else 'as no image has one'}; {WITHOUT}"
    allowed = f"0 to {len(names) - 1}" if names is not None else "a string, or an integer from 0"
    return f"the label is {label!r}, allowed is {allowed}; {WITHOUT}"


def is_label(label: Any) -> bool:
    """Whether a value can be a class: a string, or an integer from 0."""
    return isinstance(label, str) or (isinstance(label, int) and label >= 0)


def is_class_name(name: str) -> bool:
    """Whether a class may have this name: pipelines and token datasets refuse one that a terminal would obey."""
    return len(name) <= LONGEST and is_printable(name)


def is_printable(name: str) -> bool:
    """Whether a name can be printed as it is: a terminal would obey another one."""
    return name.replace(JOINER, "").isprintable()
