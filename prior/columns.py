"""The kinds of columns: what may be known of an image besides its pixels, one class a kind.

    class     one of many names, int64 (B,); -1 is null
    flags     any number of names at once, float32 (B, names) of 0 and 1; NaN is null
    number    one or several numbers in the user's unit, float32 (B, size); NaN is null
    angle     one or several angles in degrees, float32 (B, size) from 0 to 360; NaN is null
    vector    an embedding, float32 (B, size); NaN is null
    grid      the ids of another image, int64 (B, *grid.shape); -1 is null, for single cells too

Each class says how values are written and checked, what is null, how raw rows are stored in files, and which network
encodes them; nothing else asks which kind a column is. `pipelines.columns` adds what needs files, tables or widgets."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field, PlainSerializer, PlainValidator
from torch import Tensor, nn

from tokenizer.base import Grid, TokenGrid, smallest_type
from tokenizer.config import ModelConfig
from tokenizer.files import quote

from .condition_encoder import ClassEmbedding, FloatEmbedding, GridEncoder, embed_standardized

LABEL = "label"  # the class column that `labels` fills
RESERVED = (LABEL, "labels", "tokens")  # names of other columns in token datasets and their tables
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
MAX_COLUMNS = 64
MAX_NAMES = 1 << 16
MOST_SUBSETS = 8  # flags whose subsets are listed
FEW = 24  # names listed in an error
NUMBERS = (int, float, np.number)


class Column(ModelConfig):
    """A column: how values are written, checked, stored and encoded, and what is null."""

    null_value: ClassVar[float] = math.nan  # the raw value that is null
    is_map: ClassVar[bool] = False
    """Whether the encoding has a vector for each position of the prior's grid, not one for the image."""
    is_counted: ClassVar[bool] = False
    """Whether values are few, so that those of the training split can be counted."""
    meaning: ClassVar[tuple[str, ...]] = ()
    """The fields that must be equal for weights to mean the same."""
    scaling: ClassVar[tuple[str, ...]] = ()
    """The fields by which numbers are standardised."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's value."""
        return ()

    @property
    def axes(self) -> int:
        """How deeply lists are nested in the value of one image as users write it."""
        return len(self.shape)

    @property
    def num_classes(self) -> int:
        """Number of raw values, from 0, of which each image has exactly one; 0 for columns other than classes."""
        return 0

    # Values

    def parse(self, value: Any) -> Tensor:
        """Convert one value to a raw tensor of `shape`, or one value per image to `(n, *shape)`. None is null. A tensor
        holds raw values, in which null values are allowed. Raises `ValueError`, which says what is allowed."""
        if isinstance(value, Tensor):
            return self.check_raw(value.cpu())
        value = value.tolist() if hasattr(value, "tolist") else value  # numpy, pandas
        if self.is_of_one_image(value):
            return self.parse_one(value)
        return self.parse_several([one.tolist() if hasattr(one, "tolist") else one for one in value])

    def is_of_one_image(self, value: Any) -> bool:
        """Return whether `value` is that of one image, not a list with one per image, where None means no value."""
        depth = count_axes(value)
        return not depth or (depth == self.axes and not any(one is None for one in value))

    def parse_one(self, value: Any) -> Tensor:
        raise NotImplementedError

    def parse_several(self, values: Sequence[Any]) -> Tensor:
        return torch.stack([self.parse_one(value) for value in values]) if values else self.null(0)

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

    def limit(self, values: Tensor) -> Tensor:
        """Replace raw values outside those of the training data by the nearest of these."""
        return values

    def null(self, count: int, device: torch.device | None = None) -> Tensor:
        return torch.full((count, *self.shape), self.null_value, device=device)

    def is_null(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def draw(self, count: int) -> Tensor:
        raise NotImplementedError

    def list_values(self) -> Tensor | None:
        """Return the raw rows of all values, `(n, *shape)`; None if these cannot be listed."""
        return None

    def to_targets(self, values: Tensor) -> Tensor:
        """Return what is inferred of raw values, `(n,)`: the place of each among the listed values, or its number."""
        listed = self.list_values()
        if listed is None:
            return values[:, 0].double()
        return (values[:, None] == listed).reshape(len(values), len(listed), -1).all(2).int().argmax(1)

    def list_parts(self) -> dict[str, Tensor]:
        """Return raw rows of the values of each part alone, `(n, *shape)`, while the others are null, by the name of
        the part; empty for columns without parts."""
        return {}

    @property
    def span(self) -> tuple[float, float] | None:
        """The ends of the range of a column of one number; None for other columns."""
        return None

    period: ClassVar[float | None] = None
    """After how much the numbers return, if they do."""

    # Files

    stored_type: ClassVar[torch.dtype] = torch.float32  # of the numbers in files
    stored_null: ClassVar[float | None] = None  # the number that is null in files; None: the raw one

    def pack(self, values: Tensor) -> Tensor:
        """Convert raw rows to stored ones. Raises `ValueError` for values that are not allowed."""
        raw, null = self.check_raw(values), self.stored_null
        raw = raw if null is None else torch.where(raw.isnan() | (raw < 0), null, raw)
        return raw.to(self.stored_type).contiguous()

    def unpack(self, stored: Tensor) -> Tensor:
        """Convert stored rows to raw ones. Raises `ValueError` for values that are not allowed."""
        if self.stored_null is None:
            return self.check_raw(stored)
        numbers = stored.long()
        return self.check_raw(torch.where(numbers == self.stored_null, self.null_value, numbers))

    # Models

    def embedding(self, width: int, positions: TokenGrid) -> nn.Module:
        """Return the network that encodes raw rows to `(B, width)`. positions: the grid that the prior's network sees.
        If `is_map`, the network also takes the sum of the other columns `(B, width)`, and returns `(B, P, width)`."""
        raise NotImplementedError

    def suits(self, other: Column) -> bool:
        """Return whether weights that were trained for the column `other` fit this one and mean the same."""
        same = type(self) is type(other) and self.shape == other.shape
        return same and self.values(self.meaning) == other.values(self.meaning)

    def takes_rows_of(self, other: Any) -> bool:
        """Return whether raw rows of the column `other` mean the same in this one."""
        return self.suits(other)

    def adapt_weights(self, weights: Mapping[str, Tensor], other: Column) -> Mapping[str, Tensor]:
        """Return the weights of `embedding` for this column, given those of a column that it `suits`."""
        return weights

    @property
    def scales(self) -> list[Any]:
        return self.values(self.scaling)

    def values(self, names: Iterable[str]) -> list[Any]:
        return [getattr(self, name) for name in names]

    # Words

    @property
    def texts(self) -> list[str]:
        """All texts of the column that a file may hold."""
        return [text for text in (*getattr(self, "names", ()), getattr(self, "encoder", "")) if text]

    def describe(self) -> str:
        raise NotImplementedError

    def describe_outside(self, values: Tensor) -> str:
        """Return a warning if raw values lie outside those of the training data, else nothing."""
        return ""

    def example(self) -> str:
        """Return Python code of a value; empty if there is no short one."""
        return ""


# Ids ----------------------------------------------------------------------------------------------


class IdColumn(Column):
    """Ids, of which -1 is null."""

    null_value: ClassVar[float] = -1

    @property
    def count(self) -> int:
        raise NotImplementedError

    def check_raw(self, values: Tensor) -> Tensor:
        values = self.check_shape(values)
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"expected ids, which are whole numbers (got {values.dtype})")
        values = values.long()
        if values.numel() and (int(values.min()) < -1 or int(values.max()) >= self.count):
            found = f"{int(values.min())} to {int(values.max())}"
            raise ValueError(f"ids should lie in [0, {self.count}), or be -1 for null (got {found})")
        return values

    def is_null(self, values: Tensor) -> Tensor:
        return (values < 0)[..., None].flatten(1).all(1)

    def draw(self, count: int) -> Tensor:
        return torch.randint(self.count, (count, *self.shape))


class ClassColumn(IdColumn):
    """One of many classes."""

    kind = "class"
    is_counted: ClassVar[bool] = True
    stored_type: ClassVar[torch.dtype] = torch.int32
    names: list[str] = Field(min_length=1, max_length=MAX_NAMES, description="names of the classes, by id")

    @classmethod
    def numbered(cls, count: int, names: Sequence[str] = ()) -> ClassColumn:
        """Return a column of `count` classes, also more than a file may have. names: by default their numbers."""
        return cls.model_construct(names=list(names) or [str(number) for number in range(count)])

    @property
    def count(self) -> int:
        return len(self.names)

    def parse_one(self, value: Any) -> Tensor:
        return torch.tensor(self.find_id(value))

    def parse_several(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor([self.find_id(value) for value in values], dtype=torch.long)  # one tensor, not one each

    def find_id(self, value: Any) -> int:
        """Return the id of a name or of an id. Raises `ValueError`."""
        if value is None:
            return -1
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < len(self.names):
            return int(value)
        allowed = f"0 to {self.count - 1}" if self.is_numbered else f"{self.describe()}, or their numbers from 0"
        raise ValueError(f"{value!r} is not a class; allowed are {allowed}")

    @property
    def is_numbered(self) -> bool:
        return self.names == [*map(str, range(self.count))]

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def list_values(self) -> Tensor | None:
        return torch.arange(len(self.names))

    def embedding(self, width: int, positions: TokenGrid) -> nn.Module:
        return ClassEmbedding(len(self.names), width)

    def suits(self, other: Column) -> bool:
        return type(self) is type(other)  # classes are matched by name

    def takes_rows_of(self, other: Any) -> bool:
        """Ids mean the same if the names are equal, or if one of the columns only numbers its classes, as priors do."""
        if type(self) is not type(other) or self.count != other.count:
            return False
        return self.names == other.names or self.is_numbered or other.is_numbered

    def adapt_weights(self, weights: Mapping[str, Tensor], other: Column) -> Mapping[str, Tensor]:
        return {"weight": weights["weight"][self.match_rows(other)]}

    def match_rows(self, other: Any) -> Tensor:
        """Return the row of each class, and of null, in a table of `other`'s classes and null; null for new ones."""
        places = {name: row for row, name in enumerate(other.names)}
        return torch.tensor([*(places.get(name, other.count) for name in self.names), other.count])

    def describe(self) -> str:
        return describe_names(self.names)

    def example(self) -> str:
        return repr(self.names[0])


class GridColumn(IdColumn):
    """The tokens of another image."""

    kind = "grid"
    is_map: ClassVar[bool] = True
    meaning: ClassVar[tuple[str, ...]] = ("grid", "tokenizer")
    grid: Grid = Field(description="shape and vocabulary size of the tokens")
    tokenizer: str = Field("", description="fingerprint of the tokenizer that makes the tokens")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.grid.shape

    @property
    def count(self) -> int:
        return self.grid.vocab_size

    def parse_one(self, value: Any) -> Tensor:
        if value is None:
            return self.null(1)[0]
        try:
            tokens = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"expected token ids of shape {self.shape} (got {shorten(value)})") from None
        return self.check_raw(tokens)

    @property
    def stored_type(self) -> torch.dtype:  # type: ignore[override]
        return smallest_type(self.grid.vocab_size + 1)

    @property
    def stored_null(self) -> float:  # type: ignore[override]
        return self.grid.vocab_size

    def embedding(self, width: int, positions: TokenGrid) -> nn.Module:
        return GridEncoder(self.grid, positions, width)

    def describe(self) -> str:
        return f"{' x '.join(map(str, self.shape))} ids of {self.grid.vocab_size}"


# Numbers ------------------------------------------------------------------------------------------


class FloatColumn(Column):
    """Numbers, of which NaN is null."""

    def parse_one(self, value: Any) -> Tensor:
        if value is None:
            return self.null(1)[0]
        several = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else [value]
        if not all(isinstance(one, NUMBERS) for one in several) or len(several) != self.shape[0]:
            raise ValueError(f"expected {self.describe_expected()} (got {shorten(value)})")
        try:
            found = torch.tensor([float(one) for one in several])
        except OverflowError:
            found = torch.tensor(math.inf)
        if not bool(found.isfinite().all()):
            raise ValueError(f"numbers must be finite (got {shorten(value)})")
        return self.check_raw(found)

    def describe_expected(self) -> str:
        return "a number per image" if self.shape == (1,) else f"{self.shape[0]} numbers per image"

    def check_raw(self, values: Tensor) -> Tensor:
        if self.shape == (1,) and values.ndim < 2 and values.shape != (1,):  # a number, or one per image
            values = values[..., None]
        if values.is_complex():
            raise ValueError(f"expected numbers (got {values.dtype})")
        values = self.check_shape(values).float()
        if bool(values.isinf().any()):
            raise ValueError("numbers must be finite (got infinity)")
        return values

    def is_null(self, values: Tensor) -> Tensor:
        return values.isnan().flatten(1).any(1)

    def draw(self, count: int) -> Tensor:
        return torch.randint(2, (count, *self.shape)).float()  # all columns of numbers allow 0 and 1

    def embedding(self, width: int, positions: TokenGrid) -> nn.Module:
        return embed_standardized([0.0] * self.shape[0], [1.0] * self.shape[0], width)

    def describe(self) -> str:
        return f"{self.shape[0]} numbers"


class FlagsColumn(FloatColumn):
    """Any number of names at once."""

    kind = "flags"
    is_counted: ClassVar[bool] = True
    stored_type: ClassVar[torch.dtype] = torch.uint8
    stored_null: ClassVar[float | None] = 255
    meaning: ClassVar[tuple[str, ...]] = ("names",)
    names: list[str] = Field(min_length=1, max_length=1 << 12, description="names of the flags")

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.names),)

    def parse_one(self, value: Any) -> Tensor:
        """Convert the names of the flags that are set, or a number 0 or 1 for each flag."""
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, Iterable) or not all(isinstance(one, str) for one in names):
            return super().parse_one(value)
        if unknown := [one for one in names if one not in self.names]:
            raise ValueError(f"{unknown[0]!r} is not a flag; allowed are {describe_names(self.names)}")
        return torch.tensor([float(name in names) for name in self.names])

    def describe_expected(self) -> str:
        return f"names of flags, or a number 0 or 1 for each of {len(self.names)} flags"

    def check_raw(self, values: Tensor) -> Tensor:
        values = super().check_raw(values)
        wrong = values[(values != 0) & (values != 1) & ~values.isnan()]
        if len(wrong):
            raise ValueError(f"flags must be 0 or 1 (got {float(wrong[0]):g})")
        return values

    def list_values(self) -> Tensor | None:
        """Return all subsets of at most `MOST_SUBSETS` flags; None for more flags."""
        places = torch.arange(len(self.names))
        if len(places) > MOST_SUBSETS:
            return None
        subsets = torch.arange(2 ** len(places))[:, None]
        return (subsets.bitwise_right_shift(places) % 2).float()

    def list_parts(self) -> dict[str, Tensor]:
        every = torch.arange(len(self.names))
        rows = torch.full((len(every), 2, len(every)), math.nan)
        rows[every, :, every] = torch.tensor([0.0, 1.0])
        return dict(zip(self.names, rows, strict=True))

    def describe(self) -> str:
        return describe_names(self.names)

    def example(self) -> str:
        return repr(self.names[:2])


class QuantityColumn(FloatColumn):
    """One or several numbers."""

    @property
    def axes(self) -> int:
        return 0 if self.shape == (1,) else 1  # a single number is written without a list


class NumberColumn(QuantityColumn):
    """One or several numbers, standardised by the training split."""

    kind = "number"
    scaling: ClassVar[tuple[str, ...]] = ("mean", "std")
    mean: list[float] = Field(min_length=1, max_length=64, description="mean over the training split")
    std: list[Annotated[float, Field(gt=0)]] = Field(description="standard deviation over the training split")
    low: list[float] = Field(description="smallest values of the training split")
    high: list[float] = Field(description="largest values of the training split")

    def check(self) -> Iterator[str]:
        if {len(self.std), len(self.low), len(self.high)} != {len(self.mean)}:
            yield "mean: mean, std, low and high must have equally many numbers"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.mean),)

    @property
    def span(self) -> tuple[float, float] | None:
        return (self.low[0], self.high[0]) if self.shape == (1,) else None

    def limit(self, values: Tensor) -> Tensor:
        # A model does not do this itself, because weights of 0.3 must keep their meaning for every raw value.
        return values.clamp(*torch.tensor([self.low, self.high]).to(values).unbind())

    def embedding(self, width: int, positions: TokenGrid) -> nn.Module:
        return embed_standardized(self.mean, self.std, width, waves=True)

    def describe(self) -> str:
        return ", ".join(f"{low:g} to {high:g}" for low, high in zip(self.low, self.high, strict=True))

    def describe_outside(self, values: Tensor) -> str:
        low, high = torch.tensor([self.low, self.high]).to(values).unbind()
        if not bool(((values < low) | (values > high)).any()):
            return ""
        return f"numbers outside those of the training data, {self.describe()}, count as the nearest of these"

    def example(self) -> str:
        means = [float(f"{mean:.4g}") for mean in self.mean]
        return repr(means if len(means) > 1 else means[0])


class AngleColumn(QuantityColumn):
    """One or several angles in degrees: 350 and 10 are near, and 370 is 10."""

    kind = "angle"
    period: ClassVar[float | None] = 360.0
    size: int = Field(1, ge=1, le=64, description="number of angles")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def span(self) -> tuple[float, float] | None:
        return (0.0, 360.0) if self.size == 1 else None

    def check_raw(self, values: Tensor) -> Tensor:
        """Check that angles are finite or NaN, and bring them to 0 to 360 degrees, of which 360 is 0."""
        angles = super().check_raw(values).remainder(360)
        return torch.where(angles == 360, 0, angles)  # of a tiny negative angle

    def embedding(self, width: int, positions: TokenGrid) -> nn.Module:
        return FloatEmbedding(self.features, 9 * self.size, width)

    def features(self, values: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return whether each angle is given, and sine and cosine of its multiples, 0 where null."""
        given = ~values.isnan()
        radians = torch.where(given, values, 0).to(dtype) * (math.pi / 180)
        angles = torch.cat([radians * multiple for multiple in (1, 2, 3, 4)], 1)
        masks = given.repeat(1, 4)
        return [given, angles.sin() * masks, angles.cos() * masks]

    def describe(self) -> str:
        return "degrees" if self.size == 1 else f"{self.size} angles in degrees"

    def example(self) -> str:
        return repr(90.0 if self.size == 1 else [90.0] * self.size)


class VectorColumn(FloatColumn):
    """An embedding computed by `encoder`."""

    kind = "vector"
    stored_type: ClassVar[torch.dtype] = torch.float16
    meaning: ClassVar[tuple[str, ...]] = ("encoder",)
    scaling: ClassVar[tuple[str, ...]] = ("scale",)
    size: int = Field(ge=1, le=1 << 14, description="length of the vector")
    scale: float = Field(1.0, gt=0, description="root mean square of the numbers in the training split")
    encoder: str = Field("", description="what computes the vectors")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    def pack(self, values: Tensor) -> Tensor:
        stored = super().pack(values)
        if bool(stored.isinf().any()):
            most = torch.finfo(stored.dtype).max
            raise ValueError(f"numbers must lie within +-{most:g}, the limit of {stored.dtype}")
        return stored

    def embedding(self, width: int, positions: TokenGrid) -> nn.Module:
        return embed_standardized([0.0] * self.size, [self.scale] * self.size, width)


# All kinds ----------------------------------------------------------------------------------------

COLUMN_KINDS: dict[str, type[Column]] = {
    kind.kind: kind for kind in (ClassColumn, FlagsColumn, NumberColumn, AngleColumn, VectorColumn, GridColumn)
}


def read_column(value: Any) -> Column:
    """Parse the JSON form of a column; return a `Column` unchanged. Raises `ValueError`."""
    if isinstance(value, Column):
        return value
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in COLUMN_KINDS:
        raise ValueError(f"a column's kind must be one of {', '.join(COLUMN_KINDS)} (got {quote(kind)})")
    try:
        return COLUMN_KINDS[kind](**{name: item for name, item in value.items() if name != "kind"})
    except TypeError as error:
        raise ValueError(str(error)) from error


AnyColumn = Annotated[Column, PlainValidator(read_column), PlainSerializer(lambda column: column.to_dict())]


def count_axes(value: Any) -> int:
    """Return how deeply lists, tuples and arrays are nested, at the first part that is not None."""
    if isinstance(value, (list, tuple)):
        return 1 + count_axes(next((one for one in value if one is not None), None))
    return getattr(value, "ndim", 0)


def names_problem(names: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with the names of columns."""
    names = list(names)
    if len(names) > MAX_COLUMNS:
        yield f"at most {MAX_COLUMNS} columns are possible (got {len(names)})"
    for name in names:
        if not NAME.fullmatch(name) or name in RESERVED:
            yield f"{name!r} cannot name a column; use letters, digits and _, and not {', '.join(RESERVED)}"


def find_column(columns: Mapping[str, Any], name: str, argument: str = "condition") -> Any:
    """Return the column `name`. Raises `ValueError`, which lists the columns; `argument` begins its message."""
    if name in columns:
        return columns[name]
    near = difflib.get_close_matches(str(name), columns, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{argument}: unknown column {name!r}; {hint}{describe_columns(columns)}")


def describe_columns(columns: Mapping[str, Any]) -> str:
    return f"the columns are {', '.join(columns)}" if columns else "there are no columns"


def describe_names(names: Sequence[str]) -> str:
    return ", ".join(names[:FEW]) + (f", ... ({len(names)} in all)" if len(names) > FEW else "")


def shorten(value: Any) -> str:
    """Return the representation of a value in one line, at most 80 characters long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
