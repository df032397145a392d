"""How often values occur in the training split: p(c) in the mixture over a class, and the prior of `infer`.

`frequencies.json`, beside a token dataset and a pipeline, has the numbers of training images with each combination of
classes and flags; or, if too many combinations occur, the numbers of each column of classes alone, if a mixture over it
is possible (`MOST_CLASSES`). It also has quantiles of each number and angle, overall and for each class of a column of
few classes. Files of 0.3 lack it, and all values count as equally likely.

The file is published with the models, including combinations that a single image has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from prior.columns import MAX_COLUMNS, Column
from prior.given import MOST_CLASSES, Given
from tokenizer.files import FormatError, check_format_version, parse_json, read_bytes, write_json

from .files import Whole, validate

FREQUENCIES, FORMAT_VERSION = "frequencies.json", 1
MOST = 1 << 16
"""Numbers in a table: 4,096 combinations of sixteen flags, for example."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
MAX_BYTES = 8 << 20
"""Largest file that is read; the largest that is written has 5 MiB."""
CHUNK = 1 << 20
"""Numbers that are counted at once."""
QUANTILES = 64
"""Quantiles of a column of numbers: the middles of as many parts with equally many images."""
MOST_TABLES, MOST_ROWS = 128, 2048
"""Classes for each of which quantiles are stored, and about how many rows of quantiles are stored in all."""


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


class Quantiles(BaseModel):
    """Quantiles of the number or angle `column`, and of how many images: overall, or with `by` of the images of each
    class among the `values` of that column."""

    model_config = ConfigDict(extra="forbid")

    column: str
    by: str | None = None
    values: list[Annotated[Whole, Field(ge=0, lt=1 << 16)]] = Field(max_length=MOST_TABLES)
    counts: list[Annotated[Whole, Field(ge=1, lt=1 << 48)]] = Field(min_length=1, max_length=MOST_TABLES)
    quantiles: list[Annotated[list[Finite], Field(min_length=QUANTILES, max_length=QUANTILES)]]

    @model_validator(mode="after")
    def has_equal_lengths(self) -> Quantiles:
        expected = 0 if self.by is None else len(self.counts)
        if len(self.quantiles) != len(self.counts) or len(self.values) != expected:
            raise ValueError("quantiles: must be as many as counts and, with `by`, as values")
        return self

    @classmethod
    def count(cls, name: str, numbers: Tensor, by: str | None = None, ids: Tensor | None = None) -> Quantiles | None:
        """Summarize numbers `(n,)`; with `by`, for each class among its `ids`. None without numbers."""
        known = ~numbers.isnan()
        classes = [] if ids is None else ids[known & (ids >= 0)].unique().tolist()
        parts = [numbers[known]] if ids is None else [numbers[known & (ids == one)] for one in classes]
        if not known.any() or not parts or len(parts) > MOST_TABLES:
            return None
        at = (torch.arange(QUANTILES) + 0.5) / QUANTILES
        rows = [[float(f"{number:.6g}") for number in quantile(part, at).tolist()] for part in parts]
        return cls(column=name, by=by, values=classes, counts=[len(part) for part in parts], quantiles=rows)

    def log_density(self, row: int, points: Tensor, column: Column) -> Tensor:
        """Return the log density at points, up to a constant: a normal kernel at each quantile, as wide as Silverman's
        rule says, and one more image that may be anywhere, so that nothing is impossible."""
        assert column.span is not None
        low, high = column.span
        centres, count = torch.tensor(self.quantiles[row], dtype=torch.float64), self.counts[row]
        spread = min(float(centres.std()), float(centres[47] - centres[16]) / 1.34) or float(centres.std())
        width = max(0.9 * spread * count**-0.2, (high - low) / 200)
        apart = points[..., None] - centres
        if column.period is not None:
            apart = (apart + column.period / 2).remainder(column.period) - column.period / 2
        density = (-0.5 * (apart / width).square()).exp().mean(-1) / (width * math.sqrt(math.tau))
        return ((count * density + 1 / (high - low)) / (count + 1)).log()


class FrequencyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: Whole
    tables: list[StoredTable]
    quantiles: list[Quantiles] = Field([], max_length=2 * MAX_COLUMNS)


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

    def places(self, name: str, values: Tensor) -> Tensor:
        """Return for each row which of the raw `values` of the column `name` it has, -1 for none; a part of a value
        that is null agrees with everything."""
        column = self.columns[name]
        rows, sought, null = self.part([name]), pack_values(column, values), pack_values(column, column.null(1))
        same = ((rows[:, None] == sought) | (sought == null)).all(2) & (rows != null).any(1, keepdim=True)
        return torch.where(same.any(1), same.int().argmax(1), -1)


@dataclass(frozen=True)
class Frequencies:
    """The frequencies of columns in the training split: one table of all columns of classes and flags, or one of each
    column of classes. A class without a table is as likely as any other of its column."""

    tables: tuple[CountTable, ...] = ()
    quantiles: tuple[Quantiles, ...] = ()

    @classmethod
    def count(cls, given: Given) -> Frequencies:
        return cls(cls.count_tables(given), cls.count_quantiles(given))

    @classmethod
    def count_quantiles(cls, given: Given) -> tuple[Quantiles, ...]:
        classes = {name: column for name, column in given.columns.items() if 0 < column.num_classes <= MOST_TABLES}
        found = list[Quantiles | None]()
        for name, column in given.columns.items():
            if column.span is None or name not in given.rows:
                continue
            values = torch.as_tensor(given.rows[name][:]).float().cpu()[:, 0]
            found.append(Quantiles.count(name, values))
            for by in classes:
                if by in given.rows and sum(len(each.counts) for each in found if each) < MOST_ROWS:
                    found.append(Quantiles.count(name, values, by, torch.as_tensor(given.rows[by][:]).cpu()))
        return tuple(each for each in found if each is not None)

    @classmethod
    def count_tables(cls, given: Given) -> tuple[CountTable, ...]:
        columns = {name: column for name, column in given.columns.items() if column.is_counted}
        classes = {name: column for name, column in columns.items() if column.num_classes}
        given = given.without(set(given.columns) - set(columns))
        if not columns or not len(given):
            return ()
        if joint := CountTable.count(given, columns):
            return (joint,)
        few = {name: column for name, column in classes.items() if column.num_classes <= MOST_CLASSES}
        each = (CountTable.count(given, {name: column}) for name, column in few.items())
        return tuple(table for table in each if table is not None)

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
        file = validate(FrequencyFile, found, path)
        for number, fields in enumerate(file.tables):
            try:
                check_table(fields, columns)
            except ValueError as error:
                raise FormatError(f"{path}: tables.{number}.{error}") from error
            own = {name: columns[name] for name in fields.columns}
            tables.append(CountTable(own, torch.tensor(fields.values), torch.tensor(fields.counts)))
        for number, each in enumerate(file.quantiles):
            spans = each.column in columns and columns[each.column].span is not None
            if not spans or (each.by is not None and (each.by not in columns or not columns[each.by].num_classes)):
                raise FormatError(
                    f"{path}: quantiles.{number}: expected a number and a column of classes of this folder"
                )
        return cls(tuple(tables), tuple(file.quantiles))

    def save(self, folder: Path) -> None:
        """Write `frequencies.json`, unless there is nothing to write."""
        tables = [
            {"columns": list(table.columns), "values": table.values.tolist(), "counts": table.counts.tolist()}
            for table in self.tables
        ]
        quantiles = [each.model_dump(mode="json", exclude_none=True) for each in self.quantiles]
        more = {"quantiles": quantiles} if quantiles else {}
        if tables or quantiles:
            write_json(folder / FREQUENCIES, {"format_version": FORMAT_VERSION, "tables": tables, **more})

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
        kept = [each for each in self.quantiles if each.column in columns and (each.by is None or each.by in columns)]
        return Frequencies(tuple(tables), tuple(kept))

    def find_table(self, name: str) -> CountTable | None:
        """Return the table with the column `name`, unless the column is null in all of its rows."""
        found = next((table for table in self.tables if name in table.columns), None)
        if found is None:
            return None
        column = found.columns[name]
        return found if bool((found.part([name]) != pack_values(column, column.null(1))).any()) else None

    def log_prob(self, name: str, given: Given) -> Tensor:
        """Return log p(c | what is given) of all classes c of the column `name`, float64 `(B, C)`; see `weigh`."""
        return self.weigh(name, given, torch.arange(given.columns[name].num_classes))

    def weigh(self, name: str, given: Given, values: Tensor) -> Tensor:
        """Return log p(c | what is given) of raw values c of the column `name`, float64 `(B, C)`.

        Of n(o) training images whose other columns are as given, n(c, o) have the class c. With p(c), the share of the
        class in the whole split, the probability is

            (n(c, o) + p(c)) / (n(o) + 1),

        which is p(c) if there are no such images. A column that is null agrees with all values. Columns that were not
        counted together with `name` change nothing; see `describe`."""
        size, table = len(values), self.find_table(name)
        if table is None:
            return torch.zeros(len(given), size, dtype=torch.float64).log_softmax(1)
        ids, counts = table.places(name, values), table.counts.double()
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

    def log_prob_of(self, name: str, given: Given, values: Tensor) -> tuple[Tensor, str]:
        """Return log p(c | what is given) of raw values, and what it is in words."""
        table = self.find_table(name)
        if table is None:
            return self.weigh(name, given, values), "uniform"
        others = [other for other in given.names if other in table.columns]
        return self.weigh(name, given, values), "frequencies of training" + f" given {', '.join(others)}" * bool(others)

    def log_density(self, name: str, given: Given, points: Tensor) -> tuple[Tensor, str]:
        """Return the log density of a number at points `(B, V)`, up to a constant, and what it is in words: by the
        quantiles of the class that is given, if there are any, else by those of all images."""
        column = given.columns[name]
        tables = {each.by: each for each in self.quantiles if each.column == name}
        if None not in tables:
            return torch.zeros_like(points), "uniform"
        by = next((other for other in given.names if other in tables), None)
        found = torch.empty_like(points)
        for row in range(len(given)):
            number = int(given.rows[by][row]) if by is not None else -1
            table = tables[by if by is not None and number in tables[by].values else None]
            place = table.values.index(number) if table.by is not None else 0
            found[row] = table.log_density(place, points[row], column)
        return found, "quantiles of training" + f" given {by}" * (by is not None)

    def describe(self, name: str, given: Iterable[str] = ()) -> str:
        table, names = self.find_table(name), [other for other in given if other != name]
        if table is None:
            return f"all classes of {name} count as equally likely"
        used = ", ".join(other for other in names if other in table.columns)
        ignored = ", ".join(other for other in names if other not in table.columns)
        text = f"the classes of {name} are as likely as in the training split"
        return text + f" given {used}" * bool(used) + f", whatever {ignored}" * bool(ignored)


def quantile(values: Tensor, at: Tensor) -> Tensor:
    """Return quantiles of numbers; torch's own takes at most 16 million."""
    rows = values.sort().values
    place = at.double() * (len(rows) - 1)
    below = place.long()
    above = (below + 1).clamp(max=len(rows) - 1)
    return rows[below].double().lerp(rows[above].double(), place - below).float()


def pack_values(column: Column, values: Tensor) -> Tensor:
    """Return packed raw values, int64 `(n, numbers)`."""
    return column.pack(values).long().reshape(len(values), -1)


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
