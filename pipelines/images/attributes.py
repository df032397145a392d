"""Columns of image data sets: what the images of a token dataset are conditioned on.

A column comes from the tables of the source (parquet files, a Hub data set), from the sheets of an image folder
(`metadata.csv`, `.jsonl`, `.parquet`), from a table beside it, from a folder of images with the same names, or from
the images before these in their folder. `load_attributes` reads all columns, parallel to the images of each split."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from prior.columns import COLUMN_KINDS, Column, GridColumn, VectorColumn, find_column, names_problem
from tokenizer import Tokenizer
from tokenizer.spec import ImageSpec

from ..columns import FORMATS, guess_format, is_empty
from ..config import Config, UserError, is_first_process, tell, user_errors
from ..provenance import TokenizerFolder, tokenizer_folder
from .checking import StackedCache, check_bad, decode_all
from .clip_files import choose_file_kind
from .crops import CropImages
from .dataset import Epochs, ImageDataset
from .folder import (
    SHEETS,
    are_disjoint,
    find_sheets,
    full_path,
    image_paths,
    natural_key,
    normalize_path,
    read_sheet_rows,
)
from .formats import NO_IMAGE, Payload, PixelArray, try_decode
from .settings import DataConfig
from .sources import Source
from .splits import SplitPart
from .tables import read_payload
from .views import PLACE

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
CELLS = 1024  # cells of a table that are read at a time
if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(COLUMN_KINDS)]


class AttributeSource(Config):
    """Where a column comes from; by default, from the column of the same name."""

    kind: Kind | None = Field(None, description="kind of the column; null: guessed from the values")
    column: str | None = Field(None, description="column of the tables, of the folder's metadata, or of `table`")
    images: str | None = Field(None, description="folder of images with the same names as those of data.source")
    frame: int | None = Field(
        None, ge=-64, le=-1, description="-1: the image before each in its folder, which is a clip; -2: the one before"
    )
    tokenizer: TokenizerFolder | None = Field(None, description="tokenizer of the images of a grid")
    encoder: str | None = Field(
        None, description="what computes vectors from text: `ngrams:SIZE`, or MODULE:FUNCTION loaded by --import"
    )
    place: bool = Field(
        False, description="with data.crop, where the centre of each crop is in its image, from 0 to 1 down and right"
    )
    changed_by: tuple[Literal["flip", "shift", "rotate", "zoom"], ...] = Field(
        (), description="augmentations (of data.augment) that would falsify the values"
    )

    @model_validator(mode="before")
    @classmethod
    def _name_column(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agree(self) -> AttributeSource:
        origins = [name for name in ("column", "images", "frame") if getattr(self, name) is not None]
        if self.place and (origins or self.tokenizer or self.encoder or self.kind not in (None, "vector")):
            raise ValueError("place is computed, and takes no other settings")
        if len(origins) > 1:
            raise ValueError(f"{' and '.join(origins)} exclude each other")
        if self.kind not in (None, "grid") and (self.is_picture or self.tokenizer):
            raise ValueError(f"images, frame and tokenizer are for columns of kind grid (got {self.kind})")
        if self.tokenizer is None and (self.is_picture or self.kind == "grid"):
            raise ValueError("tokenizer: missing; a grid needs the tokenizer of its images")
        if self.encoder and (self.kind not in (None, "vector") or self.is_picture or self.tokenizer):
            raise ValueError("encoder is for columns of text, which become vectors")
        return self

    @model_serializer(mode="wrap")
    def _omit_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        return {key: value for key, value in found.items() if key != "place" or value}

    @property
    def is_picture(self) -> bool:
        return self.images is not None or self.frame is not None

    def describe(self, name: str) -> dict[str, Any]:
        """Return where the column comes from, without local paths."""
        own = {"frame", "changed_by", "place"}
        found: dict[str, Any] = self.model_dump(mode="json", include=own, exclude_defaults=True)
        folder = {"images": Path(self.images).name} if self.images else {}
        return ({} if self.is_picture or self.place else {"column": self.column or name}) | folder | found


@dataclass(frozen=True)
class LoadedColumn:
    """A column of all splits, by name (`train`, `validation`, `test`), parallel to the split's images.

    source: where it came from, without local paths. values: raw values `(n, *column.shape)`, of crops those of one
    variant of the images after another. For grids, the `images` to encode and their `tokenizer` instead."""

    column: Column
    source: dict[str, Any]
    values: dict[str, Tensor] = field(default_factory=dict)
    images: dict[str, AttributeImages] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None


def choose_data(config: DataConfig, sources: Mapping[str, AttributeSource]) -> DataConfig:
    """Return the settings with which to load the images: with `clips`, if a column consists of other frames."""
    has_earlier = any(source.frame is not None for source in sources.values())
    return config.model_copy(update={"clips": True}) if has_earlier and config.group is None else config


def check_sources(
    config: DataConfig, sources: Mapping[str, AttributeSource], table: str | None = None, augmentations: int = 0
) -> None:
    """Raise `UserError` for mistakes that can be detected before images are read."""
    changes = [name for name, value in config.augment.model_dump().items() if value and augmentations]
    no_files = f"needs a folder of images as data.source (got {config.source})"
    for problem in names_problem(sources):
        raise UserError(f"attributes: {problem}")
    for name, source in sources.items():
        if false := [change for change in source.changed_by if change in changes]:
            raise UserError(f"attributes.{name}: data.augment.{false[0]} would falsify it, as changed_by says")
        if source.is_picture and config.frames is not None:
            raise UserError(f"attributes.{name}: images and frame are for single images (data.frames={config.frames})")
        if source.place and config.crop is None:
            raise UserError(f"attributes.{name}.place: needs crops; data.crop=random")
        if source.place and "flip" in changes:
            raise UserError(f"attributes.{name}: data.augment.flip would falsify the place of a crop")
        if source.is_picture and config.folder is None:
            raise UserError(f"attributes.{name}: {no_files}")
        if source.images is not None and not (folder := Path(source.images).expanduser()).is_dir():
            raise UserError(f"attributes.{name}.images: there is no folder {folder}")
        if source.images is not None and not are_disjoint(folder, config.path or folder):
            raise UserError(f"attributes.{name}.images: {folder} must lie outside data.source ({config.source})")
    if table is not None and (not os.path.isfile(path := os.path.expanduser(table)) or not path.endswith(TABLES)):
        raise UserError(f"table: there is no file {table} with one of the suffixes {', '.join(TABLES)}")
    if table is not None and config.folder is None:
        raise UserError(f"table: {no_files}")


def load_attributes(
    config: DataConfig,
    sources: Mapping[str, AttributeSource],
    splits: Mapping[str, ImageDataset],
    *,
    table: str | None = None,
    distributed: bool = False,
    augmentations: int = 0,
    seed: int = 0,
) -> dict[str, LoadedColumn]:
    """Read the columns of `splits` (by the names of `encode.name_splits`, `train` first), whose images were loaded
    with `choose_data(config, sources)`. Prints the kinds that are guessed.

    table: a CSV, TSV, JSON lines or parquet file with a column `file_name`, relative to the folder of the images.
    distributed: all launched processes call this. augmentations, seed: those of `encode`, which move random crops.
    Raises `UserError`."""
    images = list(splits.values())
    paths = paths_of(images) if all(each.origin[0].paths is not None for each in images) else None
    wanted, sheets = {source.column or name for name, source in sources.items()}, None
    sizes, found = [len(each) for each in images], dict[str, LoadedColumn]()
    for name, source in sources.items():
        column = source.column or name
        if source.place:
            found[name] = locate_crops(splits, source.describe(name), augmentations, seed)
            continue
        with user_errors(ValueError, prefix=f"attributes.{name}: "):
            if source.images is not None:
                cells = pair_images(Path(source.images).expanduser(), config, paths or [])
            elif source.frame is not None:
                cells = earlier_frames(source.frame, splits)
            elif paths is not None:
                sheets = sheets or Sheets(config, paths, table, wanted)
                cells = sheets.read(column, source.kind == "grid")
            else:
                cells = read_table(config.source, images, column, source.kind == "grid")
            kind = source.kind or ("vector" if source.encoder else guess_format(cells).kind)
            if FORMATS[kind].of_pictures:
                found[name] = load_pictures(cells, source, name, config, splits, distributed)
                continue
            if source.tokenizer is not None:
                raise ValueError(f"tokenizer is for columns of kind grid, and this is of kind {kind}")
            loaded, raw = FORMATS[kind].from_cells(cells, sizes[0], source.encoder or "")
            found[name] = LoadedColumn(loaded, source.describe(name), dict(zip(splits, raw.split(sizes), strict=True)))
            report_kind(name, source, loaded)
    return found


def report_kind(name: str, source: AttributeSource, column: Column) -> None:
    if not (source.kind or source.encoder) and is_first_process():
        about = f"of kind {column.kind}, guessed from its values ({column.describe()})"
        tell(f"attributes.{name}: {about}; attributes.{name}.kind=KIND chooses another")


def locate_crops(
    splits: Mapping[str, ImageDataset], source: dict[str, Any], augmentations: int, seed: int
) -> LoadedColumn:
    values = dict[str, Tensor]()
    for name, images in splits.items():
        if isinstance(images, CropImages):  # all are
            every, variants = np.arange(len(images)), range(1 + augmentations * (name == "train"))
            values[name] = torch.cat([images.centres(every, variant, seed) for variant in variants])
    scale = float(values["train"].double().square().mean().sqrt())
    return LoadedColumn(VectorColumn(size=2, scale=scale, encoder=PLACE), source, values)


# Origins ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawColumn:
    """A column, parallel to the images of all splits. Cells are read on access; None is null.

    name: returns the name of a cell for messages. names: those of the classes or flags, if the data set has them.
    open: for pictures, converts a cell to what is decoded."""

    size: int
    read: Callable[[Sequence[int]], list[Any]]
    name: Callable[[int], str]
    names: list[str] | None = None
    open: Callable[[Any], Payload] | None = None

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.size, CELLS):
            for value in self.read(range(start, min(start + CELLS, self.size))):
                yield None if is_empty(value) else value

    def convert(self, parse: Callable[[Any], Any]) -> list[Any]:
        """Parse all cells that are not null. Raises `ValueError`, which names the cell."""
        found = list[Any]()
        for value in self:
            try:
                found.append(None if value is None else parse(value))
            except ValueError as error:
                raise ValueError(f"{self.name(len(found))}: {error}") from error
        return found


class Sheets:
    """Columns of the sheets in a folder of images, or of a table beside it. A row belongs to the image `file_name`;
    `NAME_file_name` is a column NAME of pictures. Only the columns `wanted` are held in memory."""

    def __init__(self, config: DataConfig, paths: list[str], table: str | None, wanted: set[str]) -> None:
        root = config.path or Path()
        self.files = [Path(table).expanduser()] if table else find_sheets(root)
        if not self.files:
            raise ValueError(f"{root} has no {', '.join(SHEETS)}; add one, or give table=FILE")
        found, self.names = dict[str, tuple[Path, dict[str, Any]]](), dict[str, None]()
        known = {full_path(path) for path in choose_file_kind(config.spec).find(root)} if table else set()
        wanted = wanted | {f"{name}_file_name" for name in wanted}
        images = [f"{config.image_column}_file_name", "file_name"]
        places = (root, "table") if table else (None, "data.source")
        for sheet, image, _, cells in read_sheet_rows(self.files, images, *places):
            folder = root if table else sheet.parent
            if None in cells:
                raise ValueError(f"{sheet}: a row has more cells than columns: {cells}")
            if image in found:
                raise ValueError(f"{sheet}: two rows have the file_name {os.path.relpath(image, folder)}")
            if table and image not in known:
                raise ValueError(f"{sheet}: lists {image}, which is no image in {root}")
            self.names |= dict.fromkeys(cells)
            found[image] = folder, {key: cells[key] for key in cells.keys() & wanted}
        self.paths = [full_path(path) for path in paths]
        if not found:
            raise ValueError(f"{self.files[0]} has no rows")
        if missing := [path for path in self.paths if path not in found]:
            raise ValueError(f"{self.files[0]}: no row for the image {missing[0]}")
        self.rows = [found[path] for path in self.paths]

    def read(self, column: str, is_picture: bool) -> RawColumn:
        """Return a column. Text of CSV files becomes numbers or lists, if all of it can. is_picture: cells are paths
        relative to the sheet, as those of `NAME_file_name` are."""
        files = f"{column}_file_name"
        key = files if column not in self.names and files in self.names else column
        find_column(self.names, key, str(self.files[0]))
        if is_picture or key == files:
            return file_cells([cells.get(key) and str(folder / str(cells[key])) for folder, cells in self.rows])
        values = [cells.get(key) for _, cells in self.rows]
        if any(sheet.suffix in (".csv", ".tsv") for sheet in self.files):
            parsed = [parse_cell(value) for value in values]
            values = values if any(isinstance(value, str) and value for value in parsed) else parsed
        return list_cells(values, lambda row: f"{self.files[0]}: {self.paths[row]}")


def parse_cell(text: Any) -> Any:
    for parse in (json.loads, float) if isinstance(text, str) and "_" not in text else ():  # 1_2 is a name
        try:
            return parse(text.lower() if text in ("True", "False") else text)
        except (ValueError, RecursionError):
            continue
    return text


def read_table(source: str, images: list[ImageDataset], column: str, is_picture: bool) -> RawColumn:
    """Return a column of parquet files or of a data set of the Hub."""
    import datasets

    parts, starts = [], np.cumsum([0, *map(len, images)])
    for origin, positions in (each.origin for each in images):
        if origin.table is None:
            raise ValueError(f"{source} has no columns; parquet files, Hub data sets and folders of images may")
        find_column(origin.table.features, column, source)
        parts.append(origin.table.select_columns([column]).select(positions))
    table = datasets.concatenate_datasets(parts)
    feature, open_cell = table.features[column], None
    if is_picture or isinstance(feature, datasets.Image) or isinstance(feature, dict) and "bytes" in feature:
        open_cell = partial(read_payload, source=source)
        try:
            table = table.cast_column(column, datasets.Image(decode=False))
        except Exception as error:  # pyarrow raises several types for a column that cannot be cast
            raise ValueError(f"the column {column!r} does not hold images: {error}") from error

    def name(row: int) -> str:
        part = int(np.searchsorted(starts, row, "right")) - 1
        origin, positions = images[part].origin
        return f"{source}: {origin.name(int(positions[row - starts[part]]))}"

    names = getattr(getattr(feature, "feature", feature), "names", None)  # of a list, or of a class
    return RawColumn(len(table), lambda rows: table[list(rows)][column], name, names, open_cell)


def pair_images(folder: Path, config: DataConfig, paths: list[str]) -> RawColumn:
    """Return the images in `folder` with the stems (paths without suffix) of the images in the source."""
    root, partners = config.path or Path(), dict[str, str]()

    def stem(path: str, root: Path) -> str:
        return normalize_path(os.path.splitext(os.path.relpath(path, root))[0])

    for path in image_paths(folder):
        if (other := partners.setdefault(stem(path, folder), path)) != path:
            raise ValueError(f"{other} and {path} have one stem")
    stems = {stem(path, root) for path in image_paths(root)}
    if absent := sorted(stems - partners.keys()) or sorted(partners.keys() - stems):
        here, there = (folder, root) if absent[0] in stems else (root, folder)
        raise ValueError(f"{here}: no image with the stem {absent[0]!r}, which {there} has; each needs a partner")
    return file_cells([partners[stem(path, root)] for path in paths])


def earlier_frames(frame: int, splits: Mapping[str, ImageDataset]) -> RawColumn:
    """Return the image at the offset `frame` from each in its folder, in natural order; none before the first. Raises
    `ValueError` for a folder whose images are in two splits."""
    before, owners = dict[str, str | None](), dict[str, str]()
    for split, images in splits.items():
        clips = dict[str, list[str]]()
        for path in images.origin[0].paths or []:
            clips.setdefault(os.path.dirname(path), []).append(path)
        for folder in {os.path.dirname(path) for path in paths_of([images])}:
            if owners.setdefault(folder, split) != split:
                raise ValueError(f"the clip {folder} is in two splits; data.clips=true holds out whole clips")
            clip = sorted(clips[folder], key=natural_key)
            before |= {path: clip[at + frame] if at + frame >= 0 else None for at, path in enumerate(clip)}
    return file_cells([before[path] for path in paths_of(splits.values())])


def list_cells(values: list[Any], name: Callable[[int], str]) -> RawColumn:
    return RawColumn(len(values), lambda rows: [values[row] for row in rows], name)


def file_cells(paths: list[str | None]) -> RawColumn:
    return replace(list_cells(paths, lambda row: str(paths[row])), open=Path)


def paths_of(images: Iterable[ImageDataset]) -> list[str]:
    return [(source.paths or [])[at] for source, positions in (each.origin for each in images) for at in positions]


# Images -------------------------------------------------------------------------------------------


class AttributeImages(ImageDataset):
    """Images in the shape of their tokenizer, moved as those they belong to: shifts are in pixels of the others. Those
    `missing`, bool (n,), are black; their ids must become -1."""

    def __init__(self, config: DataConfig, spec: ImageSpec, part: SplitPart, missing: NDArray[np.bool_]) -> None:
        super().__init__(config.model_copy(update={"binarize": None}), part)
        self.spec = spec
        down, right = (side / other for side, other in zip(spec.size, config.spec.size, strict=True))
        self._scale, self.missing = torch.tensor([1, 1, 1, down, right]), torch.from_numpy(missing)

    def decode(self, indices: list[int], spec: ImageSpec) -> list[PixelArray | str]:
        images = zip(indices, super().decode(indices, spec), strict=True)
        return [np.zeros(spec.shape, np.uint8) if self.missing[index] else image for index, image in images]

    def _draw_changes(self, rows: NDArray[np.int64], epochs: Epochs, seed: int) -> Tensor | None:
        changes = super()._draw_changes(rows, epochs, seed)
        return None if changes is None else changes * self._scale


def load_pictures(
    cells: RawColumn,
    source: AttributeSource,
    name: str,
    config: DataConfig,
    splits: Mapping[str, ImageDataset],
    distributed: bool,
) -> LoadedColumn:
    """Check that all images can be decoded, and return them as a column. Those skipped are null. Raises `ValueError`
    without a tokenizer, and for cells that are no images."""
    if config.crop is not None:
        raise ValueError("a grid cannot follow the random crops of its images; data.crop=null")
    if source.tokenizer is None or (open_cell := cells.open) is None:
        raise ValueError("tokenizer: missing; a grid needs the tokenizer of its images")

    def read(rows: Sequence[int]) -> list[Payload]:
        return [open_cell(cell) if cell else None for cell in cells.read(rows)]

    tokenizer = Tokenizer.from_pretrained(tokenizer_folder(source.tokenizer))
    pictures, every, spec = Source(cells.size, read, cells.name), np.arange(cells.size), tokenizer.spec
    memory = StackedCache(cells.size, 0, spec)
    _, bad = decode_all(pictures, every, partial(try_decode, spec=spec), memory, distributed)
    check_bad([([image for image in bad if image.reason != NO_IMAGE], cells.size)], config)
    missing = np.isin(every, [image.row for image in bad])
    parts = np.split(every, np.cumsum([len(images) for images in splits.values()])[:-1])
    images = {
        split: AttributeImages(config, spec, SplitPart(pictures, part, every.astype(np.uint64)), missing[part])
        for split, part in zip(splits, parts, strict=True)
    }
    column = GridColumn(grid=tokenizer.grid, tokenizer=tokenizer.fingerprint())
    return LoadedColumn(column, source.describe(name), images=images, tokenizer=tokenizer)
