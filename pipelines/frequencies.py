"""How often the classes occur in the training split, which is p(c) in the mixture over a class.

`frequencies.json`, beside a token dataset and a pipeline, has the numbers of training images with each combination of
classes and flags; or, if too many combinations occur, the numbers of each column of classes alone, if a mixture over it
is possible (`MOST_CLASSES`). Files of 0.3 lack it, and all classes count as equally likely.

The file is published with the models, including combinations that a single image has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from prior.columns import Column
from prior.given import MOST_CLASSES, Given
from tokenizer.files import FormatError, check_format_version, parse_json, read_bytes, write_json

from .files import Whole, validate

FREQUENCIES, FORMAT_VERSION = "frequencies.json", 1
MOST = 1 << 16
"""Numbers in a table: 4,096 combinations of sixteen flags, for example."""
MAX_BYTES = 8 << 20
"""Largest file that is read; the largest that is written has 5 MiB."""
CHUNK = 1 << 20
"""Numbers that are counted at once."""


class StoredTable(BaseModel):
    model_config = ConfigDict(extra="forbid")

    columns: list[str] = Field(min_length=1)
    values: list[list[Annotated[Whole, Field(ge=-1, lt=1 << 31)]]] = Field(min_length=1)
    counts: list[Annotated[Whole, Field(ge=1, lt=1 << 48)]]

    @model_validator(mode="after")
    def has_equal_lengths(self) -> StoredTable:
        if len(self.values) != len(self.counts) or len({len(row) for row in self.values}) > 1:
            raise ValueError("values: must have equally many numbers each, and a count each")
        return self


class FrequencyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: Whole
    tables: list[StoredTable]


@dataclass(frozen=True)
class CountTable:
    """The distinct joint values of some columns, int64 `(n, numbers)`, as `Column.pack` writes them side by side, and
    the number of images with each, int64 `(n,)`."""

    columns: Mapping[str, Column]
    values: Tensor
    counts: Tensor

    @classmethod
    def count(cls, given: Given, columns: Mapping[str, Column]) -> CountTable | None:
        """Count the rows of `given`, a chunk at a time; None if the table has more than `MOST` numbers."""
        width = sum(column.null(1).numel() for column in columns.values())
        values, counts = torch.zeros(0, width, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        rows = max(1, CHUNK // width)
        for begin in range(0, len(given), rows):
            packed = pack_rows(given[begin : begin + rows], columns)
            joined = torch.cat([counts, torch.ones(len(packed), dtype=torch.long)])
            values, counts = sum_counts(torch.cat([values, packed]), joined)
            if values.numel() > MOST:
                return None
        return cls(columns, values, counts)

    def part(self, names: Iterable[str]) -> Tensor:
        sizes = [column.null(1).numel() for column in self.columns.values()]
        parts = dict(zip(self.columns, self.values.split(sizes, 1), strict=True))
        return torch.cat([parts[name] for name in names], 1)

    def ids(self, name: str) -> Tensor:
        return self.columns[name].unpack(self.part([name])[:, 0].to(self.columns[name].stored_type))


@dataclass(frozen=True)
class Frequencies:
    """The frequencies of columns in the training split: one table of all columns of classes and flags, or one of each
    column of classes. A class without a table is as likely as any other of its column."""

    tables: tuple[CountTable, ...] = ()

    @classmethod
    def count(cls, given: Given) -> Frequencies:
        columns = {name: column for name, column in given.columns.items() if column.is_counted}
        classes = {name: column for name, column in columns.items() if column.num_classes}
        given = given.without(set(given.columns) - set(columns))
        if not classes or not len(given):
            return cls()
        if joint := CountTable.count(given, columns):
            return cls((joint,))
        few = {name: column for name, column in classes.items() if column.num_classes <= MOST_CLASSES}
        each = (CountTable.count(given, {name: column}) for name, column in few.items())
        return cls(tuple(table for table in each if table is not None))

    @classmethod
    def load(cls, folder: Path, columns: Mapping[str, Column]) -> Frequencies:
        """Read `frequencies.json` of a folder with these columns; without the file, there are no tables. Raises
        `FormatError` for a file that is invalid, or has other columns."""
        path = folder / FREQUENCIES
        if not path.is_file():
            return cls()
        found = parse_json(read_bytes(path, MAX_BYTES), path)
        check_format_version(found, FORMAT_VERSION, path)
        tables = list[CountTable]()
        for number, fields in enumerate(validate(FrequencyFile, found, path).tables):
            try:
                check_table(fields, columns)
            except ValueError as error:
                raise FormatError(f"{path}: tables.{number}.{error}") from error
            own = {name: columns[name] for name in fields.columns}
            tables.append(CountTable(own, torch.tensor(fields.values), torch.tensor(fields.counts)))
        return cls(tuple(tables))

    def save(self, folder: Path) -> None:
        """Write `frequencies.json`, unless there are no tables."""
        tables = [
            {"columns": list(table.columns), "values": table.values.tolist(), "counts": table.counts.tolist()}
            for table in self.tables
        ]
        if tables:
            write_json(folder / FREQUENCIES, {"format_version": FORMAT_VERSION, "tables": tables})

    def of_columns(self, columns: Mapping[str, Column]) -> Frequencies:
        """Return the frequencies of the columns of a prior that was trained on some of those that were counted; without
        tables if a column means something else."""
        tables = list[CountTable]()
        for table in self.tables:
            both = {name: columns[name] for name in table.columns if name in columns}
            if any(not column.takes_rows_of(table.columns[name]) for name, column in both.items()):
                return Frequencies()
            if both:
                tables.append(CountTable(both, *sum_counts(table.part(both), table.counts)))
        return Frequencies(tuple(tables))

    def find_table(self, name: str) -> CountTable | None:
        """Return the table with the column `name`, unless the column is null in all of its rows."""
        found = next((table for table in self.tables if name in table.columns), None)
        return None if found is None or not bool((found.ids(name) >= 0).any()) else found

    def log_prob(self, name: str, given: Given) -> Tensor:
        """Return log p(c | what is given) of all classes c of the column `name`, float64 `(B, C)`.

        Of n(o) training images whose other columns are as given, n(c, o) have the class c. With p(c), the share of the
        class in the whole split, the probability is

            (n(c, o) + p(c)) / (n(o) + 1),

        which is p(c) if there are no such images. A column that is null agrees with all values. Columns that were not
        counted together with `name` change nothing; see `describe`."""
        size, table = given.columns[name].num_classes, self.find_table(name)
        if table is None:
            return torch.zeros(len(given), size, dtype=torch.float64).log_softmax(1)
        ids, counts = table.ids(name), table.counts.double()
        ids, counts = ids.clamp(min=0), counts * (ids >= 0)
        share = torch.zeros(size, dtype=torch.float64).index_add(0, ids, counts) / counts.sum()
        others = [other for other in table.columns if other != name and other in given.rows]
        if not others:
            return share.log().expand(len(given), -1)
        theirs, columns = table.part(others), {other: table.columns[other] for other in others}
        null = pack_rows(Given(columns, {}, 1), columns)
        rows, inverse = pack_rows(given, columns).unique(dim=0, return_inverse=True)
        found = torch.empty(len(rows), size, dtype=torch.float64)
        for number, row in enumerate(rows):
            agrees = ((theirs == row) | (row == null)).all(1)
            found[number] = torch.zeros(size, dtype=torch.float64).index_add(0, ids, counts * agrees)
        return ((found + share) / (found.sum(1, keepdim=True) + 1)).log()[inverse]

    def describe(self, name: str, given: Iterable[str] = ()) -> str:
        table, names = self.find_table(name), [other for other in given if other != name]
        if table is None:
            return f"all classes of {name} count as equally likely"
        used = ", ".join(other for other in names if other in table.columns)
        ignored = ", ".join(other for other in names if other not in table.columns)
        text = f"the classes of {name} are as likely as in the training split"
        return text + f" given {used}" * bool(used) + f", whatever {ignored}" * bool(ignored)


def pack_rows(given: Given, columns: Mapping[str, Column]) -> Tensor:
    """Return the packed values of columns side by side, int64 `(B, numbers)`."""
    parts = [column.pack(given.raw(name).cpu()).long() for name, column in columns.items()]
    return torch.cat([part.reshape(len(given), -1) for part in parts], 1)


def sum_counts(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of `values`, and the sum of the counts of each."""
    distinct, inverse = values.unique(dim=0, return_inverse=True)
    return distinct, torch.zeros(len(distinct), dtype=torch.long).index_add(0, inverse, counts)


def check_table(table: StoredTable, columns: Mapping[str, Column]) -> None:
    """Raise `ValueError` unless a stored table suits these columns."""
    wrong = [name for name in table.columns if name not in columns or not columns[name].is_counted]
    if wrong or len(set(table.columns)) < len(table.columns):
        raise ValueError(f"columns: expected columns of classes and flags of this folder, each once ({table.columns})")
    own = {name: columns[name] for name in table.columns}
    values = torch.tensor(table.values)
    sizes = [column.null(1).numel() for column in own.values()]
    if values.shape[1] != sum(sizes):
        raise ValueError(f"values: expected {sum(sizes)} numbers each (found {values.shape[1]})")
    for (name, column), part in zip(own.items(), values.split(sizes, 1), strict=True):
        stored = part.to(column.stored_type)
        try:
            column.unpack(stored.reshape(-1, *column.shape))
        except ValueError as error:
            raise ValueError(f"values: {name}: {error}") from error
        if not bool((stored == part).all()):
            raise ValueError(f"values: {name}: too large")
