"""Conditions on the command line: `condition.NAME=VALUE` for each column, or a table with a row per image.

Text becomes a value of its column: `red,round` two flags, a path a picture or a folder of pictures. The pipeline checks
the values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from prior.conditions import LABEL, ClassColumn, Column, Condition, FlagsColumn, GridColumn, VectorColumn, find_column

from .config import Config, UserError
from .config.table import count_of
from .images.decoding import decode_in_threads
from .images.folder import find_images, read_sheet
from .options import Sampling

if TYPE_CHECKING:
    from .image_pipeline import ImagePipeline

FILE_NAME = "file_name"
"""The column of a table that names images."""
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
AT_A_TIME = 256  # values read together; pictures are in memory


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

    def rows(self, numbers: Sequence[int] | None = None) -> Condition | None:
        """Return the raw columns of some images, by default all, or None without columns."""
        numbers = range(self.count) if numbers is None else numbers
        return {name: raw[[k % len(raw) for k in numbers]] for name, raw in self.columns.items()} or None

    def choose_labels(self, labels: Any = None) -> Any:
        """Return `labels`, or the class of each image; None if no class was given. Raises `UserError` for both."""
        if labels is not None and self.labels:
            raise UserError(f"condition.{LABEL}: classes are given by labels, too; give them once")
        return self.select(range(self.count)).labels if self.labels else labels

    def values(self) -> dict[str, Any] | None:
        """Return all that was given, as `condition` of a pipeline's methods."""
        labels = {LABEL: self.choose_labels()} if self.labels else {}
        return {**labels, **(self.rows() or {})} or None

    def select(self, numbers: Sequence[int]) -> ConditionRows:
        """Return the condition of some images."""
        labels = [self.labels[k % len(self.labels)] for k in numbers] if self.labels else []
        return ConditionRows(len(numbers), labels, self.rows(numbers) or {})


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
        they choose the rows of a table with `file_name`, and the pictures in a folder. Raises `UserError`."""
        columns = find_columns(pipeline)
        rows = [] if self.conditions is None else read_rows(Path(self.conditions), names)
        counts, found = {} if self.conditions is None else {"conditions": len(rows)}, dict[str, list[Any]]()
        for name, value in self.condition.items():
            column = require_column(columns, name, "condition")
            found[name], several = list_values(name, column, value, names)
            counts |= {f"condition.{name}": len(found[name])} if several else {}
        for name in dict.fromkeys(key for row in rows for key in row if key != FILE_NAME):
            if name in self.condition:
                raise UserError(f"condition.{name}: {self.conditions} has this column, too; give it once")
            column = require_column(columns, name, f"conditions: {self.conditions}")
            found[name] = [read_cell(column, row.get(name), Path(str(self.conditions)).parent) for row in rows]
        total = next(iter(counts.values()), default) if count is None else count
        for key, number in counts.items():
            if number != total:
                what = count_of(number, "row" if key == "conditions" else "value")
                raise UserError(f"{key}: {what} for {count_of(total, 'image')}; expected one per image")
        raw = {}
        for name, values in found.items():
            table = None if name in self.condition else self.conditions
            raw[name] = read_values(pipeline, name, columns[name], values, table)
        labels = [None if one < 0 else one for one in raw.pop(LABEL).tolist()] if LABEL in raw else []
        return ConditionRows(total, labels, raw, found)


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


def require_column(columns: Mapping[str, Column], name: str, key: str) -> Column:
    """Return the column `name`. Raises `UserError`, which names the key and lists the columns."""
    try:
        column: Column = find_column(columns, name, key)
    except ValueError as error:
        raise UserError(str(error)) from error
    return column


# Values -------------------------------------------------------------------------------------------


def list_values(name: str, column: Column, value: Any, names: Sequence[str] | None = None) -> tuple[list[Any], bool]:
    """Return the values that `condition.NAME=VALUE` gives, and whether they are one per image, rather than one for
    all. Raises `UserError` for a path that does not exist."""
    value = read_text(column, value)
    if isinstance(column, GridColumn) and isinstance(value, (str, list)):
        paths = [Path(one) if isinstance(one, str) else one for one in (value if isinstance(value, list) else [value])]
        if missing := [path for path in paths if isinstance(path, Path) and not path.exists()]:
            raise UserError(f"condition.{name}: no such file or folder: {missing[0]}")
        if isinstance(value, str):
            return (list_pictures(name, paths[0], names), True) if paths[0].is_dir() else (paths, False)
        if any(isinstance(path, Path) for path in paths):
            return paths, True
    if isinstance(value, list) and not column.is_one_value(value):
        return [read_text(column, one) for one in value], True
    return [value], False


def list_pictures(name: str, folder: Path, names: Sequence[str] | None) -> list[Any]:
    """Return the pictures in a folder, sorted; or the one of each of `names`, without suffix. Raises `UserError`."""
    files = find_images(folder)
    if not files:
        raise UserError(f"condition.{name}: no images in {folder}")
    if names is None:
        return files
    by_name = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    found = [find_by_name(by_name, str(Path(one).with_suffix(""))) for one in names]
    if None in found:
        raise UserError(f"condition.{name}: {folder} has no picture for {names[found.index(None)]}")
    return found


def read_text(column: Column, value: Any) -> Any:
    """Convert text to a value of its column, or to several values separated by commas; other values, and what is not
    text of this kind, are returned unchanged."""
    if not isinstance(value, str) or isinstance(column, GridColumn) or takes_text(column):
        return value
    names: list[str] = getattr(column, "names", [])
    if value in names:
        return [value] if isinstance(column, FlagsColumn) else value
    inner = value.strip().removeprefix("[").removesuffix("]")
    parts: list[Any] = [part.strip().strip("'\"") for part in inner.split(",")]
    if isinstance(column, FlagsColumn):
        return [part for part in parts if part]
    kind, values = int if isinstance(column, ClassColumn) else float, list[Any]()
    for part in parts:
        with suppress(ValueError):
            part = None if part == "null" else kind(part)
        values.append(part)
    return values if len(values) > 1 else value if isinstance(values[0], str) else values[0]


def takes_text(column: Column) -> bool:
    """Return whether a vector of this column can be given as text."""
    return isinstance(column, VectorColumn) and column.encoder.startswith("ngrams:")


def read_cell(column: Column, cell: Any, base: Path) -> Any:
    """Convert a cell of a table to a value of its column. base: the folder of the table."""
    if cell is None or cell == "":
        return None
    if isinstance(cell, str) and isinstance(column, GridColumn):
        return base / cell
    return read_text(column, str(cell) if isinstance(column, ClassColumn) else cell)


def read_rows(path: Path, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Read the rows of a table; with `file_name`, those of the images `names` in their order. Raises `UserError`."""
    if path.suffix not in TABLES:
        raise UserError(f"conditions: {path} should end in {', '.join(TABLES)}")
    rows = list(read_sheet(path, "conditions"))
    if not rows:
        raise UserError(f"conditions: {path} has no rows")
    if names is None or FILE_NAME not in rows[0]:
        return rows
    by_name = {os.path.normpath(str(row.get(FILE_NAME))): row for row in rows}
    found = [find_by_name(by_name, name) for name in names]
    if None in found:
        raise UserError(f"conditions: {path} has no row with the file_name of {names[found.index(None)]}")
    return found


def find_by_name(entries: Mapping[str, Any], name: str) -> Any:
    """Return the entry whose key is the end of the path `name`, preferably a long end, or None."""
    parts = Path(name).parts
    ends = ("/".join(parts[first:]) for first in range(len(parts)))
    return next((entries[end] for end in ends if end in entries), None)


def read_values(pipeline: ImagePipeline, name: str, column: Column, values: list[Any], table: str | None) -> Tensor:
    """Return the raw values of a column, with a row for each of `values`. table: the file that they come from, for
    errors. Raises `UserError`."""
    parts = []
    for start in range(0, len(values), AT_A_TIME):
        some = values[start : start + AT_A_TIME]
        try:
            parts.append(parse_values(pipeline, name, column, some))
        except (ValueError, TypeError, UserError) as error:
            if table is None:
                raise UserError(str(error)) from error
            for number, one in enumerate(some, start + 1):  # find the row
                try:
                    parse_values(pipeline, name, column, [one])
                except (ValueError, TypeError, UserError) as reason:
                    line = str(reason).removeprefix("condition: ")
                    raise UserError(f"conditions: {table}: row {number}: {line}") from reason
            raise
    return torch.cat(parts)


def parse_values(pipeline: ImagePipeline, name: str, column: Column, values: list[Any]) -> Tensor:
    """Return the raw rows of values. Raises `ValueError`."""
    if all(value is None for value in values):
        return column.null(len(values))
    if name == LABEL:
        try:
            return torch.stack([column.parse_one(value) for value in values])
        except ValueError as error:
            raise ValueError(f"condition: {name}: {error}") from error
    if pictures := [index for index, value in enumerate(values) if isinstance(value, Path)]:
        tokenizer, values = pipeline.condition_tokenizers.get(name), list(values)
        if tokenizer is None:
            raise ValueError(f"condition: {name}: this grid has no tokenizer for pictures; give token ids")
        decoded = decode_in_threads([values[index] for index in pictures], tokenizer.image_shape)
        for index, pixels in zip(pictures, decoded, strict=True):
            if isinstance(pixels, str):
                raise ValueError(f"condition: {name}: {values[index]}: {pixels}")
            values[index] = pixels.transpose(1, 2, 0)
    return pipeline.read_condition({name: values}, len(values))[name].cpu()


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
