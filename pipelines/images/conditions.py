"""Columns of image data sets: what the images of a token dataset are conditioned on.

A column comes from the tables of the source (parquet files, a Hub data set), from the sheets of an image folder
(`metadata.csv`, `.jsonl`, `.parquet`), from a table beside it, from a folder of images with the same names, or from
the images before these in their folder. `load_conditions` reads all columns, parallel to the images of each split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from prior.conditions import Column
from tokenizer import Tokenizer

from ..config import Config
from ..provenance import TokenizerFolder
from .dataset import DataConfig, ImageDataset

Change = Literal["flip", "shift", "rotate", "zoom"]


class ConditionSource(Config):
    """Where a column comes from; by default, from the column of the same name."""

    kind: Literal["class", "flags", "number", "vector", "grid"] | None = Field(
        None, description="kind of the column; null: guessed from the values"
    )
    column: str | None = Field(None, description="column of the source's tables, of the folder's metadata, or of `table`")
    images: str | None = Field(None, description="folder of images with the same names as those of data.source")
    frame: int | None = Field(
        None, ge=-64, le=-1, description="-1: the image before each in its folder, which is a clip; -2: the one before"
    )
    tokenizer: TokenizerFolder | None = Field(None, description="tokenizer of the images of a grid")
    encoder: str | None = Field(
        None, description="what computes vectors from text: `ngrams:SIZE`, or MODULE:FUNCTION loaded by --import"
    )
    changed_by: tuple[Change, ...] = Field((), description="augmentations (of data.augment) that would falsify the values")

    @model_validator(mode="after")
    def _one_origin(self) -> ConditionSource:
        given = [name for name in ("column", "images", "frame") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        return self


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


def choose_data(config: DataConfig, sources: Mapping[str, str | ConditionSource]) -> DataConfig:
    """Return the settings with which to load the images: with `clips`, if a column consists of other frames."""
    raise NotImplementedError


def check_sources(
    config: DataConfig, sources: Mapping[str, str | ConditionSource], table: str | None, augmentations: int
) -> None:
    """Raise `UserError` for mistakes that can be detected before images are read."""
    raise NotImplementedError


def load_conditions(
    config: DataConfig,
    sources: Mapping[str, str | ConditionSource],
    splits: Mapping[str, ImageDataset],
    *,
    table: str | None = None,
    together: bool = False,
) -> dict[str, LoadedColumn]:
    """Read the columns of `splits` (by the names of `encode.name_splits`), whose images were loaded with
    `choose_data(config, sources)`. A string is the name of a column, whose kind is guessed and printed.

    table: a CSV, TSV, JSON lines or parquet file with a column `file_name`, relative to the folder of the images.
    together: all launched processes call this. Raises `UserError`."""
    raise NotImplementedError
