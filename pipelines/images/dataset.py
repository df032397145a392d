"""Image data sets: find the images, split them, and make batches.

`load_images` opens the source (digits, a folder, tables), chooses its splits or holds out part of one, numbers the
classes, and decodes every image once, so that bad images are found before training starts. Pixels stay in memory if
they fit. Batches move to the device as uint8 and become augmented floats in [-1, 1] there. With `data.streaming`,
shards are read in sequence instead (`streaming`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator
from torch import Tensor

from tokenizer.base import PLAIN
from tokenizer.files import PathError, one_line, quote
from tokenizer.spec import BYTES, ImageSpec, ValueType, spec_problems, to_float

from ..config import Config, UserError, is_first_process, tell
from ..files import replace_file
from ..shuffling import positions_of, samples_of, spread
from . import tables
from .arrays import clipped_share, guess_type, measure_range
from .augment import AugmentConfig, draw_changes, mirror_images, move_images
from .binarize import Binarize, binarize
from .clip_files import open_clips, report_windows, split_windows
from .decoding import (
    CHUNK,
    IMAGE,
    LABEL,
    BadImage,
    Decoded,
    Pixels,
    Rows,
    SplitRows,
    decode_all,
    decode_in_threads,
    decode_rows,
)
from .folder import holds_files, open_folder
from .splits import Inherited, Part, SplitFacts, choose_splits, find_objects, paths_within

if TYPE_CHECKING:
    from ..processes.group import ProcessGroup
    from .tiles import LazyImages

Side = Annotated[int, Field(ge=4, le=4096)]
Indices = Sequence[int] | NDArray[np.int64] | Tensor

COLOUR_SAMPLE, GREY_SPREAD = 32, 16
"""Number of images in which colour is looked for, and the largest difference between the channels of a grey pixel."""
LONGEST, JOINER = 200, "\u200d"  # zero-width joiner of composed emoji, not printable by itself
WITHOUT = "data.label_column=null uses all images without labels"
RANGE_SAMPLE, MOST_CLIPPED = 64, 0.01
"""Number of training images whose values are compared with `data.range`, and the share beyond it that is silent."""
TEST_DRAWS = 5
"""Number of draws of each test image with `data.binarize=drawn`, over which figures are averaged."""
BAD_IMAGES = "bad_images.jsonl"
UNCHANGED = AugmentConfig()


OPTIONAL = {
    "clips": False,
    "frames": None,
    "group": None,
    "key": None,
    "dtype": None,
    "range": None,
    "show": None,
    "crop": None,
    "crops_per_image": 1,
    "binarize": None,
}
"""Settings that files hold only if they are set."""


class DataConfig(Config):
    """The images to use, and their shape."""

    # `default=` is spelled out so that type checkers see which arguments are optional.

    source: str = Field(
        default="digits",
        description="`digits` (5,000 MNIST digits), a folder of images, parquet or webdataset (.tar) files as a file, "
        "folder, pattern or URL, or a Hub id",
    )
    streaming: bool = Field(
        default=False,
        description="read shards (parquet, .tar) in sequence, for data that does not fit on the disk: shuffling is "
        "approximate, whole shards are held out and become files of tokens, and images are not checked first; for a "
        "folder of image files, only the check is skipped",
    )
    shuffle_window: int = Field(
        default=10_000,
        ge=1,
        description="with streaming, the size of the shuffle buffer: encoded images held in memory",
    )
    split: str = Field(
        default="train",
        description="the split to train on; in a folder of images, the subfolder of that name (`train` without such a "
        "subfolder: all images)",
    )
    held_out: str | None = Field(
        default=None,
        description="the split to evaluate on; null: `test`, or else the only split called validation, val, valid or "
        "dev, or else part of `split`",
    )
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1, description="share of `split` to hold out")
    validation_fraction: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share of `split` to set aside for choosing the best weights; null: 5%, at most 2,000 images, but "
        "no images if that is fewer than 10; 0: use the held-out images instead",
    )
    clips: bool = Field(
        default=False,
        description="each folder of images is a clip, whose images go into the same split, and whose name is no class",
    )
    frames: int | None = Field(
        default=None,
        ge=2,
        le=4096,
        description="the source holds clips or volumes (folders of frames, arrays, GIF, TIFF), which are cut into "
        "windows of this many frames; all windows of a clip go into the same split",
    )
    group: str | None = Field(
        default=None,
        description="column that names the object of each image, or else a regular expression that finds it in the "
        "image's path within the source, as its first group or else the whole match; all images of an object go into "
        "the same split",
    )
    key: str | None = Field(
        default=None,
        description="column of a table that names each image, by which splits are drawn; null: the image's bytes",
    )
    image_size: Side | tuple[Side, Side] = Field(
        default=28, description="one number, or [height, width]; images of other sizes are resized and cropped"
    )
    channels: int = Field(
        default=1, ge=1, le=16, description="1 for grey, 3 for RGB; any number up to 16 for arrays and pages of a TIFF"
    )
    dtype: ValueType | None = Field(
        default=None, description="type of the values in a folder of images; null: that of the first training image"
    )
    range: tuple[float, float] | None = Field(
        default=None,
        description="smallest and largest value, which become -1 and 1 inside; null: 0 to 255 for uint8, else measured "
        "on the training images",
    )
    show: tuple[int, int, int] | None = Field(
        default=None, description="of more than 3 channels, those that pictures show in red, green and blue"
    )
    image_column: str = Field(default=IMAGE, description="column of the images; in a .tar, their suffix")
    label_column: str | None = Field(default=LABEL, description="column of the classes; null ignores classes")
    augment: AugmentConfig = Field(default=AugmentConfig(), description="random augmentation of the training images")
    crop: Literal["random"] | None = Field(
        default=None,
        description="`random`: train on random crops of `image_size` from images at their own size, which are only "
        "enlarged if they are smaller; other splits use a centred grid of crops; null: resize images",
    )
    crops_per_image: int = Field(
        default=1,
        ge=1,
        le=100_000,
        description="with crop, the crops of each training image in an epoch, and in a token dataset",
    )
    binarize: Binarize | None = Field(
        default=None,
        description="make grey images black and white, for the tokenizer `pixels` of 2 levels. `threshold`: cut at mid "
        "grey; `drawn`: each pixel is white with probability value / 255, anew in each epoch of training, and by fixed "
        "seeds elsewhere",
    )
    on_error: Literal["skip", "fail"] = Field(
        default="fail", description="what to do with images that cannot be decoded: skip them, or end the run"
    )
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="with `skip`, a larger share of bad images ends the run"
    )
    limit: int | None = Field(default=None, ge=1, description="use at most this many images of each split")
    cache_mb: int = Field(default=2048, ge=0, description="memory for decoded images, in MiB")

    @field_validator("image_size", mode="before")
    @classmethod
    def _image_size_is_no_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"expected one number, or height and width such as 64,64 (got {value[:100]!r})")
        return value

    @model_validator(mode="after")
    def _one_kind_of_group(self) -> DataConfig:
        if self.clips and self.group is not None:
            raise ValueError("clips and group both say which images belong together: set only one")
        if self.frames is not None and self.clips:
            raise ValueError("clips=true is for images; with frames, whole clips are held out anyway")
        if self.frames is not None and self.streaming:
            raise ValueError("frames: clips are not streamed; set streaming=false")
        if self.frames is not None and self.crop is not None:
            raise ValueError("frames: clips are not cropped at random; set crop=null")
        return self

    @model_validator(mode="after")
    def _splits_differ(self) -> DataConfig:
        if self.split == self.held_out:
            raise ValueError(f"split and held_out are both {self.split!r}: evaluation needs images not trained on")
        for problem in spec_problems(self.channels, self.dtype, self.range, self.show, measured=True):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _crops_are_cropped(self) -> DataConfig:
        if self.crops_per_image > 1 and self.crop is None:
            raise ValueError("crops_per_image needs crop=random; without crops, set crops_per_image=1")
        return self

    @model_validator(mode="after")
    def _binarizes_grey_images(self) -> DataConfig:
        if self.binarize is None:
            return self
        if self.channels != 1:
            raise ValueError(f"binarize: needs grey images, channels=1 (got {self.channels})")
        if self.dtype not in (None, "uint8") or self.range is not None:
            raise ValueError("binarize: needs 8-bit images; set dtype=null range=null")
        if self.streaming or self.frames is not None or self.crop is not None:
            raise ValueError(
                "binarize: images are not streamed, cropped or cut from clips; unset streaming, frames, crop"
            )
        return self

    @model_serializer(mode="wrap")
    def _omit_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the settings in `OPTIONAL` where they are not set, as files written before they existed do."""
        found: dict[str, Any] = handler(self)
        return {key: value for key, value in found.items() if (key, value) not in OPTIONAL.items()}

    def without_crop(self) -> DataConfig:
        """Return the settings for the same images without `crop`."""
        return self.model_copy(update={"crop": None, "crops_per_image": 1})

    @property
    def path(self) -> Path | None:
        """The local path of the source; None for the digits, a Hub id, a pattern or a URL."""
        path = Path(os.path.expanduser(self.source))
        return path if self.source != "digits" and path.exists() else None

    @property
    def spec(self) -> ImageSpec:
        """What the images are; their type and range only if these are declared or were measured."""
        height, width = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        dtype, (low, high) = self.dtype or "uint8", self.range or BYTES
        return ImageSpec(self.channels, height, width, self.frames or 1, dtype, low, high, self.show)

    @property
    def facts(self) -> dict[str, Any]:
        """The facts about images that a tokenizer keeps beside their shape."""
        given = {"dtype": self.dtype or "uint8", "range": self.range, "show": self.show}
        return {key: value for key, value in given.items() if (key, value) not in PLAIN.items()}


# Loading


def load_images(
    config: DataConfig,
    *,
    inherited: Inherited | None = None,
    together: bool = False,
    stream: bool = False,
    check: bool = True,
    single_frames: bool = False,
) -> Splits:
    """Open the source, decode every image once and return its splits.

    inherited: the division with which a model was trained. together: all launched processes call this; each checks a
    share of the images if these do not fit in memory. stream: with `data.streaming`, return the training images as
    `StreamedImages` instead of up to 2,000 of them with random access. check: False decodes images only on access,
    unless `on_error=skip`. single_frames: with `data.frames`, return the frames of the clips, each an image, in the
    splits of their clips. Raises `UserError` for a source that is missing, empty or lacks a split, for missing or
    negative labels, and for images that cannot be decoded (with `on_error=skip`, only if they exceed
    `max_bad_fraction`).
    """
    streamed: ImageDataset | None = None
    if config.crop is not None:
        if is_stream(config):
            raise UserError("data.crop: needs random access; data.streaming=false copies the images to the disk")
        from .crops import load_crops

        return load_crops(config, inherited, check=check, together=together)
    if is_stream(config):
        from .streaming import open_stream

        division, streamed = open_stream(config, stream, inherited)
    else:
        division = choose_splits(open_source(config), config, inherited)
        config = settle_values(config, division.parts["train"])
    parts = division.parts
    opened = {id(part.rows): part.rows for part in parts.values()}
    if config.frames is not None:
        report_windows(list(opened.values()), config.frames)
    numbered, class_names = number_labels(list(opened.values()))
    labels = dict(zip(opened, numbered, strict=True))
    decoded, room = dict[str, Decoded](), config.cache_mb * 2**20
    for name, (rows, positions, _) in parts.items():
        if streamed is None and (config.streaming or not check) and config.on_error == "fail":
            decoded[name] = Decoded(positions, None, [])
        else:
            decoded[name] = decode_all(rows, positions, config.spec, room if check else 0, together)
        room -= part.nbytes if (part := decoded[name].pixels) is not None else 0
    check_bad([(part.bad, len(parts[name].positions)) for name, part in decoded.items()], config)
    datasets = dict[str, ImageDataset]()
    for name, (rows, _, units) in parts.items():
        ids = labels[id(rows)]
        of_good = None if ids is None else ids[decoded[name].positions]
        datasets[name] = ImageDataset(config, rows, decoded[name], of_good, class_names, units)
    if streamed is not None and stream:
        streamed.class_names = class_names
        datasets["train"] = streamed
    if single_frames and config.frames is not None:
        datasets = {name: images.split_into_frames() for name, images in datasets.items()}
    return Splits(**datasets, facts=division.facts, note=division.note, is_carved=division.is_carved)


def is_stream(config: DataConfig) -> bool:
    """Whether images are read in sequence, from shards."""
    path = config.path
    return config.streaming and config.source != "digits" and not (path and path.is_dir() and holds_files(path))


def open_source(config: DataConfig) -> SplitRows:
    """Return the splits of `config.source` by name. An existing path takes precedence over a Hub id."""
    path = Path(os.path.expanduser(config.source))
    if config.frames is not None and not (path.is_dir() and holds_files(path)):
        raise UserError(f"data.frames: clips are read from a folder of files (got {config.source})")
    if config.source == "digits":
        return tables.digits()
    if path.is_dir() and holds_files(path):
        return open_folder(path, config) if config.frames is None else open_clips(path, config)
    return tables.open_tables(config)


def settle_values(config: DataConfig, train: Part) -> DataConfig:
    """Return the settings with the type and range of the images: those of the training images if they are not
    declared, and neither for 8 bits. Raises `UserError` for the digits, and if all values are equal; warns
    about a range that clips more than 1 % of a sample."""
    if config.source == "digits":
        require_plain_data(config)
        return config
    rows, positions = train.rows, train.positions
    payloads = (payload for position in positions.tolist() for payload in rows.read([position]))
    readable = next((payload for payload in payloads if not isinstance(payload, str)), None)  # of clips, no short one
    dtype = config.dtype or guess_type(readable, config.channels)
    if config.binarize is not None and dtype not in (None, "uint8"):
        raise UserError(f"data.binarize: needs 8-bit images; those of {config.source} are {dtype}")
    if config.range is not None:
        config = config.model_copy(update={"dtype": dtype or "uint8"})
        warn_about_range(config, rows, positions)
    elif dtype in ("uint16", "float32"):
        limits = measure_range(rows, positions, config.channels, dtype)
        if limits is None or limits[0] >= limits[1]:
            first = int(positions[0])
            reasons = decode_rows(rows, replace(config.spec, dtype=dtype), [first])
            found = reasons[0] if limits is None else f"all are {limits[0]:g}; give data.range=LOW,HIGH"
            raise UserError(
                one_line(
                    f"data.range: the values of {len(positions)} training images cannot be measured; the first is "
                    f"{rows.name(first)}: {found}"
                )
            )
        config = config.model_copy(update={"dtype": dtype, "range": limits})
        if is_first_process():
            tell(f"data.range: {dtype} from {limits[0]:g} to {limits[1]:g}, measured on the training images")
    return config


def require_plain_data(config: DataConfig) -> None:
    """Raise `UserError` for images of another depth or with other channels than those of digits and streams."""
    if config.channels not in (1, 3) or config.dtype not in (None, "uint8") or config.range is not None:
        key = "data.channels" if config.channels not in (1, 3) else "data.range" if config.range else "data.dtype"
        what = "data.streaming=true" if config.streaming else f"data.source={config.source}"
        raise UserError(f"{key}: {what} reads 8-bit images with 1 or 3 channels only")


def warn_about_range(config: DataConfig, rows: Rows, positions: NDArray[np.int64]) -> None:
    """Print one line if the declared range clips more than 1 % of the values of a sample."""
    if not is_first_process():
        return
    some = positions[spread(len(positions), RANGE_SAMPLE)].tolist()
    spec = config.spec
    shares = [clipped_share(payload, spec) for payload in rows.read(some)]
    if (mean := float(np.mean(shares))) > MOST_CLIPPED:
        worst = rows.name(some[int(np.argmax(shares))])
        tell(
            one_line(
                f"warning: data.range={spec.low:g},{spec.high:g} clips {mean:.1%} of the values of "
                f"{len(some)} training images, most in {worst}; data.range=null measures it"
            )
        )


def check_type(splits: Splits, tokenizer: Any, whose: str = "pipeline") -> Splits:
    """Return the splits. Raises `UserError` if their type and range, which may have been measured, are not the
    tokenizer's."""
    require_spec(tokenizer.spec, splits.train.spec, whose)
    return splits


def check_shape(config: DataConfig, tokenizer: Any, whose: str = "pipeline", *, single_frames: bool = False) -> None:
    """Raise `UserError` unless the images have the shape, type and range of the tokenizer's, or the pipeline's.
    single_frames: clips are read as the images of their frames."""
    require_spec(tokenizer.spec, config.spec.frame if single_frames else config.spec, whose)
    require_two_levels(config, tokenizer.name, getattr(tokenizer.config, "levels", 0))


def require_spec(spec: ImageSpec, images: ImageSpec, whose: str) -> None:
    """Raise `UserError` unless `images` agree with a model of `whose`."""
    try:
        spec.require(images, whose)
    except ValueError as error:
        raise UserError(f"data.{error}") from error


def require_two_levels(config: DataConfig, kind: str, levels: int) -> None:
    """Raise `UserError` if images are binarised for a tokenizer other than `pixels` of 2 levels."""
    if config.binarize is not None and (kind, levels) != ("pixels", 2):
        its = f"{kind} of {levels} levels" if kind == "pixels" else kind
        raise UserError(
            f"data.binarize: needs the tokenizer pixels of 2 levels, this is {its}; set data.binarize=null or "
            "model.kind=pixels model.levels=2"
        )


# The data set


class ImageDataset:
    """Images of one shape with optional labels, addressed by index.

    Attributes: `labels` (n,) int64 or None, `class_names`, `spec`, `bad` (the skipped images), `config`, with the range
    if it was measured, and `units`, a number (n,) that is the same for images which are never divided.
    """

    def __init__(
        self,
        config: DataConfig,
        rows: Rows,
        decoded: Decoded,
        labels: NDArray[np.int64] | None,
        class_names: list[str],
        units: NDArray[np.uint64] | None = None,
    ) -> None:
        """units: those of all `rows`; None: each is one."""
        self.config, self.spec = config, config.spec
        self.labels = torch.from_numpy(labels) if labels is not None else None
        self.class_names = class_names
        self.bad = decoded.bad
        self._rows = rows
        self._positions = decoded.positions
        self.units = self._positions.astype(np.uint64) if units is None else units[self._positions]
        self._pixels = decoded.pixels
        self._augment = config.augment
        self._path = config.path
        self._binarize = config.binarize

    def __len__(self) -> int:
        return len(self._positions)

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return indices and epochs, each `(batch_size,)`, of one step's global batch: a pure function."""
        return samples_of(len(self), batch_size, seed, step)

    def examples(self, count: int, seed: int) -> Tensor:
        """Return a batch of up to `count` images, the same on all processes."""
        return self.batch(self.samples(min(count, len(self)), seed, 0)[0])

    @property
    def origin(self) -> tuple[Rows, NDArray[np.int64]]:
        """The rows of the source, and the positions of the images among them."""
        return self._rows, self._positions

    def names(self, indices: Indices) -> list[str]:
        """Return the name of each image: its path within the source, or its table row."""
        rows = self._positions[positions_of(indices, len(self))].tolist()
        root = "" if self._path is None else os.path.join(self._path, "")
        return [self._rows.name(row).removeprefix(root) for row in rows]

    def objects(self) -> list[str] | None:
        """Return the object of each image, with `data.group`; None without it."""
        if self.config.group is None:
            return None
        names, rows = self._rows.objects, self._positions.tolist()
        if names is not None:
            return [names[row] for row in rows]
        paths = self._rows.paths or []
        return find_objects(paths_within([paths[row] for row in rows], self.config), self.config.group)

    def pixels(self, indices: Indices) -> Tensor:
        """Return the images `(B, *spec.shape)` as uint8 levels, or as float32 in [-1, 1] if they are not of 8 bits.
        Raises `IndexError`, and `UserError` for a bad image."""
        return self._draw(positions_of(indices, len(self)), 0)

    @property
    def is_drawn(self) -> bool:
        """Whether black and white pixels are drawn; see `data.binarize`."""
        return self._binarize == "drawn"

    def grey(self) -> ImageDataset:
        """Return the images as they are without `data.binarize`."""
        found = copy.copy(self)
        found._binarize = None
        return found

    def _draw(self, wanted: NDArray[np.int64], draws: NDArray[np.int64] | int) -> Tensor:
        """Return the images as `pixels` does. draws: with `data.binarize=drawn`, the number of each image's draw, (B,),
        or one for all."""
        pixels = self._stored(wanted)
        return pixels if self._binarize is None else binarize(pixels, self._binarize, self._positions[wanted], draws)

    def _stored(self, wanted: NDArray[np.int64]) -> Tensor:
        if self._pixels is not None:
            return self._pixels[torch.from_numpy(wanted)]
        images = self.decode(wanted.tolist(), self.spec)
        for index, image in zip(wanted.tolist(), images, strict=True):
            if isinstance(image, str):
                name = self._rows.name(int(self._positions[index]))
                raise UserError(one_line(f"{name}: {image} (data.on_error=skip skips such images)"))
        return torch.from_numpy(np.stack(images)) if images else torch.empty((0, *self.spec.shape), dtype=torch.uint8)

    def decode(self, indices: list[int], spec: ImageSpec) -> list[Pixels | str]:
        """Read the images from the source as `spec`. Each becomes pixels `spec.shape`, or the reason why it cannot be
        decoded."""
        return decode_in_threads(self._rows.read(self._positions[indices].tolist()), spec)

    def whole_images(self, indices: Indices) -> LazyImages:
        """Return images at their own size, read on access; black and white ones are drawn by their pixels."""
        from .tiles import whole_files

        rows = self._positions[positions_of(indices, len(self))].tolist()
        hint = " (data.on_error=skip skips such images)"
        read = lambda k: self._rows.read([rows[k]])[0]  # noqa: E731
        found, how = whole_files(read, self.names(indices), self.spec, hint), self._binarize
        return found if how is None else replace(found, load=lambda k: binarize(found.load(k)[None], how)[0])

    def preload(self, rows: Tensor, group: ProcessGroup) -> ImageDataset:
        """Load the images at `rows` `(n,)` into memory as a data set. Each image is decoded by one process."""
        parts = group.map(lambda part: self.grey().pixels(part).numpy(), rows.split(CHUNK))
        found = copy.copy(self)
        found.labels = None if self.labels is None else self.labels[rows]
        found._positions, found._pixels = self._positions[rows.numpy()], torch.from_numpy(np.concatenate(parts))
        found.units = self.units[rows.numpy()]
        return found

    def split_into_frames(self) -> ImageDataset:
        """Return the frames of a data set of clips, each an image."""
        frames, found = self.spec.frames, copy.copy(self)
        found.spec, found._rows = self.spec.frame, split_windows(self._rows, frames)
        found.labels = None if self.labels is None else self.labels.repeat_interleave(frames)
        found._positions = (self._positions[:, None] * frames + np.arange(frames)).ravel()
        found.units = self.units.repeat(frames)
        found._pixels = None if self._pixels is None else self._pixels.flatten(0, 1)
        return found

    def batch(self, indices: Indices, *, seed: int = 0, epoch: int = 0, augment: bool = False) -> Tensor:
        """Return images as float32 `(B, *spec.shape)` in [-1, 1]. Augmentation depends on (seed, epoch, index) alone,
        and drawn pixels on (epoch, index)."""
        return self.prepare(*self.raw_batch(indices, epoch, seed, augment=augment))

    def raw_batch(
        self, indices: Indices, epochs: NDArray[np.int64] | int, seed: int, *, augment: bool = True
    ) -> tuple[Tensor, ...]:
        """Return the arguments of `prepare`: images as `pixels` returns them and, if augmented, the changes of each in
        its epoch. epochs: (B,), or one for all."""
        wanted = positions_of(indices, len(self))
        pixels = self._draw(wanted, epochs)
        changes = draw_changes(wanted, epochs, self._augment, seed) if augment and self._augment != UNCHANGED else None
        return (pixels,) if changes is None else (pixels, changes)

    def prepare(self, pixels: Tensor, changes: Tensor | None = None) -> Tensor:
        """Convert a `raw_batch` to float32 `(B, *spec.shape)` in [-1, 1], on its device."""
        return prepare_images(pixels, changes, self._augment)


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
    """Disjoint sets of images for training, for evaluation and, if any, for choosing the best weights. facts: how they
    were divided, None for runs of 0.3. note: what has changed since training, or is not known. is_carved: whether the
    held-out images are a part of the split to train on."""

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
        """Write `bad_images.jsonl` in a run folder; see below."""
        write_bad_images(folder, {name: images.bad for name, images in self.by_name().items()})


def write_bad_images(folder: Path, bad: Mapping[str, list[BadImage]]) -> None:
    """Write `bad_images.jsonl`, a line `{"split", "path", "row", "reason"}` for each skipped image of each split; no
    file if no image was skipped."""
    lines = [json.dumps({"split": name, **image._asdict()}) for name, images in bad.items() for image in images]
    if lines:
        try:
            replace_file(folder / BAD_IMAGES, "".join(line + "\n" for line in lines).encode())
        except (OSError, PathError) as error:
            tell(f"warning: {folder / BAD_IMAGES} cannot be written: {error}")


def report_division(splits: Splits) -> None:
    """Print how many units each part has, what has changed since an earlier step, and the classes without training
    images."""
    if not is_first_process():
        return
    if splits.note:
        tell(one_line(splits.note))
    train = splits.train
    if splits.facts is not None:
        print(splits.facts.describe(), flush=True)
    elif splits.is_carved:
        tell(one_line(f"{train.config.source} is divided as in 0.3, by position: added images would move others"))
    if train.labels is not None:
        counts = train.labels.bincount(minlength=len(train.class_names)).tolist()
        if absent := [name for name, count in zip(train.class_names, counts, strict=True) if not count]:
            some = f"{', '.join(absent[:10])}{', ...' if len(absent) > 10 else ''}"
            tell(one_line(f"warning: {len(absent)} of {len(counts)} classes have no training image: {some}"))


# Bad images


def check_bad(parts: list[tuple[list[BadImage], int]], config: DataConfig) -> None:
    """Raise `UserError` if bad images are not allowed or too many; otherwise warn about them. parts: for each split,
    its bad images and its number of images, good and bad."""
    bad, found = [image for images, _ in parts for image in images], sum(count for _, count in parts)
    if not bad:
        return
    counted = f"{len(bad)} of {found} images cannot be decoded"
    if len(bad) == found:  # nothing would be left
        raise UserError(f"{counted}:{list_bad(bad)}")
    if config.on_error == "fail":
        raise UserError(f"{counted} (data.on_error=skip skips them):{list_bad(bad)}")
    if len(bad) > config.max_bad_fraction * found:
        raise UserError(
            f"{counted}, more than data.max_bad_fraction={config.max_bad_fraction} allows (raise it to skip them all):"
            f"{list_bad(bad)}"
        )
    if any(len(images) == count for images, count in parts):
        raise UserError(f"{counted}, which leaves no image to train on or to hold out:{list_bad(bad)}")
    if is_first_process():
        tell(one_line(f"warning: {counted} and are skipped; the first is {bad[0].path}: {bad[0].reason}"))


def list_bad(bad: list[BadImage]) -> str:
    """Return a line for each of the first ten bad images, and the number of the others."""
    more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
    return "".join("\n  " + one_line(f"{image.path}: {image.reason}") for image in bad[:10]) + more


def warn_about_colour(images: ImageDataset) -> None:
    """Print one line if most of a sample of the images are coloured but are converted to grey."""
    if not (images.spec.is_picture and images.spec.channels == 1) or not is_first_process():
        return
    decoded = images.decode(spread(len(images), COLOUR_SAMPLE).tolist(), replace(images.spec, channels=3))
    coloured = [int(np.ptp(image, axis=-3).max()) > GREY_SPREAD for image in decoded if not isinstance(image, str)]
    if 2 * sum(coloured) > len(coloured):
        tell("warning: data.channels=1 converts these colour images to grey; data.channels=3 keeps the colours")


# Classes


def number_labels(parts: list[Rows]) -> tuple[list[NDArray[np.int64] | None], list[str]]:
    """Return the class ids of each part's rows, and the class names that all parts share. Raises `UserError` for
    invalid labels, and for one class in two spellings."""
    names = parts[0].class_names
    if len({tuple(rows.class_names) for rows in parts if rows.class_names is not None}) > 1:
        raise UserError(f"data.label_column: splits have different classes; {WITHOUT}")
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
    """Raise `UserError` for an invalid class name and, with `spellings`, for names that differ only in case,
    surrounding spaces or Unicode form. Single letters in two cases are two classes."""
    known: dict[str, str] = {}
    for name in names:
        if not is_class_name(name):
            raise UserError(
                f"invalid class name {quote(name)}: must be at most {LONGEST} printable characters; {WITHOUT}"
            )
        plain = unicodedata.normalize("NFC", name).strip()
        other = known.setdefault(plain.casefold() if len(plain) > 1 else plain, name)
        if spellings and other != name:
            raise UserError(
                f"the classes {quote(other)} and {quote(name)} are two spellings of one name; use a single spelling"
            )


def describe_label(label: Any, names: list[str] | None, some: bool) -> str:
    """Return why a label is invalid. some: whether any image has a class."""
    if label is None:
        other = "unlike other images (in a folder data set, put each image into the folder of its class)"
        return f"no class, {other if some else 'like all images'}; {WITHOUT}"
    allowed = f"0 to {len(names) - 1}" if names is not None else "a string, or an integer from 0"
    return f"invalid label {label!r}: must be {allowed}; {WITHOUT}"


def is_label(label: Any) -> bool:
    """Whether a value can be a label: a string, or an integer from 0."""
    return isinstance(label, str) or (isinstance(label, int) and label >= 0)


def is_class_name(name: str) -> bool:
    """Whether this is a valid class name; pipelines and token datasets refuse others."""
    return len(name) <= LONGEST and is_printable(name)


def is_printable(name: str) -> bool:
    """Whether a name has no control characters (terminal escape sequences)."""
    return name.replace(JOINER, "").isprintable()
