"""What is known of the images of a batch: `Given`, the raw rows of all columns; the class is the column `label`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import to_tensor
from .columns import LABEL, Column, describe_columns, find_column, shorten

Convert = Callable[[str, Column, Any], Any]
"""Replaces what a column does not read itself, such as pictures and texts: name, column, value -> value."""
MOST_CLASSES = 1024  # of a mixture; each costs a pass


@dataclass(frozen=True)
class Given:
    """The raw rows of `count` images. Columns without rows are null for all of them. With `weights`, the log
    probabilities `(B, C)` of the classes of one column by its name, densities are the mixture over these classes; see
    `over`.

    Whoever removes a condition (guidance, dropout, evaluation) uses `without`; `Prior.encode_given` encodes what is
    left. Rows may be anything that an index turns into a tensor, such as the rows of a token dataset on a disk."""

    columns: Mapping[str, Column]
    rows: Mapping[str, Any]
    count: int
    weights: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        columns: Mapping[str, Column],
        labels: Any = None,
        condition: Any = None,
        *,
        count: int | None = None,
        default: int = 1,
        device: torch.device | None = None,
        convert: Convert = lambda name, column, value: value,
    ) -> Given:
        """Read what users write, once, in the first line of a public method.

        labels: one class or one per image, the short form of `condition["label"]`. condition: values by column, one for
        all images or one per image (see `Column.parse`; None gives nothing), or a `Given`. count: the number of images;
        None: as many as there are values, or `default`. Raises `ValueError`, which names the column and what is
        allowed."""
        found = condition.of_columns(columns) if isinstance(condition, Given) else None
        if found is None and not isinstance(condition, (Mapping, type(None))):
            there = describe_columns(columns)
            raise ValueError(f"condition: expected values by column (got {shorten(condition)}); {there}")
        values = dict(condition or {}) if found is None else dict(found.rows)
        if labels is not None and values.get(LABEL) is not None:
            raise ValueError(f"give labels, or {LABEL!r} in condition, not both")
        if found is not None:
            if count not in (None, len(found)):
                raise ValueError(f"condition: got rows of {len(found)} images for {count} images")
            own = {} if labels is None else cls.read(columns, labels, count=len(found)).rows
            return found[:].with_rows(**own).to(device)  # rows on a disk are read
        if labels is not None:
            lists = isinstance(labels, Iterable) and not isinstance(labels, (str, Mapping, Tensor, np.ndarray))
            values[LABEL] = list(labels) if lists else labels  # such as a range
        parsed = dict[str, Tensor]()
        for name, value in values.items():
            nothing = value is None or isinstance(value, (list, tuple)) and all(one is None for one in value)
            if name == LABEL and name not in columns and nothing:
                continue
            where = "labels" if name == LABEL and labels is not None else f"condition: {name}"
            if where == "labels" and name not in columns:
                raise ValueError(f"labels: there are no classes (got {shorten(value)})")
            column = find_column(columns, name)
            if value is None:
                continue
            try:
                raw = parsed[name] = column.parse(convert(name, column, value))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}: {error}") from error
            if raw.ndim > len(column.shape):
                count = len(raw) if count is None else count
                if len(raw) != count:
                    what = f"a list of {len(raw)} for {count} images"
                    raise ValueError(f"{where}: got {what}; give one value, or one per image")
        count = default if count is None else count
        for name, raw in parsed.items():
            parsed[name] = raw if raw.ndim > len(columns[name].shape) else raw.expand(count, *raw.shape)
        return cls(columns, parsed, count).to(device)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: Any) -> Given:
        """Select images by any index of a tensor that keeps its first axis, on the rows' device or on the CPU."""
        rows = {name: raw[at] for name, raw in self.rows.items()}
        weights = {name: each[at.cpu() if isinstance(at, Tensor) else at] for name, each in self.weights.items()}
        some = next(iter(rows.values()), None)
        if some is None:
            some = torch.zeros(1, device=getattr(at, "device", "cpu")).expand(self.count)[at]  # which takes no memory
        return replace(self, rows=rows, count=len(some), weights=weights)

    def repeat(self, times: int) -> Given:
        return self[torch.arange(self.count).repeat_interleave(times)]

    def expand(self, count: int) -> Given:
        """Repeat a single image `count` times."""
        return self[torch.zeros(count, dtype=torch.long)]

    def without(self, names: Iterable[str] | Mapping[str, Tensor] | None = None) -> Given:
        """Make columns null, also one that densities are mixtures over: these `names`, or all. A mapping makes them
        null in the rows, bool `(B,)`, that it has by name."""
        if isinstance(names, Mapping):
            rows = dict(self.rows)
            for name in names.keys() & rows.keys():
                rows[name] = rows[name].clone()
                rows[name][names[name]] = self.columns[name].null(1, rows[name].device)[0]
            return replace(self, rows=rows)
        gone = set(self.columns if names is None else names)
        rows, weights = (
            {name: rows for name, rows in each.items() if name not in gone} for each in (self.rows, self.weights)
        )
        return replace(self, rows=rows, weights=weights)

    def over(self, name: str, log_weights: Any = None) -> Given:
        """Leave the class of the column `name` open: densities are sum_c p(c) p(tokens | c, what is given); features
        and samples take the column as null.

        log_weights: log p(c), `(C,)` or one for each image `(B, C)`; None: all classes are equally likely. Raises
        `ValueError` for a column that is given, missing or not a class, for more than `MOST_CLASSES`, and for weights
        that do not sum to one."""
        column: Column = find_column(self.columns, name, "marginal")
        classes = column.num_classes
        if not classes:
            raise ValueError(f"marginal: {name!r} is a {column.kind} column; it must be a column of classes")
        if name in self.rows:
            raise ValueError(f"marginal: {name!r} is given; leave it out, or leave out marginal")
        if classes > MOST_CLASSES:
            cost = f"{name!r} has {classes:,} classes: {classes:,} passes of the prior for each image"
            raise ValueError(f"marginal: {cost}; at most {MOST_CLASSES:,} classes are possible")
        if other := [each for each in self.weights if each != name]:
            raise ValueError(f"marginal: {other[0]!r} is open, too; only one column can be")
        uniform = torch.zeros(classes, dtype=torch.float64).log_softmax(0)
        weights = (uniform if log_weights is None else to_tensor(log_weights)).cpu().double()
        shape = (self.count, classes)
        if tuple(weights.shape) not in (shape, shape[1:]):
            raise ValueError(f"log_weights must have the shape {shape} or {shape[1:]} (got {tuple(weights.shape)})")
        if not bool((weights.logsumexp(-1).abs() < 1e-3).all()):
            raise ValueError("log_weights: the probabilities of all classes must sum to one")
        return replace(self, weights={name: weights.expand(shape)})

    def with_rows(self, **rows: Any) -> Given:
        """Replace the raw rows of columns by name."""
        weights = {name: each for name, each in self.weights.items() if name not in rows}
        return replace(self, rows={**self.rows, **rows}, weights=weights)

    def drop_null(self) -> Given:
        """Leave out columns that are null in every row; one of several numbers only if all of these are null."""
        nulls = {name: self.columns[name].null_value for name in self.rows}
        rows = {name: raw for name, raw in self.rows.items() if not bool((raw.isnan() | (raw == nulls[name])).all())}
        return replace(self, rows=rows)

    def of_columns(self, columns: Mapping[str, Column]) -> Given:
        """Return the same rows for other `columns`, which must have all that are given, with the same meaning. Raises
        `ValueError`."""
        for name in (*self.rows, *self.weights):
            column, own = find_column(columns, name), self.columns[name]
            if not column.takes_rows_of(own):
                there, here = (f"{each.kind}: {each.describe()}" for each in (own, column))
                raise ValueError(f"condition: {name}: was read for another column ({there}), not for this one ({here})")
        return replace(self, columns=columns)

    def limit(self) -> Given:
        """Replace numbers outside those of the training data by the nearest of these."""
        return replace(self, rows={name: self.columns[name].limit(rows) for name, rows in self.rows.items()})

    def to(self, device: torch.device | None) -> Given:
        return replace(self, rows={name: rows.to(device) for name, rows in self.rows.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns that are given, in the order of all columns."""
        return tuple(name for name in self.columns if name in self.rows)

    @property
    def terms(self) -> tuple[str, ...]:
        """What densities depend on: the names of the given columns, and `marginal=NAME` for a mixture."""
        return (*self.names, *(f"marginal={name}" for name in self.weights))

    def raw(self, name: str, device: torch.device | None = None) -> Tensor:
        """Return the raw rows of a column, null where nothing is given."""
        return self.rows[name] if name in self.rows else self.columns[name].null(self.count, device)

    @property
    def digest(self) -> str:
        """The sha256 of the raw rows of all columns, and of the label if it is given, whose null is written as the
        number of classes, as in 0.3."""
        rows = {name: self.raw(name) for name in set(self.columns) - {LABEL} | set(self.rows)}
        if LABEL in rows:
            null = len(self.columns[LABEL].names)  # type: ignore[attr-defined]
            rows[LABEL] = torch.where(rows[LABEL] < 0, null, rows[LABEL])
        return digest_rows(rows)


def digest_rows(rows: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors by name."""
    digest = hashlib.sha256()
    for name, values in sorted(rows.items()):
        values = values.detach().cpu()
        if values.is_floating_point():  # NaN and 0 have several forms
            values = torch.where(values.isnan(), math.nan, values + 0.0)
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
