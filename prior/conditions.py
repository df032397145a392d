"""What an image is conditioned on besides its class: named columns, one row per image.

    class     one of many names, int64 (B,); -1 is null
    flags     any number of names at once, float32 (B, names) of 0 and 1; NaN is null
    number    one or several numbers in the user's unit, float32 (B, size); NaN is null
    vector    an embedding, float32 (B, size); NaN is null
    grid      the ids of another image, int64 (B, *grid.shape); -1 is null, for single cells too

Columns travel as raw tensors, by name. Whoever removes a condition (guidance, dropout) sets raw columns to null, and
`prior.condition_encoder` encodes them once per call, as a vector per image and, with grids, a vector per position of
the prior's grid. A model adds `ConditionEmbedding` where it adds the embedding of the class."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field, PlainSerializer, PlainValidator
from torch import Tensor, nn

from tokenizer.base import Grid
from tokenizer.config import ModelConfig
from tokenizer.files import quote

if TYPE_CHECKING:
    from .base import PriorConfig

LABEL = "label"
"""The name of the class column that `labels` fills, in `guidance_on` and in a pipeline's `condition`."""
RESERVED = (LABEL, "labels", "tokens")
"""Names of other columns in token datasets and their tables."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
MAX_COLUMNS = 64
FEW = 24  # names listed in an error
NUMBERS = (int, float, np.number)

Condition = dict[str, Tensor]
"""Raw columns by name, with a row per image."""


# Columns ------------------------------------------------------------------------------------------


class Column(ModelConfig):
    """A column: how values are written, and what is null."""

    null_value: ClassVar[float] = math.nan
    """The raw value that is null."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's value."""
        return ()

    def parse(self, value: Any) -> Tensor:
        """Convert one value to a tensor of `shape`, or one value per image to `(n, *shape)`. None is null. A tensor
        holds raw values, in which null values are allowed. Raises `ValueError`, which says what is allowed."""
        if isinstance(value, Tensor):
            return self.check_raw(value.cpu())
        value = value.tolist() if hasattr(value, "tolist") else value  # numpy, pandas
        if self.is_one_value(value):
            return self.parse_one(value)
        parts = [self.parse_one(one.tolist() if hasattr(one, "tolist") else one) for one in value]
        return torch.stack(parts) if parts else self.null(0)

    def is_one_value(self, value: Any) -> bool:
        """Return whether `value` is the value of one image, rather than a list with a value per image: a list is one
        value if it is nested as deeply as `shape` has axes and no part is None. A single number has no list."""
        depth, inner = 0, value
        while isinstance(inner, (list, tuple)):
            depth, inner = depth + 1, next((one for one in inner if one is not None), None)
        depth += getattr(inner, "ndim", 0)
        axes = 0 if self.kind == "number" and self.shape == (1,) else len(self.shape)
        return not depth or (depth == axes and not any(one is None for one in value))

    def parse_one(self, value: Any) -> Tensor:
        """Convert the value of one image."""
        raise NotImplementedError

    def check_raw(self, values: Tensor) -> Tensor:
        """Check raw values, `shape` or `(n, *shape)`, and convert their type."""
        raise NotImplementedError

    def check_shape(self, values: Tensor) -> Tensor:
        """Raise `ValueError` unless `values` have `shape` or `(n, *shape)`."""
        shape = self.shape
        if tuple(values.shape) != shape and (not values.ndim or tuple(values.shape[1:]) != shape):
            one, several = f"the shape {shape}" if shape else "a number", str(("n", *shape)).replace("'", "")
            raise ValueError(f"expected {one} for one image, or {several} for n images (got {tuple(values.shape)})")
        return values

    def null(self, count: int, device: torch.device | None = None) -> Tensor:
        """Return `count` null rows."""
        return torch.full((count, *self.shape), self.null_value, device=device)

    def is_null(self, values: Tensor) -> Tensor:
        """Return whether each row of raw values is null, bool `(B,)`: any of its numbers, or all of its ids."""
        if values.is_floating_point():
            return values.isnan().flatten(1).any(1)
        return (values < 0)[..., None].flatten(1).all(1)


class IdColumn(Column):
    """Ids, of which -1 is null."""

    null_value: ClassVar[float] = -1

    @property
    def count(self) -> int:
        """Number of ids."""
        raise NotImplementedError

    def check_raw(self, values: Tensor) -> Tensor:
        """Check that ids are whole numbers in range."""
        values = self.check_shape(values)
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"expected ids, which are whole numbers (got {values.dtype})")
        values = values.long()
        if values.numel() and (int(values.min()) < -1 or int(values.max()) >= self.count):
            found = f"{int(values.min())} to {int(values.max())}"
            raise ValueError(f"ids should lie in [0, {self.count}), or be -1 for null (got {found})")
        return values


class ClassColumn(IdColumn):
    """One of many classes."""

    kind = "class"
    names: list[str] = Field(min_length=1, max_length=1 << 16, description="names of the classes, by id")

    @property
    def count(self) -> int:
        """Number of classes."""
        return len(self.names)

    def parse_one(self, value: Any) -> Tensor:
        """Convert a name or an id."""
        if value is None:
            return torch.tensor(-1)
        if isinstance(value, str) and value in self.names:
            return torch.tensor(self.names.index(value))
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < len(self.names):
            return torch.tensor(int(value))
        raise ValueError(f"{value!r} is not a class; allowed are {describe_names(self.names)}, or their numbers from 0")


class FloatColumn(Column):
    """Numbers, of which NaN is null."""

    def parse_one(self, value: Any) -> Tensor:
        """Convert a list of numbers."""
        if value is None:
            return self.null(1)[0]
        several = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else [value]
        if not all(isinstance(one, NUMBERS) for one in several) or len(several) != self.shape[0]:
            raise ValueError(f"expected {self.describe_value()} (got {shorten(value)})")
        try:
            found = torch.tensor([float(one) for one in several])
        except OverflowError:
            raise ValueError(f"numbers must be finite (got {shorten(value)})") from None
        if not bool(found.isfinite().all()):
            raise ValueError(f"numbers must be finite (got {shorten(value)})")
        return found

    def describe_value(self) -> str:
        """Describe what is expected."""
        return "a number per image" if self.shape == (1,) else f"{self.shape[0]} numbers per image"

    def check_raw(self, values: Tensor) -> Tensor:
        """Check that numbers are finite or NaN."""
        if self.shape == (1,) and values.ndim < 2 and values.shape != (1,):  # a number, or one per image
            values = values[..., None]
        if values.is_complex():
            raise ValueError(f"expected numbers (got {values.dtype})")
        values = self.check_shape(values).float()
        if bool(values.isinf().any()):
            raise ValueError("numbers must be finite (got infinity)")
        return values


class FlagsColumn(FloatColumn):
    """Any number of names at once."""

    kind = "flags"
    names: list[str] = Field(min_length=1, max_length=1 << 12, description="names of the flags")

    @property
    def shape(self) -> tuple[int, ...]:
        """A number for each flag."""
        return (len(self.names),)

    def parse_one(self, value: Any) -> Tensor:
        """Convert the names of the flags that are set, or a number 0 or 1 for each flag."""
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, Iterable) or not all(isinstance(one, str) for one in names):
            return self.check_raw(super().parse_one(value))
        if unknown := [one for one in names if one not in self.names]:
            raise ValueError(f"{unknown[0]!r} is not a flag; allowed are {describe_names(self.names)}")
        return torch.tensor([float(name in names) for name in self.names])

    def describe_value(self) -> str:
        """Describe what is expected."""
        return f"names of flags, or a number 0 or 1 for each of {len(self.names)} flags"

    def check_raw(self, values: Tensor) -> Tensor:
        """Check that flags are 0 or 1."""
        values = super().check_raw(values)
        if bool(((values != 0) & (values != 1) & ~values.isnan()).any()):
            wrong = values[(values != 0) & (values != 1) & ~values.isnan()]
            raise ValueError(f"flags must be 0 or 1 (got {float(wrong[0]):g})")
        return values


class NumberColumn(FloatColumn):
    """One or several numbers, standardised by the training split."""

    kind = "number"
    mean: list[float] = Field(min_length=1, max_length=64, description="mean over the training split")
    std: list[Annotated[float, Field(gt=0)]] = Field(description="standard deviation over the training split")
    low: list[float] = Field(description="smallest values of the training split")
    high: list[float] = Field(description="largest values of the training split")

    @property
    def shape(self) -> tuple[int, ...]:
        """As many numbers as there are means."""
        return (len(self.mean),)


class VectorColumn(FloatColumn):
    """An embedding computed by `encoder`."""

    kind = "vector"
    size: int = Field(ge=1, le=1 << 14, description="length of the vector")
    scale: float = Field(1.0, gt=0, description="root mean square of the numbers in the training split")
    encoder: str = Field("", description="what computes the vectors")

    @property
    def shape(self) -> tuple[int, ...]:
        """The vector's length."""
        return (self.size,)


class GridColumn(IdColumn):
    """The tokens of another image."""

    kind = "grid"
    grid: Grid = Field(description="shape and vocabulary size of the tokens")
    tokenizer: str = Field("", description="fingerprint of the tokenizer that makes the tokens")

    @property
    def shape(self) -> tuple[int, ...]:
        """The grid's shape."""
        return self.grid.shape

    @property
    def count(self) -> int:
        """Number of ids."""
        return self.grid.vocab_size

    def parse_one(self, value: Any) -> Tensor:
        """Convert tokens of the grid's shape."""
        if value is None:
            return self.null(1)[0]
        try:
            tokens = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"expected token ids of shape {self.shape} (got {shorten(value)})") from None
        return self.check_raw(tokens)


KINDS: dict[str, type[Column]] = {
    kind.kind: kind for kind in (ClassColumn, FlagsColumn, NumberColumn, VectorColumn, GridColumn)
}


def read_column(value: Any) -> Column:
    """Parse the JSON form of a column; return a `Column` unchanged. Raises `ValueError`."""
    if isinstance(value, Column):
        return value
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"a column's kind must be one of {', '.join(KINDS)} (got {quote(kind)})")
    try:
        return KINDS[kind](**{name: item for name, item in value.items() if name != "kind"})
    except TypeError as error:
        raise ValueError(str(error)) from error


AnyColumn = Annotated[Column, PlainValidator(read_column), PlainSerializer(lambda column: column.to_dict())]
"""Field type for a column in a configuration."""


def conditions_problem(conditions: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with named columns, or with the names of columns that are not known yet."""
    if len(conditions) > MAX_COLUMNS:
        yield f"at most {MAX_COLUMNS} columns are possible (got {len(conditions)})"
    for name, column in conditions.items():
        if not NAME.fullmatch(name) or name in RESERVED:
            yield f"{name!r} cannot name a column; use letters, digits and _, and not {', '.join(RESERVED)}"
        facts = (column.std, column.low, column.high) if isinstance(column, NumberColumn) else ()
        if any(len(each) != column.shape[0] for each in facts):
            yield f"{name}: mean, std, low and high must have equally many numbers"


def describe_names(names: list[str]) -> str:
    """List the first names."""
    return ", ".join(names[:FEW]) + (f", ... ({len(names)} in all)" if len(names) > FEW else "")


def shorten(value: Any) -> str:
    """Return the representation of a value in one line, at most 80 characters long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


# Rows ---------------------------------------------------------------------------------------------


def find_column(columns: Mapping[str, Any], name: str, argument: str = "condition") -> Any:
    """Return the column `name`. Raises `ValueError`, which lists the columns. argument: what named it."""
    if name in columns:
        return columns[name]
    near = difflib.get_close_matches(str(name), columns, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{argument}: unknown column {name!r}; {hint}{describe_columns(columns)}")


def parse_values(columns: Mapping[str, Column], condition: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert values by name to raw tensors of one value or one value per image. Raises `ValueError` for unknown
    columns and invalid values."""
    if not isinstance(condition, Mapping):
        there = describe_columns(columns)
        raise ValueError(f"condition: expected values by column (got {shorten(condition)}); {there}")
    parsed = {}
    for name, value in condition.items():
        column = find_column(columns, name)
        try:
            parsed[name] = column.parse(value)
        except (ValueError, TypeError) as error:
            raise ValueError(f"condition: {name}: {error}") from error
    return parsed


def describe_columns(columns: Mapping[str, Any]) -> str:
    """Describe the columns in a few words."""
    return f"the columns are {', '.join(columns)}" if columns else "there are no columns"


def make_condition(
    columns: Mapping[str, Column],
    condition: Mapping[str, Any] | None,
    count: int,
    device: torch.device | None = None,
) -> Condition:
    """Return raw columns for `count` images, null where `condition` has no value. Raises `ValueError` for unknown
    columns, invalid values, and a number of values other than 1 and `count`."""
    given, found = parse_values(columns, {} if condition is None else condition), {}
    for name, column in columns.items():
        values = given.get(name)
        if values is None:
            found[name] = column.null(count, device)
        elif values.ndim == len(column.shape):
            found[name] = values.to(device).expand(count, *values.shape).contiguous()
        elif len(values) == count:
            found[name] = values.to(device)
        else:
            raise ValueError(
                f"condition: {name}: got a list of {len(values)} for {count} images; give one value, or one per image"
            )
    return found


def select_rows(condition: Condition, at: Any) -> Condition:
    """Return rows of all columns."""
    return {name: values[at] for name, values in condition.items()}


def digest_condition(condition: Condition) -> str:
    """Return the sha256 of raw columns."""
    digest = hashlib.sha256()
    for name, values in sorted(condition.items()):
        values = values.detach().cpu().contiguous()
        if values.is_floating_point():  # NaN and 0 have several forms
            values = torch.where(values.isnan(), math.nan, values + 0.0)
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# In models ----------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """Labels and encoded columns of a batch. They are never set to null: that is done to raw columns."""

    labels: Tensor
    """`(B,)`."""
    vector: Tensor
    """`(B, width)`: the sum of all columns, with the means of grids."""
    map: Tensor | None = None
    """`(B, P, width)` for the prior's positions in raster order; None without grids."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: Any) -> Encoded:
        return Encoded(self.labels[at], self.vector[at], None if self.map is None else self.map[at])

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.labels.device

    @property
    def positions(self) -> Tensor:
        """`(B, 1 or P, width)`: the vector of each position."""
        return self.vector[:, None] if self.map is None else self.vector[:, None] + self.map


Given = Tensor | Encoded
"""What a model receives: labels `(B,)`, or with columns `Encoded`."""


def join_rows(first: Any, second: Any) -> Given:
    """Concatenate two `Given` of the same prior."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    every = None if first.map is None else torch.cat([first.map, second.map])
    return Encoded(torch.cat([first.labels, second.labels]), torch.cat([first.vector, second.vector]), every)


class ColumnProjection(nn.Linear):
    """Maps encoded columns to a model's width, and keeps their size at the start of training."""

    def __init__(self, config: PriorConfig, size: int) -> None:
        super().__init__(config.condition_width, size, bias=False)

    def reset_parameters(self) -> None:
        """Keep the size of the encoding."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


class ConditionEmbedding(nn.Embedding):
    """An embedding of the class, whose last row is the null class, plus projections of encoded columns."""

    def __init__(self, config: PriorConfig, size: int) -> None:
        super().__init__(config.num_classes + 1, size)
        self.columns = ColumnProjection(config, size) if config.conditions else None

    def forward(self, given: Given) -> Tensor:
        """Return the embedding of each image, `(B, size)`."""
        if self.columns is None or isinstance(given, Tensor):
            return super().forward(given)  # type: ignore[arg-type]
        return super().forward(given.labels) + self.columns(given.vector)

    def at_positions(self, given: Given, order: Tensor | None = None) -> Tensor:
        """Return the embedding at each position, `(B, 1 or P, size)`, in raster order, or in the given order `(P,)` or
        `(B, P)`."""
        if self.columns is None or isinstance(given, Tensor):
            return super().forward(given)[:, None]  # type: ignore[arg-type]
        x = super().forward(given.labels)[:, None] + self.columns(given.positions)
        return x if order is None or given.map is None else x.take_along_dim(order.expand(x.shape[:2])[..., None], 1)

    def on_map(self, given: Given, width: int) -> Tensor:
        """Return the embedding on a map of this width, `(B, H, W, size)`, or `(B, 1, 1, size)` without grids."""
        x = self.at_positions(given)
        return x.unflatten(1, (-1, width)) if x.shape[1] > 1 else x[:, :, None]
