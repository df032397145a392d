"""Columns of image data sets: what the images of a token dataset are conditioned on.

A column comes from the tables of the source (parquet files, a Hub data set), from the sheets of an image folder
(`metadata.csv`, `.jsonl`, `.parquet`), from a table beside it, from a folder of images with the same names, or from
the images before these in their folder. `load_conditions` reads all columns, parallel to the images of each split.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from prior.conditions import (
    LABEL,
    NAME,
    ClassColumn,
    Column,
    FlagsColumn,
    GridColumn,
    NumberColumn,
    VectorColumn,
    describe_names,
    shorten,
)
from tokenizer import Tokenizer
from tokenizer.files import one_line, quote

from ..config import Config, UserError, is_first_process, tell
from ..config.errors import did_you_mean
from ..provenance import TokenizerFolder, tokenizer_folder
from ..text import run_encoder
from .dataset import DataConfig, ImageDataset, Indices, check_bad, is_class_name
from .decoding import CHUNK, Decoded, Payload, Rows, decode_all
from .folder import SHEETS, are_disjoint, files_below, holds_files, image_paths, normalize_path, read_sheet
from .tables import classes_in_parquet, read_payload

FEW = 4  # a list of more numbers is taken for a vector
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
BLACK = np.zeros((1, 1), np.uint8)


class ConditionSource(Config):
    """Where a column comes from; by default, from the column of the same name."""

    kind: Literal["class", "flags", "number", "vector", "grid"] | None = Field(
        None, description="kind of the column; null: guessed from the values"
    )
    column: str | None = Field(None, description="column of the tables, of the folder's metadata, or of `table`")
    images: str | None = Field(None, description="folder of images with the same names as those of data.source")
    frame: int | None = Field(
        None, ge=-64, le=-1, description="-1: the image before each in its folder, which is a clip; -2: the one before"
    )
    tokenizer: TokenizerFolder | None = Field(None, description="tokenizer of the images of a grid")
    encoder: str | None = Field(
        None, description="what computes vectors from text: `ngrams:SIZE`, or MODULE:FUNCTION loaded by --import"
    )
    changed_by: tuple[Literal["flip", "shift", "rotate", "zoom"], ...] = Field(
        (), description="augmentations (of data.augment) that would falsify the values"
    )

    @model_validator(mode="after")
    def _agree(self) -> ConditionSource:
        given = [name for name in ("column", "images", "frame") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        if self.kind not in (None, "grid") and (self.is_picture or self.tokenizer):
            raise ValueError(f"images, frame and tokenizer are for columns of kind grid (got {self.kind})")
        if self.encoder and (self.kind not in (None, "vector") or self.is_picture or self.tokenizer):
            raise ValueError("encoder is for columns of text, which become vectors")
        return self

    @property
    def is_picture(self) -> bool:
        """Whether the column consists of image files without a table."""
        return self.images is not None or self.frame is not None

    def describe(self, name: str) -> dict[str, Any]:
        """Return where the column comes from, without local paths."""
        found: dict[str, Any] = self.model_dump(mode="json", include={"frame", "changed_by"}, exclude_defaults=True)
        folder = {"images": Path(self.images).name} if self.images else {}
        return ({} if self.is_picture else {"column": self.column or name}) | folder | found


Sources = Mapping[str, str | ConditionSource]
"""By name; a string is the name of a column."""


@dataclass(frozen=True)
class LoadedColumn:
    """A column of all splits, by name (`train`, `validation`, `test`), parallel to the split's images."""

    column: Column
    source: dict[str, Any]
    """Where it came from, without local paths."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Raw values `(n, *column.shape)`; empty for grids."""
    images: dict[str, ImageDataset] = field(default_factory=dict)
    """For grids: the images to encode, in the tokenizer's shape, n per split. `raw_batch` moves them as the images."""
    missing: dict[str, Tensor] = field(default_factory=dict)
    """For grids: bool `(n,)`, whether an image has no condition. It is black in `images`; its ids must become -1."""
    tokenizer: Tokenizer | None = None
    """For grids: what encodes `images`."""


def choose_data(config: DataConfig, sources: Sources) -> DataConfig:
    """Return the settings with which to load the images: with `clips`, if a column consists of other frames."""
    frames = any(source.frame is not None for source in parse_sources(sources).values())
    return config.model_copy(update={"clips": True}) if frames else config


def parse_sources(sources: Sources) -> dict[str, ConditionSource]:
    """Return the settings of each column."""
    return {name: ConditionSource(column=one) if isinstance(one, str) else one for name, one in sources.items()}


def check_sources(config: DataConfig, sources: Sources, table: str | None = None, augmentations: int = 0) -> None:
    """Raise `UserError` for mistakes that can be detected before images are read."""
    changes = [name for name, value in config.augment.model_dump().items() if value and augmentations]
    of_files = config.path is not None and config.path.is_dir() and holds_files(config.path)
    no_files = f"needs a folder of images as data.source (got {config.source})"
    for name, source in parse_sources(sources).items():
        if not NAME.fullmatch(name) or name in (LABEL, "labels"):
            hint = "use letters, digits and _ (data.label_column chooses the labels)"
            raise UserError(f"conditions: {quote(name)} cannot name a column; {hint}")
        if false := [change for change in source.changed_by if change in changes]:
            raise UserError(f"conditions.{name}: data.augment.{false[0]} would falsify it, as changed_by says")
        if source.is_picture and not of_files:
            raise UserError(f"conditions.{name}: {no_files}")
        if source.is_picture and source.tokenizer is None:
            raise UserError(f"conditions.{name}.tokenizer: missing; a grid needs the tokenizer of its images")
        if source.images is not None and not (folder := Path(source.images).expanduser()).is_dir():
            raise UserError(f"conditions.{name}.images: there is no folder {folder}")
        if source.images is not None and not are_disjoint(folder, config.path or folder):
            raise UserError(f"conditions.{name}.images: {folder} must lie outside data.source")
    if table is not None and (not os.path.isfile(path := os.path.expanduser(table)) or not path.endswith(TABLES)):
        raise UserError(f"table: there is no file {table} with one of the suffixes {', '.join(TABLES)}")
    if table is not None and not of_files:
        raise UserError(f"table: {no_files}")


def load_conditions(
    config: DataConfig,
    sources: Sources,
    splits: Mapping[str, ImageDataset],
    *,
    table: str | None = None,
    together: bool = False,
) -> dict[str, LoadedColumn]:
    """Read the columns of `splits` (by the names of `encode.name_splits`), whose images were loaded with
    `choose_data(config, sources)`. A string is the name of a column, whose kind is guessed and printed.

    table: a CSV, TSV, JSON lines or parquet file with a column `file_name`, relative to the folder of the images.
    together: all launched processes call this. Raises `UserError`."""
    check_sources(config, sources, table)
    found, columns = dict[str, LoadedColumn](), None
    for name, source in parse_sources(sources).items():
        try:
            if source.images is not None:
                pictures = pair_images(Path(source.images).expanduser(), config, splits)
            elif source.frame is not None:
                pictures = earlier_frames(source.frame, splits)
            else:
                columns = columns or open_columns(config, splits, table)
                cells = columns.read(source.column or name)
                kind = source.kind or ("vector" if source.encoder else cells.guess_kind())
                if source.kind is None and source.encoder is None and is_first_process():
                    tell(f"conditions.{name}: of kind {kind}, guessed from its values (kind: ... chooses another)")
                if kind != "grid":
                    if source.tokenizer is not None:
                        raise ValueError(f"tokenizer is for columns of kind grid, and this is of kind {kind}")
                    column, values = convert_cells(cells, kind, source.encoder)
                    found[name] = LoadedColumn(column, source.describe(name), values)
                    continue
                pictures = columns.read_pictures(source.column or name)
            found[name] = load_grid(pictures, source, name, config, together)
        except ValueError as error:
            raise UserError(one_line(f"conditions.{name}: {error}")) from error
    return found


# Origins ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """The values of a column by split, parallel to the images; None is null. `describe` locates one in messages."""

    values: dict[str, list[Any]]
    describe: Callable[[str, int], str]
    names: list[str] | None
    """Names of the classes or flags, if the data set has them."""
    is_picture: bool = False

    def map(self, read: Callable[[Any], Any]) -> dict[str, list[Any]]:
        """Convert all values; empty text and NaN are null, too. Raises `ValueError`, which names the row."""

        def convert(split: str, row: int, value: Any) -> Any:
            empty = isinstance(value, str) and not value or isinstance(value, float) and math.isnan(value)
            try:
                return None if value is None or empty else read(value)
            except ValueError as error:
                raise ValueError(f"{self.describe(split, row)}: {error}") from error

        parts = self.values.items()
        return {split: [convert(split, row, value) for row, value in enumerate(part)] for split, part in parts}

    def guess_kind(self) -> str:
        """Return the kind of column that the first value suggests."""
        values = (value for part in self.map(lambda value: value).values() for value in part)
        first = next((value for value in values if value is not None and value != []), None)
        if self.is_picture:
            return "grid"
        if isinstance(first, list):
            is_flags = self.names is not None or isinstance(first[0], str)
            return "flags" if is_flags else "number" if len(first) <= FEW else "vector"
        return "class" if self.names is not None or isinstance(first, str) else "number"


class SheetColumns:
    """Columns of the sheets in a folder of images, or of a table beside it. A row belongs to the image `file_name`;
    `NAME_file_name` is a column NAME of images."""

    def __init__(self, config: DataConfig, splits: Mapping[str, ImageDataset], table: str | None) -> None:
        root = config.path or Path()
        self.sheets = [path for path in files_below(root) if path.name in SHEETS]
        self.sheets = [Path(table).expanduser()] if table else sorted(self.sheets)
        self.rows, self.paths = dict[str, dict[str, Any]](), paths_of(splits)
        if not self.sheets:
            raise ValueError(f"{root} has no {', '.join(SHEETS)}; add one, or give table=FILE")
        for sheet in self.sheets:
            folder = root if table else sheet.parent
            for row in read_sheet(sheet, "table" if table else "data.source"):
                name = row.get(f"{config.image_column}_file_name", row.get("file_name"))
                if not isinstance(name, str) or not name or None in row:
                    problem = "more cells than columns" if None in row else "no file_name"
                    raise ValueError(f"{sheet}: a row has {problem}: {row}")
                if (path := full_path(folder / name)) in self.rows:
                    raise ValueError(f"{sheet}: two rows have the file_name {name}")
                files = [key for key in row if key.endswith("_file_name") and row[key]]
                self.rows[path] = row | {key: full_path(folder / str(row[key])) for key in files}
        known = {full_path(path) for path in image_paths(root)} if table else self.rows
        if unknown := [path for path in self.rows if path not in known]:
            raise ValueError(f"{table}: lists {unknown[0]}, which is no image in {root}")
        if missing := [path for part in self.paths.values() for path in part if full_path(path) not in self.rows]:
            raise ValueError(f"{self.sheets[0]}: no row for the image {missing[0]}")

    def describe(self, split: str, row: int) -> str:
        """Name a row for messages."""
        return f"{self.sheets[0]}: {self.paths[split][row]}"

    def read(self, column: str) -> Cells:
        """Return the values of a column; those of CSV files as numbers or lists, if all are."""
        names, files = list(dict.fromkeys(key for row in self.rows.values() for key in row)), f"{column}_file_name"
        key = find_name(files if column not in names and files in names else column, names)
        values = {split: [self.rows[full_path(path)].get(key) for path in part] for split, part in self.paths.items()}
        if any(sheet.suffix in (".csv", ".tsv") for sheet in self.sheets):
            values = parse_cells(values)
        tables = [str(sheet) for sheet in self.sheets if sheet.suffix == ".parquet"]
        return Cells(values, self.describe, classes_in_parquet(tables[0], key) if tables else None, key == files)

    def read_pictures(self, column: str) -> dict[str, Rows]:
        """Return the image files of a column."""
        return file_pictures(self.read(column).map(require_text))


class TableColumns:
    """Columns of parquet files or of a data set of the Hub."""

    def __init__(self, config: DataConfig, splits: Mapping[str, ImageDataset]) -> None:
        self.source, self.splits = config.source, splits
        if any(images.origin[0].table is None for images in splits.values()):
            raise ValueError(f"{config.source} has no columns; parquet files, Hub data sets and folders of images may")

    def describe(self, split: str, row: int) -> str:
        """Name a row for messages."""
        rows, positions = self.splits[split].origin
        return f"{self.source}: {rows.name(int(positions[row]))}"

    def read(self, column: str) -> Cells:
        """Return the values of a column, but not its images."""
        parts, names, is_picture = {}, None, False
        for split, images in self.splits.items():
            rows, positions = images.origin
            feature = rows.table.features[find_name(column, rows.table.column_names)]
            names = getattr(getattr(feature, "feature", feature), "names", None)  # of a list, or of a class
            is_picture = (
                "bytes" in feature if isinstance(feature, dict) else "bytes" in str(getattr(feature, "pa_type", ""))
            )
            table = rows.table.select_columns([column]).select([] if is_picture else positions)
            parts[split] = table[column][:]
        return Cells(parts, self.describe, names, is_picture)

    def read_pictures(self, column: str) -> dict[str, Rows]:
        """Return the encoded images of a column."""
        import datasets

        def open_split(split: str, images: ImageDataset) -> Rows:
            rows, positions = images.origin
            table = rows.table.select_columns([find_name(column, rows.table.column_names)])
            try:
                table = table.cast_column(column, datasets.Image(decode=False))
            except Exception as error:  # pyarrow raises several types for a column that cannot be cast
                raise ValueError(f"the column {column!r} does not hold images: {error}") from error

            def read(rows: Sequence[int]) -> list[Payload]:
                return [read_payload(cell, self.source) for cell in table[positions[list(rows)]][column]]

            return Rows(len(positions), read, partial(self.describe, split), None)

        return {split: open_split(split, images) for split, images in self.splits.items()}


def open_columns(
    config: DataConfig, splits: Mapping[str, ImageDataset], table: str | None
) -> SheetColumns | TableColumns:
    """Return the columns of a source."""
    of_files = all(images.origin[0].paths is not None for images in splits.values())
    return SheetColumns(config, splits, table) if of_files else TableColumns(config, splits)


def find_name(column: str, names: list[str]) -> str:
    """Return the name of a column. Raises `ValueError`, which suggests the nearest one."""
    if column not in names:
        hint = did_you_mean(column, names, "choose another:")
        raise ValueError(f"there is no column {column!r}; {hint} the columns are {describe_names(names)}")
    return column


def paths_of(splits: Mapping[str, ImageDataset]) -> dict[str, list[str]]:
    """Return the paths of the image files of each split."""
    origins = {split: images.origin for split, images in splits.items()}
    return {split: [(rows.paths or [])[at] for at in positions] for split, (rows, positions) in origins.items()}


def full_path(path: Path | str) -> str:
    """Return a path in the one form in which it is looked up."""
    return normalize_path(os.path.abspath(path))


def parse_cells(values: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return text as numbers, booleans or lists (written as JSON), if all of it is; otherwise unchanged."""
    parsed = {split: [parse_cell(text) for text in part] for split, part in values.items()}
    every = all(not one or isinstance(one, (int, float, list)) for part in parsed.values() for one in part)
    return parsed if every else values


def parse_cell(text: Any) -> Any:
    """Parse the text of a number, a boolean or a list."""
    for parse in (json.loads, float) if isinstance(text, str) else ():
        try:
            return parse(text.lower() if text in ("True", "False") else text)
        except (ValueError, RecursionError):
            continue
    return text


# Values -------------------------------------------------------------------------------------------


def convert_cells(cells: Cells, kind: str, encoder: str | None) -> tuple[Column, dict[str, Tensor]]:
    """Return the column, with statistics of the training split, and raw values. Raises `ValueError`."""
    if kind == "class":
        return read_classes(cells)
    if kind == "flags":
        return read_flags(cells)
    if encoder is None:
        return read_numbers(cells, kind)
    texts = list(dict.fromkeys(text for part in cells.map(require_text).values() for text in part if text is not None))
    vectors = dict(zip(texts, run_encoder(encoder, texts).numpy(), strict=True))
    return read_numbers(replace(cells, values=cells.map(vectors.__getitem__)), kind, encoder)


def require_text(value: Any) -> str:
    """Return a text. Raises `ValueError` for another type."""
    if not isinstance(value, str):
        raise ValueError(f"expected text (got {shorten(value)})")
    return value


def read_classes(cells: Cells) -> tuple[Column, dict[str, Tensor]]:
    """Read classes, numbered in the order of the data set's names or, without these, of the sorted values."""
    found = cells.map(partial(read_label, names=cells.names))
    names = cells.names or sort_names(label for part in found.values() for label in part)
    ids = {name: place for place, name in enumerate(names)}
    parts = {split: [-1 if label is None else ids[str(label)] for label in part] for split, part in found.items()}
    return ClassColumn(names=names), {split: torch.tensor(part) for split, part in parts.items()}


def read_flags(cells: Cells) -> tuple[Column, dict[str, Tensor]]:
    """Read lists of names; a text may join them by `;`."""

    def read(value: Any) -> set[Any]:
        several = [part.strip() for part in value.split(";")] if isinstance(value, str) else value
        return {read_label(one, cells.names) for one in (several if isinstance(several, list) else [several])}

    found = cells.map(read)
    names = cells.names or sort_names(one for part in found.values() for flags in part for one in flags or ())
    parts = {split: torch.full((len(part), len(names)), math.nan) for split, part in found.items()}
    for split, part in found.items():
        for row, flags in enumerate(part):
            if flags is not None:
                parts[split][row] = torch.tensor([name in map(str, flags) for name in names])
    return FlagsColumn(names=names), parts


def read_label(value: Any, names: list[str] | None) -> float | str | None:
    """Return a class: a text, a number, `yes` or `no`; or the name at that place, of which -1 is null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and names is not None:
        if value >= len(names):
            raise ValueError(f"{value} is not a class; allowed are 0 to {len(names) - 1}")
        return names[value] if value >= 0 else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, (int, float, str)) or not is_class_name(str(value)):
        raise ValueError(f"expected a number or a short text (got {shorten(value)})")
    return value


def sort_names(labels: Iterable[Any]) -> list[str]:
    """Return distinct names, numbers first. Raises `ValueError` if there are none."""
    known = {label for label in labels if label is not None}
    if not known:
        raise ValueError("the column has no values")
    return list(dict.fromkeys(map(str, sorted(known, key=lambda label: (isinstance(label, str), label)))))


def read_numbers(cells: Cells, kind: str, encoder: str | None = None) -> tuple[Column, dict[str, Tensor]]:
    """Read numbers, or lists of equally many numbers."""
    sizes = list[int]()

    def read(value: Any) -> NDArray[np.float64]:
        several = [math.nan if one is None else one for one in value] if isinstance(value, list) else value
        numbers = np.atleast_1d(np.asarray(several))
        if numbers.dtype.kind not in "biuf" or numbers.ndim != 1 or not len(numbers):
            raise ValueError(f"expected numbers (got {shorten(value)})")
        if (np.abs(numbers) > torch.finfo(torch.float32).max).any():
            raise ValueError(f"numbers must be finite (got {shorten(value)})")
        sizes.append(len(numbers))
        if len(numbers) != sizes[0]:
            raise ValueError(f"{len(numbers)} numbers, unlike other images, which have {sizes[0]}")
        return numbers.astype(np.float64)

    found = cells.map(read)
    null = np.full(sizes[0] if sizes else 1, math.nan)
    parts = {split: np.stack([null if one is None else one for one in part]) for split, part in found.items()}
    train, raw = parts["train"], {split: torch.from_numpy(part).float() for split, part in parts.items()}
    if np.isnan(train).all(0).any():
        raise ValueError("no image of the training split has a value")
    if kind == "vector":
        for part in raw.values():
            part[part.isnan().any(1)] = math.nan
        scale = float(np.nanmean(train**2)) ** 0.5
        return VectorColumn(size=len(null), scale=scale or 1.0, encoder=encoder or ""), raw
    mean, std = np.nanmean(train, 0).tolist(), [each or 1.0 for each in np.nanstd(train, 0).tolist()]
    return NumberColumn(mean=mean, std=std, low=np.nanmin(train, 0).tolist(), high=np.nanmax(train, 0).tolist()), raw


# Images -------------------------------------------------------------------------------------------


class ConditionImages(ImageDataset):
    """Images of another size that are moved as those they belong to: shifts are in pixels of the others."""

    def __init__(self, config: DataConfig, shape: tuple[int, int, int], rows: Rows) -> None:
        own = config.model_copy(update={"channels": shape[0], "image_size": shape[1:]})
        super().__init__(own, rows, Decoded(np.arange(rows.size), None, []), None, [])
        down, right = (side / other for side, other in zip(shape[1:], config.image_shape[1:], strict=True))
        self._scale = torch.tensor([1, 1, 1, down, right])

    def raw_batch(
        self, indices: Indices, epochs: NDArray[np.int64] | int, seed: int, *, augment: bool = True
    ) -> tuple[Tensor, ...]:
        """Return the arguments of `prepare`, as for the images that these belong to."""
        pixels, *changes = super().raw_batch(indices, epochs, seed, augment=augment)
        return pixels, *(each * self._scale for each in changes)


def load_grid(
    pictures: dict[str, Rows], source: ConditionSource, name: str, config: DataConfig, together: bool
) -> LoadedColumn:
    """Check that all images can be decoded, and return them as a column. Those skipped are null. Raises `ValueError`
    without a tokenizer."""
    if source.tokenizer is None:
        raise ValueError("tokenizer: missing; a grid needs the tokenizer of its images")
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder(source.tokenizer))
    images, missing = dict[str, ImageDataset](), dict[str, Tensor]()
    for split, rows in pictures.items():
        null = missing[split] = torch.zeros(rows.size, dtype=torch.bool)
        for part in np.split(np.arange(rows.size), range(CHUNK, rows.size, CHUNK)):
            null[part] = torch.tensor([payload is None for payload in rows.read(part.tolist())])

        def read(some: Sequence[int], rows: Rows = rows, null: Tensor = null) -> list[Payload]:
            return [BLACK if null[row] else found for row, found in zip(some, rows.read(some), strict=True)]

        rows = replace(rows, read=read)
        bad = decode_all(rows, np.arange(rows.size), tokenizer.image_shape, 0, together).bad
        check_bad([(bad, rows.size)], config)
        null[[image.row for image in bad]] = True
        images[split] = ConditionImages(config, tokenizer.image_shape, rows)
    column = GridColumn(grid=tokenizer.grid, tokenizer=tokenizer.fingerprint())
    return LoadedColumn(column, source.describe(name), images=images, missing=missing, tokenizer=tokenizer)


def file_pictures(paths: Mapping[str, Sequence[str | None]]) -> dict[str, Rows]:
    """Return the images of files, by split."""

    def open_split(paths: Sequence[str | None]) -> Rows:
        def read(rows: Sequence[int]) -> list[Payload]:
            return [path and Path(path) for path in (paths[row] for row in rows)]

        return Rows(len(paths), read, lambda row: str(paths[row]), None)

    return {split: open_split(part) for split, part in paths.items()}


def pair_images(folder: Path, config: DataConfig, splits: Mapping[str, ImageDataset]) -> dict[str, Rows]:
    """Return the images in `folder` with the stems (paths without suffix) of the images in the source."""
    root, partners = config.path or Path(), dict[str, str]()

    def stem(path: str, root: Path) -> str:
        return normalize_path(os.path.splitext(os.path.relpath(path, root))[0])

    for path in image_paths(folder):
        if (other := partners.setdefault(stem(path, folder), path)) != path:
            raise ValueError(f"{other} and {path} have one stem")
    stems = {stem(path, root) for path in image_paths(root)}
    if absent := sorted(stems - partners.keys()) or sorted(partners.keys() - stems):
        raise ValueError(f"{folder if absent[0] in stems else root}: no image with the stem {absent[0]!r}")
    paths = paths_of(splits).items()
    return file_pictures({split: [partners[stem(path, root)] for path in part] for split, part in paths})


def earlier_frames(frame: int, splits: Mapping[str, ImageDataset]) -> dict[str, Rows]:
    """Return the image at the offset `frame` from each in its folder, in natural order; none before the first. Raises
    `ValueError` for a folder whose images are in two splits."""
    before, owners = dict[str, str | None](), dict[str, str]()
    for split, part in paths_of(splits).items():
        clips = dict[str, list[str]]()
        for path in splits[split].origin[0].paths or []:
            clips.setdefault(os.path.dirname(path), []).append(path)
        for folder in {os.path.dirname(path) for path in part}:
            if owners.setdefault(folder, split) != split:
                raise ValueError(f"the clip {folder} is in two splits; data.clips=true holds out whole clips")
            clip = sorted(clips[folder], key=natural_key)
            before |= {path: clip[at + frame] if at + frame >= 0 else None for at, path in enumerate(clip)}
    return file_pictures({split: [before[path] for path in part] for split, part in paths_of(splits).items()})


def natural_key(path: str) -> list[int | str]:
    """Return a sort key that puts `2.png` before `10.png`."""
    parts = re.split(r"(\d+)", path)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]
