"""Conditions on the command line: `condition.NAME=VALUE` for each column, or a table with a row per image.

Text becomes a value of its column: `red,round` two flags, a path a picture or a folder of pictures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from prior.conditions import (
    LABEL,
    ClassColumn,
    Column,
    Condition,
    FlagsColumn,
    GridColumn,
    NumberColumn,
    describe_columns,
    find_column,
)

from .condition_values import convert_value, describe_outside, encode_images, takes_text
from .config import Config, UserError, is_first_process, tell
from .config.table import count_of
from .images.arrays import values_of
from .images.conditions import TABLES
from .images.decoding import decode_in_threads
from .images.folder import find_images, read_sheet
from .options import Sampling

if TYPE_CHECKING:
    from .image_pipeline import ImagePipeline

FILE_NAME = "file_name"
"""The column of a table that names images; `NAME_file_name` names the pictures of a column NAME."""
YES_NO = {"true": "yes", "false": "no"}
"""The classes that data sets call true and false."""
AT_A_TIME = 256  # pictures in memory


@dataclass(frozen=True)
class ConditionRows:
    """A condition for `count` images: in each column one row for all, or a row per image."""

    count: int
    labels: list[int | None] = field(default_factory=list)
    """Empty if no class was given."""
    columns: Condition = field(default_factory=dict)
    """The raw columns that were given."""
    written: dict[str, list[Any]] = field(default_factory=dict)
    """The values of each column as they were given: texts and paths among them."""

    def select(self, numbers: Sequence[int]) -> ConditionRows:
        """Return the rows of some images."""
        labels = [self.labels[k % len(self.labels)] for k in numbers] if self.labels else []
        columns = {name: raw[[k % len(raw) for k in numbers]] for name, raw in self.columns.items()}
        return ConditionRows(len(numbers), labels, columns)

    def values(self) -> dict[str, Any]:
        """Return all that was given, as `condition` of a pipeline's methods."""
        given: dict[str, Any] = {**({LABEL: self.labels} if self.labels else {}), **self.columns}
        return {name: rows[0] if len(rows) == 1 else rows for name, rows in given.items()}


class UsesCondition(Config):
    """Base class for verbs that take a condition."""

    condition: dict[str, Any] = Field(
        {},
        description="condition: the value of a column for all images; a list or folder of pictures has one per image",
    )
    conditions: str | None = Field(
        None,
        description="table with a row per image and these columns, or `label`; pictures are paths beside it",
    )

    def read_condition(
        self,
        pipeline: ImagePipeline,
        count: int | None = None,
        names: Sequence[str] | None = None,
        default: int = 1,
    ) -> ConditionRows:
        """Read the condition of `count` images; None: of as many as have values, or `default`. names: of the images;
        they choose the rows of a table with `file_name`, and the pictures in a folder. Warns about numbers outside
        those of the training data. Raises `UserError`."""
        try:
            written, counts = self.list_written(pipeline, names)
            total = next(iter(counts.values()), default) if count is None else count
            for key, number in counts.items():
                if number != total:
                    what = count_of(number, "row" if key == "conditions" else "value")
                    raise ValueError(f"{key}: {what} for {count_of(total, 'image')}; expected one per image")
            raw, columns = {}, find_columns(pipeline)
            for name, values in written.items():
                table = None if name in self.condition else self.conditions
                raw[name] = read_values(pipeline, name, columns[name], values, table)
                if is_first_process() and (line := describe_outside(name, columns[name], raw[name])):
                    tell(f"warning: {line}")
        except ValueError as error:
            raise UserError(str(error)) from error
        labels = [None if one < 0 else one for one in raw.pop(LABEL).tolist()] if LABEL in raw else []
        return ConditionRows(total, labels, raw, written)

    def list_written(
        self, pipeline: ImagePipeline, names: Sequence[str] | None
    ) -> tuple[dict[str, list[Any]], dict[str, int]]:
        """Return the values of each column as they are written, and the number of images by the key that says it.
        Raises `ValueError`."""
        columns, written, counts = find_columns(pipeline), dict[str, list[Any]](), dict[str, int]()
        if self.conditions is not None:
            path = Path(self.conditions)
            rows = read_rows(path, names)
            counts["conditions"], ignored = len(rows), list[str]()
            for key in dict.fromkeys(key for row in rows for key in row if key != FILE_NAME):
                name = key if key in columns else key.removesuffix(f"_{FILE_NAME}")
                if name not in columns:
                    ignored.append(key)
                elif name in self.condition:
                    raise ValueError(f"condition.{name}: {path} has this column, too; give it once")
                else:
                    written[name] = [read_cell(columns[name], row.get(key), path.parent) for row in rows]
            if ignored and not written:
                find_column(columns, ignored[0], f"conditions: {path}")
            elif ignored and is_first_process():
                tell(f"conditions: {path}: ignored {', '.join(ignored)}; {describe_columns(columns)}")
        for name, value in self.condition.items():
            written[name], several = list_values(name, find_column(columns, name), value, names)
            if several:
                counts[f"condition.{name}"] = len(written[name])
        return written, counts


class SamplesWithCondition(Sampling, UsesCondition):
    """Base class for verbs that sample with a condition."""

    guidance_on: list[str] | None = Field(
        None, description="columns that guidance_scale applies to, or `label`; null: all"
    )

    def sampling_settings(self) -> dict[str, Any]:
        """Return the sampling settings that were given, by name."""
        return {**super().sampling_settings(), **self.model_dump(include={"guidance_on"}, exclude_none=True)}


def find_columns(pipeline: ImagePipeline) -> dict[str, Column]:
    """Return the columns of a pipeline, and `label` if it has classes."""
    classes = pipeline.prior.num_classes
    names = pipeline.labels or [str(number) for number in range(classes)]
    return {**({LABEL: ClassColumn(names=names)} if classes else {}), **pipeline.conditions}


# Values as they are written -----------------------------------------------------------------------


def list_values(name: str, column: Column, value: Any, names: Sequence[str] | None) -> tuple[list[Any], bool]:
    """Return the values that `condition.NAME=VALUE` gives, in which paths of pictures are `Path`s, and whether they are
    one per image, rather than one for all. Raises `ValueError` for a path that does not exist."""
    value = read_text(column, value)
    if isinstance(column, GridColumn):
        several = value if isinstance(value, list) else [value]
        several = [Path(one) if isinstance(one, str) else one for one in several]
        if missing := [path for path in several if isinstance(path, Path) and not path.exists()]:
            raise ValueError(f"condition.{name}: no such file or folder: {missing[0]}")
        if isinstance(value, str):
            return (list_pictures(name, several[0], names), True) if several[0].is_dir() else (several, False)
        if any(isinstance(one, Path) for one in several):
            return several, True
    if isinstance(value, list) and not column.is_one_value(value):
        return [read_text(column, one) for one in value], True
    return [value], False


def list_pictures(name: str, folder: Path, names: Sequence[str] | None) -> list[Any]:
    """Return the pictures in a folder, sorted; or the one of each of `names`, without suffix. Raises `ValueError`."""
    files = find_images(folder)
    if not files:
        raise ValueError(f"condition.{name}: no images in {folder}")
    if names is None:
        return files
    by_name = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    stems = [str(Path(one).with_suffix("")) for one in names]
    return match_names(by_name, stems, f"condition.{name}: {folder}", "picture for")


def read_text(column: Column, value: Any) -> Any:
    """Convert text to a value of its column, or to several values separated by commas; other values, and what is not
    text of this kind, are returned unchanged."""
    names: list[str] = getattr(column, "names", [])
    if isinstance(column, ClassColumn) and str(value) not in names:
        value = YES_NO.get(str(value).lower(), value)
    if not isinstance(value, str) or isinstance(column, GridColumn) or takes_text(column):
        return value
    if value in names:
        return [value] if isinstance(column, FlagsColumn) else value
    inner = value.strip().removeprefix("[").removesuffix("]")
    if isinstance(column, FlagsColumn):
        parts = [part.strip().strip("'\"") for part in re.split("[,;]", inner)]
        return [part for part in parts if part]
    kind, values = int if isinstance(column, ClassColumn) else float, list[Any]()
    for part in (part.strip().strip("'\"") for part in inner.split(",")):
        found: Any = part
        with suppress(ValueError):
            found = None if part == "null" else kind(part)
        values.append(found)
    return values if len(values) > 1 else value if isinstance(values[0], str) else values[0]


def read_cell(column: Column, cell: Any, base: Path) -> Any:
    """Convert a cell of a table to a value of its column; empty text and NaN are null. base: the folder of the
    table."""
    is_nan = str(cell).lower() == "nan" and (isinstance(cell, float) or isinstance(column, NumberColumn))
    if cell is None or cell == "" or is_nan:
        return None
    if isinstance(cell, str) and isinstance(column, GridColumn):
        return base / cell
    if isinstance(column, ClassColumn):
        cell = str(cell) if str(cell) in column.names else str(cell).removesuffix(".0")  # of whole floats
    return read_text(column, cell)


def read_rows(path: Path, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Read the rows of a table; with `file_name`, those of the images `names` in their order. Raises `ValueError` or
    `UserError`."""
    if path.suffix not in TABLES:
        raise ValueError(f"conditions: {path} should end in {' or '.join(TABLES)}")
    rows = list(read_sheet(path, "conditions"))
    if long := [number for number, row in enumerate(rows, 1) if None in row]:
        raise ValueError(f"conditions: {path}: row {long[0]} has more cells than columns")
    if not rows:
        raise ValueError(f"conditions: {path} has no rows")
    if names is None or FILE_NAME not in rows[0]:
        return rows
    by_name = {os.path.normpath(str(row.get(FILE_NAME))): row for row in rows}
    return match_names(by_name, names, f"conditions: {path}", "row with the file_name of")


def match_names(entries: Mapping[str, Any], names: Sequence[str], where: str, what: str) -> list[Any]:
    """Return for each name, a path, the entry whose key is the longest end of it. Raises `ValueError` for a name
    without an entry, and for two names of one entry. where, what: for errors."""
    found, owners = [], dict[str, str]()
    for name in names:
        parts = Path(name).parts
        ends = ("/".join(parts[first:]) for first in range(len(parts)))
        key = next((end for end in ends if end in entries), None)
        if key is None:
            raise ValueError(f"{where} has no {what} {name}")
        if (owner := owners.setdefault(key, name)) != name:
            raise ValueError(f"{where}: {key} may belong to {owner} or to {name}; use longer paths")
        found.append(entries[key])
    return found


# Raw values ---------------------------------------------------------------------------------------


def read_values(pipeline: ImagePipeline, name: str, column: Column, values: list[Any], table: str | None) -> Tensor:
    """Return a raw row for each of `values`. table: the file that they come from, for errors. Raises `ValueError`."""
    pictures = [value for value in values if isinstance(value, Path)]
    tokens, rows = iter(encode_files(pipeline, name, pictures)), []
    for number, value in enumerate(values, 1):
        try:
            value = next(tokens) if isinstance(value, Path) else convert_value(column, value, None)
            rows.append(column.parse_one(value.tolist() if isinstance(value, Tensor) else value))
        except (ValueError, TypeError) as error:
            place = "condition" if table is None else f"conditions: {table}: row {number}"
            raise ValueError(f"{place}: {name}: {error}") from error
    return torch.stack(rows)


def encode_files(pipeline: ImagePipeline, name: str, files: list[Path]) -> list[Tensor]:
    """Return the tokens of pictures. Raises `ValueError`."""
    tokenizer, tokens = pipeline.condition_tokenizers.get(name), list[Tensor]()
    for start in range(0, len(files), AT_A_TIME):
        if tokenizer is None:
            raise ValueError(f"condition: {name}: this grid has no tokenizer for pictures; give token ids")
        some, images = files[start : start + AT_A_TIME], list[Tensor]()
        for file, pixels in zip(
            some, decode_in_threads(some, tokenizer.image_shape, values_of(tokenizer)), strict=True
        ):
            if isinstance(pixels, str):
                raise ValueError(f"condition: {name}: {file}: {pixels}")
            images.append(torch.from_numpy(pixels.copy()))
        tokens += encode_images(tokenizer, images)
    return tokens


def format_values(pipeline: ImagePipeline, given: ConditionRows, folder: Path) -> dict[str, list[Any]]:
    """Return the values of each column for a table in `folder`, which `conditions` and data sets read: names, numbers,
    texts and relative paths of pictures; None is null."""
    found = {}
    for name, raw in given.columns.items():
        column, null = pipeline.conditions[name], pipeline.conditions[name].is_null(raw).tolist()
        values = given.written[name]
        if isinstance(column, ClassColumn):
            values = [column.names[number] for number in raw.tolist()]
        elif isinstance(column, FlagsColumn):
            values = [[name for name, flag in zip(column.names, row, strict=True) if flag] for row in raw.tolist()]
        values = [os.path.relpath(value, folder) if isinstance(value, Path) else value for value in values]
        found[name] = [None if empty else value for value, empty in zip(values, null, strict=True)]
    return found
