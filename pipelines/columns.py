"""The kinds of columns outside of a model, one class each: how values are written on the command line and in tables,
read from data sets, entered in the app, and described.

`prior.columns` defines columns and the values that Python code may give. A new kind is one class there and one here;
nothing else asks which kind a column is."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL.Image import Image as Picture
from torch import Tensor

from prior.columns import (
    MAX_NAMES,
    AngleColumn,
    ClassColumn,
    Column,
    FlagsColumn,
    GridColumn,
    NumberColumn,
    QuantityColumn,
    VectorColumn,
    shorten,
)
from tokenizer import TokenGrid, Tokenizer
from tokenizer.spec import ImageSpec

from .images.classes import is_class_name, order_classes
from .images.folder import image_paths, match_names
from .images.formats import decode_in_threads
from .images.pictures import is_single, to_images
from .text import NGRAMS, encode_text, run_encoder

if TYPE_CHECKING:
    from .images.attributes import RawColumn

C = TypeVar("C", bound=Column)
Q = TypeVar("Q", bound=QuantityColumn)
FEW = 4  # a list of more numbers is taken for a vector
AT_ONCE = 256  # pictures in memory, and encoded together
MAX_TEXT = 1000  # characters in a field of the app
YES_NO = {"true": "yes", "false": "no"}
"""The classes that data sets call true and false."""


@dataclass(frozen=True)
class ColumnFormat(Generic[C]):
    """How the values of the column `name` are written and read. tokenizer: of the pictures of a grid, if it has one."""

    kind: ClassVar[str]
    of_pictures: ClassVar[bool] = False
    """Whether values are pictures, which a tokenizer turns into ids."""

    name: str
    column: C
    tokenizer: Tokenizer | None = None

    # Python, the command line, and tables of conditions

    def convert(self, value: Any) -> Any:
        """Replace pictures and texts, which columns do not read, in a value or a list. Raises `ValueError`."""
        return value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind in "OU" else value

    def read_text(self, value: Any) -> Any:
        """Convert text of the command line to a value, or to several values separated by commas; other values, and what
        is not text of this kind, are returned unchanged."""
        return value

    def list_values(self, value: Any, names: Sequence[str] | None) -> tuple[list[Any], bool]:
        """Return the values that `condition.NAME=VALUE` gives, in which paths of pictures are `Path`s, and whether they
        are one per image, rather than one for all. names: of the images, which choose pictures in a folder. Raises
        `ValueError` for a path that does not exist."""
        value = self.read_text(value)
        if isinstance(value, list) and not self.column.is_of_one_image(value):
            return [self.read_text(one) for one in value], True
        return [value], False

    def read_cell(self, cell: Any, base: Path) -> Any:
        """Convert a cell of a table in the folder `base` to a value; empty text and NaN are null."""
        return None if is_empty(cell) else self.read_text(cell)

    def encode_files(self, values: list[Any]) -> list[Any]:
        """Replace the paths of pictures by tokens. Raises `ValueError`."""
        return values

    def parse(self, value: Any) -> Tensor:
        """Return the raw row of a value from `list_values` or `read_cell`. Raises `ValueError`."""
        value = self.convert(value)
        return value if isinstance(value, Tensor) else self.column.parse_one(value)

    # Data sets: cells -> values (`parse_cells`) -> summary -> column, which turns values into raw rows

    @classmethod
    def suits(cls, first: Any, cells: RawColumn) -> bool:
        """Return whether cells, of which one is `first`, suggest this kind rather than those after it in `FORMATS`."""
        return False

    @classmethod
    def from_cells(cls, cells: RawColumn, train: int, encoder: str) -> tuple[Column, Tensor]:
        """Return a column and the raw rows of cells, the first `train` of which are trained on. encoder: of texts, for
        vectors. Raises `ValueError`, which names the cell."""
        values = cls.parse_cells(cells, encoder)
        column = cls.make_column(cls.summarize(values, cells.names, train), encoder)
        return column, cls.to_raw(values, column)

    @classmethod
    def parse_cells(cls, cells: RawColumn, encoder: str) -> Any:
        """Return the values of cells. Raises `ValueError`, which names the cell."""
        raise NotImplementedError

    @classmethod
    def summarize(cls, values: Any, names: list[str] | None, train: int) -> Any:
        """Return what the column depends on, which is small; `summary.join(other)` is that of more values. names: of
        the data set; train: how many of the values, the first ones, are trained on."""
        raise NotImplementedError

    @classmethod
    def make_column(cls, summary: Any, encoder: str) -> Column:
        """Make a column from a summary. Raises `ValueError` without values to train on."""
        raise NotImplementedError

    @classmethod
    def to_raw(cls, values: Any, column: Any) -> Tensor:
        raise NotImplementedError

    # Tables

    def feature(self) -> Any:
        """Return the type of the column in a table of `datasets`."""
        import datasets

        number, shape = datasets.Value("float32"), self.column.shape
        return number if shape == (1,) else datasets.List(number, length=shape[0])

    def to_values(self, raw: Tensor) -> Any:
        """Return the values of raw rows in a table; None is null."""
        null = self.column.is_null(raw).tolist()
        return [None if empty else self.to_value(row) for row, empty in zip(raw.tolist(), null, strict=True)]

    def to_value(self, row: Any) -> Any:
        """Return the value of a raw row that is not null; a single number stands alone."""
        return row[0] if self.column.shape == (1,) else row

    def format_values(self, raw: Tensor, written: list[Any], folder: Path) -> list[Any]:
        """Return values for a table in `folder`, which a data set and `read_cell` read: those `written`, but names
        instead of numbers and relative paths; None is null."""
        null = self.column.is_null(raw).tolist()
        return [None if empty else value for value, empty in zip(written, null, strict=True)]

    # The app

    @property
    def field_count(self) -> int:
        """Number of fields in the app; 0 if visitors cannot write values."""
        return 1

    def make_fields(self, make_picker: Callable[[str], Any]) -> list[Any]:
        """Make the fields, invisible at first. make_picker: makes the field of a picture from a name."""
        raise NotImplementedError

    def read_fields(self, values: Sequence[Any], read_picked: Callable[[Any, ImageSpec], Any]) -> Any:
        """Return the value that is in the fields. read_picked: decodes the picture in such a field. Raises `ValueError`
        for a missing or broken picture."""
        return list(values) if len(values) > 1 else values[0]

    # Words and pictures

    def describe(self) -> str:
        return self.column.describe()

    @property
    def encoder(self) -> str:
        """The name of what makes the raw values, if anything does."""
        return getattr(self.column, "encoder", "") if self.tokenizer is None else self.tokenizer.name

    def example(self) -> str:
        """Return Python code of a value; empty if there is no short one."""
        return self.column.example()

    def draw(self, raw: Tensor, spec: ImageSpec) -> Tensor:
        """Return the pictures of raw rows, `(B, *spec.shape)` in [-1, 1], grey where null, for columns with a
        tokenizer."""
        raise NotImplementedError


# Names --------------------------------------------------------------------------------------------


Name = float | str


class NameSummary(NamedTuple):
    """The names that the data set has, if it has any, and those that occur."""

    listed: list[str] | None
    found: frozenset[Name]

    def join(self, other: NameSummary) -> NameSummary:
        if len(found := self.found | other.found) > MAX_NAMES:  # before they take the memory
            raise ValueError(f"more than {MAX_NAMES:,} names; text needs an encoder")
        return self._replace(found=found)


class NamesFormat(ColumnFormat[C]):
    """One or several of the column's names, numbered in the order of the data set's names or, without these, of the
    sorted values."""

    column_type: ClassVar[Callable[..., Column]]

    @classmethod
    def split_cell(cls, value: Any) -> list[Any]:
        """Return the names in a cell."""
        return [value]

    @classmethod
    def parse_cells(cls, cells: RawColumn, encoder: str) -> list[list[Name] | None]:
        def read(value: Any) -> list[Name]:
            found = [read_name(one, cells.names) for one in cls.split_cell(value)]
            return [name for name in found if name is not None and name != ""]

        return cells.convert(read)

    @classmethod
    def summarize(cls, values: list[list[Name] | None], names: list[str] | None, train: int) -> NameSummary:
        return NameSummary(names, frozenset(one for several in values for one in several or ()))

    @classmethod
    def make_column(cls, summary: NameSummary, encoder: str) -> Column:
        names = summary.listed or order_classes(summary.found)
        if not names:
            raise ValueError("the column has no values")
        if invalid := [name for name in names if not is_class_name(name)]:
            raise ValueError(f"{shorten(invalid[0])} is not a short text without control characters")
        return cls.column_type(names=names)

    @classmethod
    def number(cls, values: list[list[Name] | None], names: Sequence[str]) -> list[list[int] | None]:
        """Return the places of the names of each cell; None is null."""
        places = {name: place for place, name in enumerate(names)}
        return [None if several is None else [places[str(one)] for one in several] for several in values]

    def format_values(self, raw: Tensor, written: list[Any], folder: Path) -> list[Any]:
        found: list[Any] = self.to_values(raw)
        return found


class ClassFormat(NamesFormat[ClassColumn]):
    """A name or its number; `yes` and `no` may be written as truth values."""

    kind = "class"
    column_type = ClassColumn

    def read_text(self, value: Any) -> Any:
        names = self.column.names
        if str(value) not in names:
            value = YES_NO.get(str(value).lower(), value)
        return value if value in names else read_number_list(value, int)

    def read_cell(self, cell: Any, base: Path) -> Any:
        if is_empty(cell):
            return None
        text = str(cell)
        return self.read_text(text if text in self.column.names else text.removesuffix(".0"))  # of a whole float

    @classmethod
    def suits(cls, first: Any, cells: RawColumn) -> bool:
        return bool(cells.names) or isinstance(first, str)

    @classmethod
    def to_raw(cls, values: list[list[Name] | None], column: ClassColumn) -> Tensor:
        found = cls.number(values, column.names)
        return torch.tensor([places[0] if places else -1 for places in found], dtype=torch.int64)

    def feature(self) -> Any:
        import datasets

        return datasets.ClassLabel(names=self.column.names)

    def to_value(self, row: Any) -> Any:
        return self.column.names[row]

    def make_fields(self, make_picker: Callable[[str], Any]) -> list[Any]:
        import gradio as gr

        return [gr.Dropdown([*self.column.names], value=self.column.names[0], label=self.name, visible=False)]


class FlagsFormat(NamesFormat[FlagsColumn]):
    """A list of names, or text that joins them by commas or `;`."""

    kind = "flags"
    column_type = FlagsColumn

    def read_text(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return [value] if value in self.column.names else [part for part in split_list(value, "[,;]") if part]

    @classmethod
    def suits(cls, first: Any, cells: RawColumn) -> bool:
        if isinstance(first, list):
            return bool(cells.names) or isinstance(first[0], str)
        return not cells.names and any(isinstance(value, str) and ";" in value for value in cells)

    @classmethod
    def split_cell(cls, value: Any) -> list[Any]:
        value = [part.strip() for part in value.split(";")] if isinstance(value, str) else value
        return value if isinstance(value, list) else [value]

    @classmethod
    def to_raw(cls, values: list[list[Name] | None], column: FlagsColumn) -> Tensor:
        flags = torch.zeros(len(values), len(column.names))
        for row, places in enumerate(cls.number(values, column.names)):
            flags[row, slice(None) if places is None else places] = math.nan if places is None else 1
        return flags

    def feature(self) -> Any:
        import datasets

        return datasets.List(datasets.Value("string"))

    def to_value(self, row: Any) -> Any:
        return [name for name, flag in zip(self.column.names, row, strict=True) if flag]

    def make_fields(self, make_picker: Callable[[str], Any]) -> list[Any]:
        import gradio as gr

        return [gr.CheckboxGroup(self.column.names, value=[], label=self.name, visible=False)]


def read_name(value: Any, names: list[str] | None) -> float | str | None:
    """Return a class: a text, a number, `yes` or `no`; or the name at that place, of which -1 is null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and names is not None:
        if value >= len(names):
            raise ValueError(f"{value} is not a class; allowed are 0 to {len(names) - 1}")
        return names[value] if value >= 0 else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, (int, float, str)) or not is_class_name(str(value)):
        raise ValueError(f"expected a number or a short text (got {shorten(value)})")
    return value


# Numbers ------------------------------------------------------------------------------------------


class QuantityFormat(ColumnFormat[Q]):
    """One or several numbers; a single one is written without a list."""

    def read_text(self, value: Any) -> Any:
        return read_number_list(value, float)

    def read_cell(self, cell: Any, base: Path) -> Any:
        is_nan = isinstance(cell, str) and cell.lower() == "nan"
        return None if is_nan else super().read_cell(cell, base)

    def list_ranges(self) -> list[tuple[float, float, float]]:
        """Return the lowest and highest value of each number and the one at which a slider starts."""
        raise NotImplementedError

    @classmethod
    def parse_cells(cls, cells: RawColumn, encoder: str) -> NDArray[Any]:
        return stack_numbers(cells)

    @classmethod
    def summarize(cls, values: NDArray[Any], names: list[str] | None, train: int) -> NumberSummary:
        return NumberSummary.of(values[:train])

    @property
    def field_count(self) -> int:
        return self.column.shape[0]

    def make_fields(self, make_picker: Callable[[str], Any]) -> list[Any]:
        import gradio as gr

        ranges, fields = self.list_ranges(), []
        for k, (low, high, start) in enumerate(ranges, 1):
            high, label = max(high, low + 1e-6), f"{self.name} {k}" if len(ranges) > 1 else self.name
            start = min(max(float(f"{start:.3g}"), low), high)
            fields.append(gr.Slider(low, high, value=start, label=label, visible=False))
        return fields


class NumberFormat(QuantityFormat[NumberColumn]):
    """Numbers with statistics of the training split."""

    kind = "number"

    @classmethod
    def suits(cls, first: Any, cells: RawColumn) -> bool:
        return True

    @classmethod
    def make_column(cls, summary: NumberSummary, encoder: str) -> Column:
        summary.require_values()
        mean, std = summary.mean.tolist(), [each or 1.0 for each in np.sqrt(summary.var).tolist()]
        return NumberColumn(mean=mean, std=std, low=summary.low.tolist(), high=summary.high.tolist())

    @classmethod
    def to_raw(cls, values: NDArray[Any], column: NumberColumn) -> Tensor:
        return torch.from_numpy(widen(values, len(column.mean))).float()

    def list_ranges(self) -> list[tuple[float, float, float]]:
        return list(zip(self.column.low, self.column.high, self.column.mean, strict=True))


class AngleFormat(QuantityFormat[AngleColumn]):
    """Angles in degrees, which are never guessed."""

    kind = "angle"

    @classmethod
    def make_column(cls, summary: NumberSummary, encoder: str) -> Column:
        summary.require_values()
        return AngleColumn(size=len(summary.count))

    @classmethod
    def to_raw(cls, values: NDArray[Any], column: AngleColumn) -> Tensor:
        return column.check_raw(torch.from_numpy(widen(values, column.size) % 360))

    def list_ranges(self) -> list[tuple[float, float, float]]:
        return [(0.0, 360.0, 0.0)] * self.column.size


class VectorFormat(ColumnFormat[VectorColumn]):
    """Numbers, or text if the encoder is built in."""

    kind = "vector"

    @property
    def takes_text(self) -> bool:
        return NGRAMS.fullmatch(self.column.encoder) is not None

    def convert(self, value: Any) -> Any:
        value = super().convert(value)
        if isinstance(value, (list, tuple)):
            return [self.convert(one) if isinstance(one, str) else one for one in value]
        if not isinstance(value, str):
            return value
        encoder = self.column.encoder
        if not self.takes_text:
            by = f"encoded by {encoder!r}, which is not built in" if encoder else "not encoded"
            raise ValueError(f"text is {by}; give a vector of {self.column.size} numbers")
        return encode_text(encoder, [value])[0]

    def read_text(self, value: Any) -> Any:
        return value if self.takes_text else read_number_list(value, float)

    @classmethod
    def suits(cls, first: Any, cells: RawColumn) -> bool:
        return isinstance(first, list) and len(first) > FEW

    @classmethod
    def parse_cells(cls, cells: RawColumn, encoder: str) -> NDArray[Any]:
        if encoder:
            texts = list(dict.fromkeys(text for text in cells.convert(require_text) if text is not None))
            vectors = dict(zip(texts, run_encoder(encoder, texts).numpy(), strict=True))
            numbers = replace(cells, read=lambda rows: [vectors.get(text) for text in cells.read(rows)])
        values = stack_numbers(numbers if encoder else cells, torch.float16, "; `encoder` makes vectors of text")
        values[np.isnan(values).any(1)] = math.nan
        return values

    @classmethod
    def summarize(cls, values: NDArray[Any], names: list[str] | None, train: int) -> NumberSummary:
        return NumberSummary.of((values[:train] ** 2).reshape(-1, 1), size=values.shape[1])  # of all squares together

    @classmethod
    def make_column(cls, summary: NumberSummary, encoder: str) -> Column:
        summary.require_values()
        return VectorColumn(size=summary.size, scale=float(summary.mean[0]) ** 0.5 or 1.0, encoder=encoder)

    @classmethod
    def to_raw(cls, values: NDArray[Any], column: VectorColumn) -> Tensor:
        return torch.from_numpy(widen(values, column.size))

    @property
    def field_count(self) -> int:
        return int(self.takes_text)

    def make_fields(self, make_picker: Callable[[str], Any]) -> list[Any]:
        import gradio as gr

        return [gr.Textbox("", label=self.name, max_length=MAX_TEXT, visible=False)]

    def describe(self) -> str:
        return f"{'text, or ' * self.takes_text}{self.column.describe()}"

    def example(self) -> str:
        return "'some words'" if self.takes_text else ""


@dataclass(frozen=True)
class NumberSummary:
    """Statistics of the numbers of images to train on, each `(m,)` float64. size: how many numbers a value has, 0 if no
    image has one."""

    size: int
    count: NDArray[Any]
    mean: NDArray[Any]
    var: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]

    @classmethod
    def of(cls, values: NDArray[Any], size: int | None = None) -> NumberSummary:
        """Return the statistics of values `(n, m)`, in which NaN is null; they are NaN without values."""
        known = values if len(values) else np.full((1, values.shape[1]), math.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of columns of NaN
            return cls(
                size=values.shape[1] if size is None else size,
                count=(~np.isnan(values)).sum(0),
                mean=np.asarray(np.nanmean(known, 0, dtype=np.float64)),
                var=np.nanvar(known, 0, dtype=np.float64),
                low=np.nanmin(known, 0),
                high=np.nanmax(known, 0),
            )

    def join(self, other: NumberSummary) -> NumberSummary:
        """Return the statistics of both. Raises `ValueError` for another number of numbers."""
        if not self.size or not other.size:
            return self if self.size else other
        if self.size != other.size:
            raise ValueError(f"{other.size} numbers, unlike other images, which have {self.size}")
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        mean, var, means, variances = map(np.nan_to_num, (self.mean, self.var, other.mean, other.var))
        delta = means - mean
        return NumberSummary(
            size=self.size,
            count=count,
            mean=mean + delta * share,
            var=var * (1 - share) + variances * share + delta**2 * share * (1 - share),
            low=np.fmin(self.low, other.low),
            high=np.fmax(self.high, other.high),
        )

    def require_values(self) -> None:
        if not self.size or not self.count.all():
            raise ValueError("no image of the training split has a value")


def stack_numbers(cells: RawColumn, stored: torch.dtype = torch.float32, hint: str = "") -> NDArray[Any]:
    """Return the numbers of cells, or lists of equally many, (n, size); NaN is null, and size is 0 if all are null.
    stored: their type in files, which limits them. hint: for texts. Raises `ValueError`."""
    sizes, limit = list[int](), torch.finfo(stored).max
    dtype = np.float64 if stored == torch.float32 else np.float32

    def read(value: Any) -> NDArray[Any]:
        several = [math.nan if one is None else one for one in value] if isinstance(value, list) else value
        numbers = np.atleast_1d(np.asarray(several))
        if numbers.dtype.kind not in "biuf" or numbers.ndim != 1 or not len(numbers):
            raise ValueError(f"expected numbers (got {shorten(value)}){hint * isinstance(value, str)}")
        if (np.abs(numbers) > limit).any():
            raise ValueError(f"numbers must be finite and at most {limit:.5g} (got {shorten(value)})")
        sizes.append(len(numbers))
        if len(numbers) != sizes[0]:
            raise ValueError(f"{len(numbers)} numbers, unlike other images, which have {sizes[0]}")
        return numbers.astype(dtype)

    found = cells.convert(read)
    null = np.full(sizes[0] if sizes else 0, math.nan, dtype)
    return np.stack([null if one is None else one for one in found]) if found else np.zeros((0, 0), dtype)


def widen(values: NDArray[Any], size: int) -> NDArray[Any]:
    """Return values `(n, size)`, all null if the cells had none."""
    return values if values.shape[1] else np.full((len(values), size), math.nan, values.dtype)


def require_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text (got {shorten(value)})")
    return value


# Pictures -----------------------------------------------------------------------------------------


class GridFormat(ColumnFormat[GridColumn]):
    """Pictures, or the ids that a tokenizer makes of them."""

    kind = "grid"
    of_pictures: ClassVar[bool] = True

    def convert(self, value: Any) -> Any:
        value = super().convert(value)
        several = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(one, (str, Path)) for one in several):
            raise ValueError("expected images or token ids, not paths; open pictures with PIL.Image.open")
        if several is not value:
            return self.encode(value) if is_picture(value) else value
        pictures = [one for one in several if is_picture(one)]
        tokens = iter(self.encode(pictures) if pictures else ())
        return [next(tokens) if is_picture(one) else one for one in several]

    def encode(self, images: Any) -> Tensor:
        """Encode one image to tokens of the column's shape, or several to a batch, on the CPU. Raises `ValueError`."""
        if self.tokenizer is None:
            shape = self.column.shape
            raise ValueError(f"this grid has no tokenizer for images; give token ids (int64) of shape {shape}")
        spec = self.tokenizer.spec
        is_one = is_single(images, spec) or (isinstance(images, Tensor) and tuple(images.shape) == spec.shape)
        tokens = encode_images(self.tokenizer, [images] if is_one else images)
        return tokens[0] if is_one else tokens

    def list_values(self, value: Any, names: Sequence[str] | None) -> tuple[list[Any], bool]:
        several = value if isinstance(value, list) else [value]
        several = [Path(one) if isinstance(one, str) else one for one in several]
        if missing := [path for path in several if isinstance(path, Path) and not path.exists()]:
            raise ValueError(f"condition.{self.name}: no such file or folder: {missing[0]}")
        if isinstance(value, str):
            return (self.list_pictures(several[0], names), True) if several[0].is_dir() else (several, False)
        if any(isinstance(one, Path) for one in several):
            return several, True
        return super().list_values(value, names)

    def list_pictures(self, folder: Path, names: Sequence[str] | None) -> list[Any]:
        """Return the pictures in a folder, or those of `names` (without suffix). Raises `ValueError`."""
        files = [Path(path) for path in image_paths(folder)]
        if not files:
            raise ValueError(f"condition.{self.name}: no images in {folder}")
        if names is None:
            return files
        by_name = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
        stems = [str(Path(one).with_suffix("")) for one in names]
        return match_names(by_name, stems, f"condition.{self.name}: {folder}", "picture for")

    def read_cell(self, cell: Any, base: Path) -> Any:
        return base / cell if isinstance(cell, str) and cell else super().read_cell(cell, base)

    def encode_files(self, values: list[Any]) -> list[Any]:
        files, tokens = [value for value in values if isinstance(value, Path)], list[Tensor]()
        for start in range(0, len(files), AT_ONCE):
            if self.tokenizer is None:
                raise ValueError("this grid has no tokenizer for pictures; give token ids")
            some, images = files[start : start + AT_ONCE], list[Tensor]()
            for file, pixels in zip(some, decode_in_threads(some, self.tokenizer.spec), strict=True):
                if isinstance(pixels, str):
                    raise ValueError(f"{file}: {pixels}")
                images.append(torch.from_numpy(pixels.copy()))
            tokens += encode_images(self.tokenizer, images)
        each = iter(tokens)
        return [next(each) if isinstance(value, Path) else value for value in values]

    def feature(self) -> Any:
        return ids_feature(self.column.grid, "int32")

    def to_values(self, raw: Tensor) -> Any:
        return raw.int().numpy()

    def format_values(self, raw: Tensor, written: list[Any], folder: Path) -> list[Any]:
        paths = [os.path.relpath(value, folder) if isinstance(value, Path) else value for value in written]
        return super().format_values(raw, paths, folder)

    @property
    def field_count(self) -> int:
        return int(self.tokenizer is not None)

    def make_fields(self, make_picker: Callable[[str], Any]) -> list[Any]:
        return [make_picker(self.name)]

    def read_fields(self, values: Sequence[Any], read_picked: Callable[[Any, ImageSpec], Any]) -> Any:
        assert self.tokenizer is not None  # otherwise there is no field
        try:
            return read_picked(values[0], self.tokenizer.spec)[0].movedim(-3, -1).numpy()
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def describe(self) -> str:
        sides = () if self.tokenizer is None else self.tokenizer.spec.size
        return f"image of {' x '.join(map(str, sides))}, or " * bool(sides) + self.column.describe()

    def example(self) -> str:
        return "" if self.tokenizer is None else f'Image.open("{self.name}.png")'

    def draw(self, raw: Tensor, spec: ImageSpec) -> Tensor:
        assert self.tokenizer is not None
        images = self.tokenizer.decode(raw.clamp(min=0).to(self.tokenizer.device)).float().cpu()
        images[self.column.is_null(raw)] = 0.0
        if images.shape[-3] != spec.channels:
            images = images.mean(-3, keepdim=True).expand(*images.shape[:-3], spec.channels, -1, -1)
        clips = F.interpolate(images.flatten(0, -4), spec.size, mode="nearest-exact").unflatten(0, (len(raw), -1))
        return clips.expand(-1, spec.frames, -1, -1, -1).reshape(len(raw), *spec.shape)  # one image stands for all


@torch.no_grad()
def encode_images(tokenizer: Tokenizer, images: Any) -> Tensor:
    """Encode images or clips in any form that `to_images` accepts, some at a time."""
    parts = to_images(images, tokenizer.spec).split(AT_ONCE)
    return torch.cat([tokenizer.encode(part.to(tokenizer.device, tokenizer.dtype)).cpu() for part in parts])


def is_picture(value: Any) -> bool:
    """Return whether `value` is an image or a batch of images, which are bytes or floats, rather than ids or None."""
    if isinstance(value, (Tensor, np.ndarray)):
        return any(kind in str(value.dtype) for kind in ("uint8", "float"))
    return isinstance(value, Picture)


def ids_feature(grid: TokenGrid, kind: str) -> Any:
    """Return the type of a column of ids in a table of `datasets`."""
    import datasets

    if len(grid.shape) == 1:
        return datasets.List(datasets.Value(kind), length=grid.shape[0])
    array = {2: datasets.Array2D, 3: datasets.Array3D}[len(grid.shape)]
    return array(shape=grid.shape, dtype=kind)


# All kinds ----------------------------------------------------------------------------------------

FORMATS: dict[str, type[ColumnFormat[Any]]] = {
    each.kind: each for each in (GridFormat, FlagsFormat, VectorFormat, ClassFormat, AngleFormat, NumberFormat)
}
"""In the order in which kinds are guessed."""


def format_of(name: str, column: Column, tokenizer: Tokenizer | None = None) -> ColumnFormat[Any]:
    return FORMATS[column.kind](name, column, tokenizer)


def formats_of(columns: Mapping[str, Column], tokenizers: Mapping[str, Tokenizer]) -> dict[str, ColumnFormat[Any]]:
    """Return the formats of several columns. tokenizers: those of grids by name."""
    return {name: format_of(name, column, tokenizers.get(name)) for name, column in columns.items()}


def guess_format(cells: RawColumn) -> type[ColumnFormat[Any]]:
    """Return the kind of column that cells suggest, mostly by their first value."""
    if cells.open is not None:  # whose values may be large
        return GridFormat
    first = next((value for value in cells if value is not None and value != []), None)
    return next(each for each in FORMATS.values() if each.suits(first, cells))


# Values as they are written -----------------------------------------------------------------------


def is_empty(cell: Any) -> bool:
    """Return whether a cell is empty: None, empty text or NaN."""
    return cell is None or (isinstance(cell, str) and not cell) or (isinstance(cell, float) and math.isnan(cell))


def split_list(text: str, separators: str) -> list[str]:
    """Return the parts of a list that is written as text. separators: a regular expression."""
    inner = text.strip().removeprefix("[").removesuffix("]")
    return [part.strip().strip("'\"") for part in re.split(separators, inner)]


def read_number_list(value: Any, kind: type[float]) -> Any:
    """Convert text to a number of this type, or to several separated by commas, of which `null` is None. Other values,
    and what is no number, are returned unchanged."""
    if not isinstance(value, str):
        return value
    values = list[Any]()
    for part in split_list(value, ","):
        found: Any = part
        with suppress(ValueError):
            found = None if part == "null" else kind(part)
        values.append(found)
    return values if len(values) > 1 else value if isinstance(values[0], str) else values[0]
