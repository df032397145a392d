"""Conditions on the command line: `condition.NAME=VALUE` for each column, or a table with a row per image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from prior.columns import LABEL, describe_columns, find_column
from prior.given import Given

from .columns import ColumnFormat, format_of, formats_of
from .config import Config, is_first_process, tell, user_errors
from .config.table import count_of
from .images.attributes import TABLES
from .images.folder import match_names, read_sheet
from .options import Sampling, UsesTiles

if TYPE_CHECKING:
    from .image_pipeline import ImagePipeline

FILE_NAME = "file_name"
"""The column of a table that names images; `NAME_file_name` names the pictures of a column NAME."""


@dataclass(frozen=True)
class GivenKeys:
    """A condition from the command line: raw rows, and the values by column as they were written (texts and paths among
    them), one for all images or one per image."""

    given: Given
    written: dict[str, list[Any]]

    def rows(self) -> dict[str, Tensor]:
        """Return the raw rows of each column: one for all images or one per image, as they were written."""
        return {name: self.given.raw(name)[: len(values)] for name, values in self.written.items()}

    def format_values(self, folder: Path) -> dict[str, list[Any]]:
        """Return the values of each column except the class for a table in `folder`, which `conditions` and data sets
        read: names, numbers, texts and relative paths of pictures, one for all images or one per image; None is
        null."""
        return {
            name: format_of(name, self.given.columns[name]).format_values(raw, self.written[name], folder)
            for name, raw in self.rows().items()
            if name != LABEL
        }


class UsesCondition(Config):
    """Base of verbs that take a condition."""

    condition: dict[str, Any] = Field(
        {},
        description="condition: the value of a column for all images; a list or folder of pictures has one per image",
    )
    conditions: str | None = Field(
        None, description="table with a row per image and these columns, or `label`; pictures are paths beside it"
    )

    def read_condition(
        self, pipeline: ImagePipeline, count: int | None = None, names: Sequence[str] | None = None, default: int = 1
    ) -> GivenKeys:
        """Read the condition of `count` images (None: as many as there are values, or `default`). names: of the images;
        they choose the rows of a table with `file_name`, and the pictures in a folder. Warns about numbers outside
        those of the training data, which the pipeline limits. Raises `UserError`."""
        formats = formats_of(pipeline.columns, pipeline.condition_tokenizers)
        with user_errors(ValueError):
            written, counts = self.list_written(formats, names)
            count = next(iter(counts.values()), default) if count is None else count
            for key, number in counts.items():
                if number != count:
                    what = count_of(number, "row" if key == "conditions" else "value")
                    raise ValueError(f"{key}: {what} for {count_of(count, 'image')}; expected one per image")
            raw = dict[str, Tensor]()
            for name, values in written.items():
                where = "condition" if name in self.condition else f"conditions: {self.conditions}"
                rows = parse_values(formats[name], values, where)
                if is_first_process() and (line := formats[name].column.describe_outside(rows)):
                    tell(f"warning: condition: {name}: {line}")
                raw[name] = rows.expand(count, *rows.shape[1:])
            return GivenKeys(pipeline.read_given(None, raw, count, limit=False), written)

    def list_written(
        self, formats: dict[str, ColumnFormat[Any]], names: Sequence[str] | None
    ) -> tuple[dict[str, list[Any]], dict[str, int]]:
        """Return the values of each column as written, and the number of images that each key implies."""
        written, counts = dict[str, list[Any]](), dict[str, int]()
        if self.conditions is not None:
            path = Path(self.conditions)
            rows = read_rows(path, names)
            counts["conditions"], ignored = len(rows), list[str]()
            for key in dict.fromkeys(key for row in rows for key in row if key != FILE_NAME):
                name = key if key in formats else key.removesuffix(f"_{FILE_NAME}")
                if name not in formats:
                    ignored.append(key)
                elif name in self.condition:
                    raise ValueError(f"condition.{name}: {path} has this column, too; give it once")
                else:
                    written[name] = [formats[name].read_cell(row.get(key), path.parent) for row in rows]
            if ignored and not written:
                find_column(formats, ignored[0], f"conditions: {path}")
            elif ignored and is_first_process():
                tell(f"conditions: {path}: ignored {', '.join(ignored)}; {describe_columns(formats)}")
        for name, value in self.condition.items():
            written[name], several = find_column(formats, name).list_values(value, names)
            if several:
                counts[f"condition.{name}"] = len(written[name])
        return written, counts


class ScoresWithCondition(UsesCondition, UsesTiles):
    """Base of verbs that score images with a condition."""

    marginal: str | None = Field(
        None,
        description="column of unknown classes, such as `label`: score by the mixture over the classes",
    )

    def read_given(self, pipeline: ImagePipeline, names: Sequence[str]) -> Given:
        """Read the condition of images, and print with which frequencies `marginal` weights classes. Raises
        `UserError`."""
        given = self.read_condition(pipeline, len(names), names).given
        with user_errors(ValueError):
            given = pipeline.read_given(condition=given, marginal=self.marginal)
        if self.marginal is not None:
            tell(f"marginal: {pipeline.frequencies.describe(self.marginal, given.names)}")
        return given


class SamplesWithCondition(Sampling, UsesCondition):
    """Base of verbs that sample with a condition."""

    guidance_on: list[str] | None = Field(
        None, description="columns that guidance_scale applies to, or `label`; null: all"
    )

    def sampling_settings(self) -> dict[str, Any]:
        return super().sampling_settings() | self.model_dump(include={"guidance_on"}, exclude_none=True)


def read_rows(path: Path, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Read a table's rows; with `file_name`, those of the images `names`. Raises `ValueError` or `UserError`."""
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
    for name, row in list(by_name.items()):
        by_name.setdefault(os.path.splitext(name)[0], row)  # for names of clips, see `decompress`
    return match_names(by_name, names, f"conditions: {path}", "row with the file_name of")


def parse_values(column: ColumnFormat[Any], values: list[Any], where: str) -> Tensor:
    """Return the raw row of each value. where: begins errors. Raises `ValueError`."""
    place, rows = where, list[Tensor]()
    try:
        for number, value in enumerate(column.encode_files(values), 1):
            place = where if where == "condition" else f"{where}: row {number}"
            rows.append(column.parse(value))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {column.name}: {error}") from error
    return torch.stack(rows)
