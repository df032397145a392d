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
from collections.abc import Callable, Iterable, Mapping
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
from .decoding import Decoded, Payload, Rows, decode_all
from .folder import (
    SHEETS,
    are_disjoint,
    files_below,
    holds_files,
    image_paths,
    normalize_path,
    parse_labels,
    read_sheet,
)
from .tables import classes_in_parquet, read_payload

FEW = 4  # a list of more numbers is taken for a vector
TEXT, TABLES = (".csv", ".tsv"), (".csv", ".tsv", ".jsonl", ".parquet")
BLACK = np.zeros((1, 1), np.uint8)
Change = Literal["flip", "shift", "rotate", "zoom"]
Pictures = dict[str, tuple[Rows, NDArray[np.bool_]]]
"""Images parallel to those of each split, and which are missing."""


class ConditionSource(Config):
    """Where a column comes from; by default, from the column of the same name."""

    kind: Literal["class", "flags", "number", "vector", "grid"] | None = Field(
        None, description="kind of the column; null: guessed from the values"
    )
    column: str | None = Field(
        None, description="column of the source's tables, of the folder's metadata, or of `table`"
    )
    images: str | None = Field(None, description="folder of images with the same names as those of data.source")
    frame: int | None = Field(
        None, ge=-64, le=-1, description="-1: the image before each in its folder, which is a clip; -2: the one before"
    )
    tokenizer: TokenizerFolder | None = Field(None, description="tokenizer of the images of a grid")
    encoder: str | None = Field(
        None, description="what computes vectors from text: `ngrams:SIZE`, or MODULE:FUNCTION loaded by --import"
    )
    changed_by: tuple[Change, ...] = Field(
        (), description="augmentations (of data.augment) that would falsify the values"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ConditionSource:
        given = [name for name in ("column", "images", "frame") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        if self.kind not in (None, "grid") and (self.images or self.frame or self.tokenizer):
            raise ValueError(f"images, frame and tokenizer are for columns of kind grid (got {self.kind})")
        if self.encoder and (self.kind not in (None, "vector") or self.images or self.frame or self.tokenizer):
            raise ValueError("encoder is for columns of text, which become vectors")
        return self

    def describe(self, name: str) -> dict[str, Any]:
        """Return where the column comes from, without local paths."""
        origin = {"images": os.path.basename(os.path.normpath(self.images or "")), "frame": self.frame}
        found = {key: value for key, value in origin.items() if getattr(self, key) is not None}
        changes = {"changed_by": list(self.changed_by)} if self.changed_by else {}
        return (found or {"column": self.column or name}) | changes


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
    has_files = config.path is not None and config.path.is_dir() and holds_files(config.path)
    for name, source in parse_sources(sources).items():
        if not NAME.fullmatch(name) or name in (LABEL, "labels"):
            names = "use letters, digits and _ (data.label_column chooses the labels)"
            raise UserError(f"conditions: {quote(name)} cannot name a column; {names}")
        if false := [change for change in source.changed_by if change in changes]:
            raise UserError(f"conditions.{name}: data.augment.{false[0]} would falsify it, as changed_by says")
        if source.images is not None or source.frame is not None:
            if not has_files:
                raise UserError(f"conditions.{name}: needs a folder of images as data.source (got {config.source})")
            if source.tokenizer is None:
                raise UserError(f"conditions.{name}.tokenizer: missing; a grid needs the tokenizer of its images")
        folder = Path(source.images or ".").expanduser()
        if not folder.is_dir() or source.images and not are_disjoint(folder, config.path or folder):
            problem = "must lie outside data.source" if folder.is_dir() else "there is no such folder"
            raise UserError(f"conditions.{name}.images: {folder}: {problem}")
    if table is not None:
        path = Path(table).expanduser()
        if not path.is_file() or path.suffix not in TABLES:
            problem = f"must be a file {', '.join(TABLES)}" if path.exists() else "there is no such file"
            raise UserError(f"table: {table}: {problem}")
        if not has_files:
            raise UserError(f"table: needs a folder of images as data.source (got {config.source})")


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
            found[name] = load_grid(pictures, source.tokenizer, config, source.describe(name), together)
        except ValueError as error:
            raise UserError(one_line(f"conditions.{name}: {error}")) from error
    return found


# Origins ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """The values of a column by split, parallel to the images; None is null. `describe` locates one in messages."""

    values: dict[str, list[Any]]
    describe: Callable[[str, int], str]
    names: list[str] | None = None
    """Names of the classes or flags, if the data set has them."""
    is_text: bool = False
    """Whether they are cells of a CSV file."""
    is_picture: bool = False

    def map(self, read: Callable[[Any], Any]) -> dict[str, list[Any]]:
        """Convert all values except null. Raises `ValueError`, which names the row."""

        def convert(split: str, row: int, value: Any) -> Any:
            try:
                return None if value is None else read(value)
            except ValueError as error:
                raise ValueError(f"{self.describe(split, row)}: {error}") from error

        return {
            split: [convert(split, row, value) for row, value in enumerate(part)] for split, part in self.values.items()
        }

    def given(self) -> Iterable[Any]:
        """Yield all values that are not null."""
        return (value for part in self.values.values() for value in part if value is not None)

    def guess_kind(self) -> str:
        """Return the kind of column that the first value suggests."""
        if self.is_picture:
            return "grid"
        values = parse_cells(self).given()
        first = next((one for one in values if not (isinstance(one, list) and not one)), None)
        if isinstance(first, list):
            is_flags = self.names is not None or isinstance(first[0], str)
            return "flags" if is_flags else "number" if len(first) <= FEW else "vector"
        return "class" if self.names is not None or isinstance(first, str) else "number"


class SheetColumns:
    """Columns of the sheets in a folder of images, or of a table beside it. A row belongs to the image `file_name`;
    `NAME_file_name` is a column NAME of images."""

    def __init__(self, config: DataConfig, splits: Mapping[str, ImageDataset], table: str | None) -> None:
        root = config.path or Path()
        sheets = [Path(table).expanduser()] if table else [p for p in files_below(root) if p.name in SHEETS]
        if not sheets:
            raise ValueError(f"{root} has no {', '.join(SHEETS)}; add one, or give table=FILE")
        self.rows, self.sheets, self.paths = dict[str, tuple[Path, dict[str, Any]]](), sheets, paths_of(splits)
        for sheet in sheets:
            for row in read_sheet(sheet, "table" if table else "data.source"):
                name = row.get(f"{config.image_column}_file_name", row.get("file_name"))
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{sheet}: a row has no file_name: {row}")
                path = full_path((root if table else sheet.parent) / name)
                if path in self.rows:
                    raise ValueError(f"{sheet}: two rows have the file_name {name}")
                if None in row:
                    raise ValueError(f"{sheet}: {name}: the row has more cells than the file has columns")
                self.rows[path] = (root if table else sheet.parent), row
        known = {full_path(path) for path in image_paths(root)} if table else self.rows.keys()
        if unknown := [path for path in self.rows if path not in known]:
            raise ValueError(f"{table}: lists {unknown[0]}, which is no image in {root}")
        if missing := [path for part in self.paths.values() for path in part if full_path(path) not in self.rows]:
            raise ValueError(f"{sheets[0]}: no row for the image {missing[0]}")
        self.names = list(dict.fromkeys(key for _, row in self.rows.values() for key in row))

    def describe(self, split: str, row: int) -> str:
        """Name a row for messages."""
        return f"{self.sheets[0]}: {self.paths[split][row]}"

    def read(self, column: str) -> Cells:
        """Return the values of a column."""
        files = f"{column}_file_name"
        key = find_name(files if column not in self.names and files in self.names else column, self.names)
        parts = {split: [self.rows[full_path(path)][1].get(key) for path in part] for split, part in self.paths.items()}
        tables = [sheet for sheet in self.sheets if sheet.suffix == ".parquet"]
        names = classes_in_parquet(str(tables[0]), key) if tables else None
        is_text = any(sheet.suffix in TEXT for sheet in self.sheets)
        return Cells(drop_missing(parts), self.describe, names, is_text, is_picture=key == files)

    def read_pictures(self, column: str) -> Pictures:
        """Return the image files of a column."""
        cells, found = self.read(column), dict[str, list[str | None]]()
        cells.map(require_text)
        for split, part in cells.values.items():
            folders = [self.rows[full_path(path)][0] for path in self.paths[split]]
            found[split] = [name and os.path.join(folder, name) for folder, name in zip(folders, part, strict=True)]
        return file_pictures(found)


class TableColumns:
    """Columns of parquet files or of a data set of the Hub."""

    def __init__(self, config: DataConfig, splits: Mapping[str, ImageDataset]) -> None:
        self.source, self.splits = config.source, splits
        if any(images.origin[0].table is None for images in splits.values()):
            raise ValueError(
                f"{config.source} has no columns; columns come from parquet files, Hub data sets, and folders of images"
            )

    def describe(self, split: str, row: int) -> str:
        """Name a row for messages."""
        rows, positions = self.splits[split].origin
        return f"{self.source}: {rows.name(int(positions[row]))}"

    def read(self, column: str) -> Cells:
        """Return the values of a column, but not its images."""
        import datasets

        parts, names, is_picture = {}, None, False
        for split, images in self.splits.items():
            rows, positions = images.origin
            feature = rows.table.features[find_name(column, rows.table.column_names)]
            is_picture = isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) == "binary"
            is_picture |= isinstance(feature, dict) and "bytes" in feature
            if not is_picture:
                parts[split] = rows.table.select_columns([column]).select(positions)[column][:]
            names = getattr(getattr(feature, "feature", feature), "names", None)
        return Cells(drop_missing(parts), self.describe, names, is_picture=is_picture)

    def read_pictures(self, column: str) -> Pictures:
        """Return the encoded images of a column."""
        import datasets
        import pyarrow.compute as pc

        found: Pictures = {}
        for split, images in self.splits.items():
            rows, positions = images.origin
            table = rows.table.select_columns([find_name(column, rows.table.column_names)])
            try:
                table = table.cast_column(column, datasets.Image(decode=False))
            except Exception as error:  # pyarrow raises several types for a column that cannot be cast
                raise ValueError(f"the column {column!r} does not hold images: {error}") from error
            parts = [pc.is_null(pc.struct_field(table.data.column(column), part)) for part in ("bytes", "path")]
            missing = np.logical_and(*(np.asarray(part) for part in parts))[positions]

            def read(rows: Any, table: Any = table, positions: Any = positions) -> list[Payload]:
                cells = table[positions[list(rows)]][column]
                return [read_payload(cell, self.source) for cell in cells]

            found[split] = Rows(len(positions), read, partial(self.describe, split), None), missing
        return found


def open_columns(
    config: DataConfig, splits: Mapping[str, ImageDataset], table: str | None
) -> SheetColumns | TableColumns:
    """Return the columns of a source."""
    has_files = all(images.origin[0].paths is not None for images in splits.values())
    return SheetColumns(config, splits, table) if has_files else TableColumns(config, splits)


def find_name(column: str, names: list[str]) -> str:
    """Return the name of a column. Raises `ValueError`, which suggests the nearest one."""
    if column not in names:
        hint = did_you_mean(column, names, "").rstrip("?")
        raise ValueError(
            f"there is no column {column!r}; {hint and hint + '? '}the columns are {describe_names(names)}"
        )
    return column


def paths_of(splits: Mapping[str, ImageDataset]) -> dict[str, list[str]]:
    """Return the paths of the image files of each split."""
    found = {}
    for split, images in splits.items():
        rows, positions = images.origin
        found[split] = [(rows.paths or [])[position] for position in positions.tolist()]
    return found


def full_path(path: Path | str) -> str:
    """Return a path in the one form in which it is looked up."""
    return normalize_path(os.path.abspath(path))


def drop_missing(parts: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Replace empty text and NaN by None."""

    def is_missing(value: Any) -> bool:
        return isinstance(value, str) and not value or isinstance(value, float) and math.isnan(value)

    return {split: [None if is_missing(value) else value for value in part] for split, part in parts.items()}


# Values -------------------------------------------------------------------------------------------


def convert_cells(cells: Cells, kind: str, encoder: str | None) -> tuple[Column, dict[str, Tensor]]:
    """Return the column, with statistics of the training split, and raw values. Raises `ValueError`."""
    if kind == "class":
        return read_classes(cells)
    if kind == "flags":
        return read_flags(parse_cells(cells))
    if encoder is None:
        return read_numbers(parse_cells(cells), kind)
    cells.map(require_text)
    texts = list(dict.fromkeys(cells.given()))
    vectors = dict(zip(texts, run_encoder(encoder, texts).numpy(), strict=True))
    return read_numbers(replace(cells, values=cells.map(vectors.__getitem__)), kind, encoder)


def parse_cells(cells: Cells) -> Cells:
    """Return cells of a CSV file as numbers, booleans or lists (written as JSON) if all are; and others unchanged."""
    parsed = drop_missing(cells.map(parse_cell)) if cells.is_text else cells.values
    found = replace(cells, values=parsed, is_text=False)
    return found if all(isinstance(value, (int, float, list)) for value in found.given()) else cells


def parse_cell(text: str) -> Any:
    """Parse the text of a number, a boolean or a list."""
    for parse in (json.loads, float):
        try:
            return parse(text.lower() if text in ("True", "False") else text)
        except (ValueError, RecursionError):
            continue
    return text


def read_classes(cells: Cells) -> tuple[Column, dict[str, Tensor]]:
    """Read classes, numbered in the order of the data set's names or, without these, of the sorted values."""
    if cells.is_text and not all(isinstance(value, bool) for value in parse_cells(cells).given()):
        every = parse_labels([value for part in cells.values.values() for value in part])
        labels = iter(every)  # numbers, if all are
        cells = replace(cells, values={split: [next(labels) for _ in part] for split, part in cells.values.items()})
    elif cells.is_text:
        cells = parse_cells(cells)
    found = cells.map(partial(read_label, names=cells.names))
    names = cells.names or sort_names(label for part in found.values() for label in part)
    ids = {name: place for place, name in enumerate(names)} | {None: -1}
    values = {split: [ids[None if label is None else str(label)] for label in part] for split, part in found.items()}
    return ClassColumn(names=names), {split: torch.tensor(part, dtype=torch.long) for split, part in values.items()}


def read_flags(cells: Cells) -> tuple[Column, dict[str, Tensor]]:
    """Read lists of names; a text may join them by `;`."""

    def read(value: Any) -> set[str]:
        several = [part.strip() for part in value.split(";")] if isinstance(value, str) else value
        several = several if isinstance(several, list) else [several]
        return {str(label) for label in (read_label(one, cells.names) for one in several) if label not in (None, "")}

    found = cells.map(read)
    every = {label for part in found.values() for labels in part for label in labels or ()}
    names = cells.names or sort_names(int(one) if re.fullmatch(r"\d{1,18}", one) else one for one in every)
    null = [math.nan] * len(names)
    rows = {
        split: [null if flags is None else [float(name in flags) for name in names] for flags in part]
        for split, part in found.items()
    }
    return FlagsColumn(names=names), {split: torch.tensor(part).view(-1, len(names)) for split, part in rows.items()}


def read_label(value: Any, names: list[str] | None) -> int | str | None:
    """Return a class: a text, a whole number, `yes` or `no`; or the name at that place, of which -1 is null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and names is not None:
        if not -1 <= value < len(names):
            raise ValueError(f"{value} is not a class; allowed are 0 to {len(names) - 1}, and -1 for null")
        return names[value] if value >= 0 else None
    if not isinstance(value, (int, str)) or not is_class_name(str(value)):
        raise ValueError(f"expected a whole number or a short text (got {shorten(value)})")
    return value


def sort_names(labels: Iterable[int | str | None]) -> list[str]:
    """Return distinct names, numbers first. Raises `ValueError` if there are none."""
    known = sorted({one for one in labels if one is not None}, key=lambda label: (isinstance(label, str), label))
    if not known:
        raise ValueError("the column has no values")
    return list(dict.fromkeys(map(str, known)))


def read_numbers(cells: Cells, kind: str, encoder: str | None = None) -> tuple[Column, dict[str, Tensor]]:
    """Read numbers, or lists of equally many numbers."""
    sizes = set[int]()

    def read(value: Any) -> NDArray[np.float64]:
        several = value if isinstance(value, (list, np.ndarray)) else [value]
        several = [math.nan if one is None else one for one in several] if isinstance(several, list) else several
        numbers = np.asarray(several)
        if numbers.dtype.kind not in "biuf" or numbers.ndim != 1 or not len(numbers):
            raise ValueError(f"expected numbers (got {shorten(value)})")
        with np.errstate(over="ignore"):
            if np.isinf(numbers.astype(np.float32)).any():
                raise ValueError(f"numbers must be finite (got {shorten(value)})")
        if sizes and len(numbers) not in sizes:
            raise ValueError(f"{len(numbers)} numbers, unlike other images, which have {next(iter(sizes))}")
        sizes.add(len(numbers))
        return numbers.astype(np.float64)

    found = cells.map(read)
    null = np.full(max(sizes, default=1), math.nan)
    parts = {split: np.array([null if one is None else one for one in part]) for split, part in found.items()}
    parts = {split: part.reshape(-1, len(null)) for split, part in parts.items()}
    if kind == "vector":
        for part in parts.values():
            part[np.isnan(part).any(1)] = math.nan
    train, raw = parts["train"], {split: torch.from_numpy(part).float() for split, part in parts.items()}
    if np.isnan(train).all(0).any():
        raise ValueError("no image of the training split has a value")
    if kind == "vector":
        scale = float(np.nanmean(train**2)) ** 0.5
        return VectorColumn(size=len(null), scale=scale or 1.0, encoder=encoder or ""), raw
    mean, std = np.nanmean(train, 0).tolist(), [each or 1.0 for each in np.nanstd(train, 0).tolist()]
    return NumberColumn(mean=mean, std=std, low=np.nanmin(train, 0).tolist(), high=np.nanmax(train, 0).tolist()), raw


def require_text(value: Any) -> str:
    """Return a text. Raises `ValueError` for another type."""
    if not isinstance(value, str):
        raise ValueError(f"expected text (got {shorten(value)})")
    return value


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
    pictures: Pictures, folder: str | None, config: DataConfig, source: dict[str, Any], together: bool
) -> LoadedColumn:
    """Check that all images can be decoded, and return them as a column. Those skipped are null. Raises `ValueError`
    without a tokenizer."""
    if folder is None:
        raise ValueError("tokenizer: missing; a grid needs the tokenizer of its images")
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder(folder))
    images, nulls = dict[str, ImageDataset](), dict[str, Tensor]()
    for split, (rows, missing) in pictures.items():

        def read(some: Any, rows: Rows = rows, missing: NDArray[np.bool_] = missing) -> list[Payload]:
            return [BLACK if missing[row] else found for row, found in zip(some, rows.read(some), strict=True)]

        rows = replace(rows, read=read)
        bad = decode_all(rows, np.arange(rows.size), tokenizer.image_shape, 0, together).bad
        check_bad([(bad, rows.size)], config)
        missing[[image.row for image in bad]] = True
        images[split] = ConditionImages(config, tokenizer.image_shape, rows)
        nulls[split] = torch.from_numpy(missing)
    column = GridColumn(grid=tokenizer.grid, tokenizer=tokenizer.fingerprint())
    return LoadedColumn(column, source, images=images, missing=nulls, tokenizer=tokenizer)


def file_pictures(paths: dict[str, list[str | None]]) -> Pictures:
    """Return the images of files."""
    found: Pictures = {}
    for split, part in paths.items():

        def read(rows: Any, part: list[str | None] = part) -> list[Payload]:
            return [path and Path(path) for path in (part[row] for row in rows)]

        missing = np.array([path is None for path in part], dtype=bool)
        found[split] = Rows(len(part), read, [str(path) for path in part].__getitem__, None), missing
    return found


def pair_images(folder: Path, config: DataConfig, splits: Mapping[str, ImageDataset]) -> Pictures:
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
    return file_pictures(
        {split: [partners[stem(path, root)] for path in part] for split, part in paths_of(splits).items()}
    )


def earlier_frames(frame: int, splits: Mapping[str, ImageDataset]) -> Pictures:
    """Return the image at the offset `frame` from each in its folder, in natural order; none before the first."""
    found, known = {}, dict[str, str]()
    for split, part in paths_of(splits).items():
        for path in part:
            if known.setdefault(folder := os.path.dirname(path), split) != split:
                raise ValueError(
                    f"images of the clip {folder} are in two splits; data.clips=true holds out whole clips"
                )
        clips = dict[str, list[str]]()
        for path in splits[split].origin[0].paths or []:
            clips.setdefault(os.path.dirname(path), []).append(path)
        before: dict[str, str | None] = {}
        for clip in clips.values():
            clip.sort(key=natural_key)
            before |= {path: clip[at + frame] if at + frame >= 0 else None for at, path in enumerate(clip)}
        found[split] = [before[path] for path in part]
    return file_pictures(found)


def natural_key(path: str) -> tuple[list[int | str], str]:
    """Return a sort key that puts `2.png` before `10.png`."""
    parts = re.split(r"(\d+)", os.path.basename(path))
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path
