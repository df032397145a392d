"""`meta.json`: the contents of a token dataset, with every field checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, Field, PlainValidator, Strict, model_validator

from prior.columns import LABEL, MAX_COLUMNS, ClassColumn, Column, names_problem, read_column
from prior.given import Given
from tokenizer import TokenGrid, Tokenizer
from tokenizer.base import grid_to_dict, read_grid
from tokenizer.files import (
    MANIFEST,
    FolderKind,
    IntegrityError,
    PathError,
    check_format_version,
    is_file,
    quote,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)

from ..files import FieldError, Text, Whole, validate
from ..frequencies import FREQUENCIES, Frequencies
from ..images.classes import is_printable
from ..images.splits import SPLITS, SPLITS_KEY, join_splits, split_off
from .shards import join_columns, map_shard, shard_names, stored_grid

META, FORMAT_VERSION = "meta.json", 1
CONDITIONS = "conditions"  # folder of the tokenizers of grid columns
TRAIN = "train"  # the split whose classes are counted
SOURCE = "source"  # key of a column's origin
TOKEN_FOLDER = FolderKind(
    "a token dataset", META, lambda meta: {"format_version", "grid", "splits", "classes"} <= set(meta)
)


RowCount = Annotated[int, Strict(), Field(ge=0)]


@dataclass(frozen=True)
class Meta:
    """The contents of `meta.json`. `shards`: the number of rows of each file of each split, in order. `stochastic`: the
    splits whose files hold grey values, from which ids are sampled on access."""

    grid: TokenGrid
    columns: Mapping[str, Column]
    shards: dict[str, list[int]]
    source: dict[str, Any]
    augmentations: int
    tokenizer: str
    condition_sources: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    stochastic: list[str] = field(default_factory=list)

    def files(self) -> list[str]:
        return [name for split, sizes in self.shards.items() for name in shard_names(split, len(sizes))]

    def to_dict(self) -> dict[str, Any]:
        columns = {
            name: {**column.to_dict(), SOURCE: self.condition_sources.get(name, {})}
            for name, column in self.columns.items()
            if name != LABEL
        }
        return {
            "format_version": FORMAT_VERSION,
            "grid": grid_to_dict(self.grid),
            "classes": class_names(self.columns),
            "splits": self.shards,
            "source": split_off(self.source),
            "augmentations": self.augmentations,
            "tokenizer": self.tokenizer,
            **({"conditions": columns} if columns else {}),
            **({"drawn": self.stochastic} if self.stochastic else {}),
        }

    def grids(self) -> dict[str, str]:
        """Return the fingerprint of the tokenizer of each grid column, which may be empty."""
        found = {name: getattr(column, "tokenizer", None) for name, column in self.columns.items()}
        return {name: fingerprint for name, fingerprint in found.items() if fingerprint is not None}

    def own_tokenizers(self) -> list[str]:
        """Return the names of the grid columns whose tokenizer is not that of the images."""
        return [name for name, fingerprint in self.grids().items() if fingerprint not in ("", self.tokenizer)]


def label_column(names: Sequence[str]) -> dict[str, Column]:
    return {LABEL: ClassColumn.numbered(len(names), names)} if names else {}


def class_names(columns: Mapping[str, Column]) -> list[str]:
    return cast(ClassColumn, columns[LABEL]).names if LABEL in columns else []


def write_meta(
    folder: Path, meta: Meta, tokenizer: Tokenizer, condition_tokenizers: Mapping[str, Tokenizer] | None = None
) -> None:
    """Write the tokenizers, `meta.json`, the frequencies of classes and finally `manifest.json` beside the shards."""
    tokenizer.save_pretrained(folder / "tokenizer")
    for name in meta.own_tokenizers():
        (condition_tokenizers or {})[name].save_pretrained(folder / CONDITIONS / name)
    write_json(folder / META, meta.to_dict())
    if SPLITS_KEY in meta.source:
        write_json(folder / SPLITS, meta.source[SPLITS_KEY])
    count_classes(folder, meta).save(folder)
    write_manifest(folder)


def count_classes(folder: Path, meta: Meta) -> Frequencies:
    """Count the classes and flags in the shards of the training split, if there is one."""
    sizes = meta.shards.get(TRAIN, [])
    columns = {name: column for name, column in meta.columns.items() if column.is_counted}
    grid, names = stored_grid(meta.grid, TRAIN in meta.stochastic), shard_names(TRAIN, len(sizes))
    files = [map_shard(folder / name, rows, grid, columns) for name, rows in zip(names, sizes, strict=True)]
    rows = join_columns(files, columns, folder, mapped=True) if files else {}
    return Frequencies.count(Given(columns, rows, sum(sizes)))


def manifest_hash(folder: Path) -> str:
    """Return a hash that changes with any file of the dataset."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def check_printable(name: str) -> str:
    if not is_printable(name):
        raise ValueError(f"must be a printable name (found {quote(name)})")
    return name


def check_split_names(splits: dict[str, list[int]]) -> dict[str, list[int]]:
    if strange := [name for name in splits if not re.fullmatch(r"\w[\w-]*", name)]:
        raise ValueError(f"invalid name {quote(strange[0])} (letters, digits, _ and -)")
    return splits


def parse_conditions(found: Any) -> dict[str, tuple[Column, dict[str, Any]]]:
    """Parse columns by name, each with facts about its source. Raises `ValueError`, which names the column."""
    if not isinstance(found, dict) or len(found) > MAX_COLUMNS:
        raise ValueError(f"should be a mapping of at most {MAX_COLUMNS} columns (found {quote(found)})")
    columns = {}
    for name, fields in found.items():
        try:
            source = fields.pop(SOURCE, {}) if isinstance(fields := copy(fields), dict) else {}
            column = read_column(fields)
            if not isinstance(source, dict):
                raise ValueError(f"{SOURCE}: should be a mapping (found {quote(source)})")
            for each in getattr(column, "names", []):
                check_printable(each)
        except ValueError as error:
            raise FieldError(name, str(error)) from error
        columns[name] = column, source
    for problem in names_problem(columns):
        raise ValueError(problem)
    return columns


class GridFields(BaseModel):
    shape: list[Whole]
    vocab_size: Whole
    scales: list[list[Whole]] = []
    levels: Whole = 1
    channels: Whole = 0

    @model_validator(mode="after")
    def _is_a_grid(self) -> GridFields:
        self.grid()
        return self

    def grid(self) -> TokenGrid:
        return read_grid(self.model_dump())


class MetaFile(BaseModel):
    """The fields of `meta.json` except its version; other fields are ignored."""

    grid: GridFields
    classes: list[Annotated[Text, AfterValidator(check_printable)]]
    splits: Annotated[dict[str, Annotated[list[RowCount], Field(min_length=1)]], AfterValidator(check_split_names)]
    source: dict[str, Any]
    augmentations: Whole
    tokenizer: Text
    conditions: Annotated[dict[str, tuple[Column, dict[str, Any]]], PlainValidator(parse_conditions)] = {}
    drawn: list[Text] = []

    @model_validator(mode="after")
    def _draws_digits(self) -> MetaFile:
        if strange := [name for name in self.drawn if name not in self.splits]:
            raise ValueError(f"drawn: there is no split {quote(strange[0])}")
        if self.drawn and (self.grid.vocab_size < 2 or self.grid.vocab_size.bit_count() != 1):
            raise ValueError(f"drawn: needs a grid of 2, 4, 8, 16, ... ids (found {self.grid.vocab_size})")
        return self


def read_meta(folder: Path) -> Meta:
    """Read `meta.json`. Raises `PathError` if it is missing, `FormatError` if it is invalid."""
    if not is_file(folder / META):
        near = next((path for path in (folder / "tokens", Path(f"{folder}_tokens")) if (path / META).is_file()), None)
        hint = f"; did you mean {near}?" if near else "; make one with `smalti encode`"
        raise PathError(f"{folder}: not a token dataset (no {META}){hint}")
    meta = read_json(folder / META)
    check_format_version(meta, FORMAT_VERSION, folder / META)
    found = validate(MetaFile, meta, folder / META)
    return Meta(
        grid=found.grid.grid(),
        columns={**label_column(found.classes), **{name: column for name, (column, _) in found.conditions.items()}},
        shards=found.splits,
        source=join_splits(found.source, folder / SPLITS),
        augmentations=found.augmentations,
        tokenizer=found.tokenizer,
        condition_sources={name: source for name, (_, source) in found.conditions.items()},
        stochastic=list(found.drawn),
    )


def check_meta(meta: Meta, path: Path) -> None:
    """Raise `FormatError` for contents that `read_meta` would refuse in the file `path`."""
    validate(MetaFile, meta.to_dict(), path)


def verify_files(folder: Path, meta: Meta, *, whole: bool) -> None:
    """Compare all files with `manifest.json` by sha256; unless `whole`, compare shards only by size."""
    shards, others = set(meta.files()), {name for name in (META, FREQUENCIES) if is_file(folder / name)}
    listed = verify_manifest(folder, unhashed=() if whole else shards)["files"]
    if absent := sorted((shards | others) - set(listed)):
        raise IntegrityError(f"{folder / absent[0]}: not listed in {MANIFEST}")


def check_tokenizers(meta: Meta, tokenizers: Mapping[str, Tokenizer], place: Path | str) -> None:
    """Raise `IntegrityError` unless each grid column has the tokenizer that made its ids. place: for messages."""
    for name, fingerprint in meta.grids().items():
        title, found, grid = f"{place}/{name}", tokenizers.get(name), getattr(meta.columns[name], "grid", None)
        if (found.fingerprint() if found else "") != fingerprint:
            raise IntegrityError(f"{title}: not the tokenizer of the column {name!r} (fingerprints differ)")
        if found and found.grid != grid:
            raise IntegrityError(f"{title}: grid {found.grid} differs from that of the column {name!r}, {grid}")
