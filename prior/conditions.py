"""What an image is conditioned on besides its class: named columns, one row per image.

    class     one of many names, int64 (B,); -1 is null
    flags     any number of names at once, float32 (B, names) of 0 and 1; NaN is null
    number    one or several numbers in the user's unit, float32 (B, size); NaN is null
    vector    an embedding, float32 (B, size); NaN is null
    grid      the ids of another image, int64 (B, *grid.shape); -1 is null, for single cells too

Columns travel as raw tensors, by name. Whoever removes a condition (guidance, dropout) sets raw columns to null, and
`ConditionEncoder` encodes them once per call, as a vector per image and, with grids, a vector per position of the
prior's grid. A model adds `ConditionEmbedding` where it adds the embedding of the class."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PlainSerializer, PlainValidator
from torch import Tensor, nn

from tokenizer.base import Grid, TokenGrid
from tokenizer.config import ModelConfig
from tokenizer.files import quote
from tokenizer.precision import at_least_float32
from tokenizer.scales import area_matrix

if TYPE_CHECKING:
    from .base import PriorConfig

LABEL = "label"
"""The name of the class column that `labels` fills, in `guidance_on` and in a pipeline's `condition`."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
MAX_COLUMNS = 64
FEW = 24  # names listed in an error
CLAMP = 6.0  # standard deviations of a number
OCTAVES = 4
STD = 0.02  # of the encoding of a vector column at the start of training, as of a class embedding

Condition = dict[str, Tensor]
"""Raw columns by name, with a row per image."""


# Columns ------------------------------------------------------------------------------------------


class Column(ModelConfig):
    """A column: how values are written, and what is null."""

    def parse(self, value: Any) -> Tensor:
        """Convert one value to a tensor of `shape`, or one value per image to `(n, *shape)`. None is null. A tensor
        holds raw values, in which null values are allowed. Raises `ValueError`, which names what is allowed."""
        if isinstance(value, Tensor):
            return self.check_raw(value.cpu())
        value = value.tolist() if isinstance(value, np.ndarray) and value.dtype != object else value
        if not self.is_one_value(value):
            parts = [self.parse_one(one) for one in value]
            return torch.stack(parts) if parts else self.null(0)
        return self.parse_one(value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's value."""
        return ()

    def is_one_value(self, value: Any) -> bool:
        """Return whether `value` is the value of one image, rather than a list with a value per image."""
        return isinstance(value, (str, Mapping)) or not isinstance(value, Iterable)

    def parse_one(self, value: Any) -> Tensor:
        """Convert the value of one image."""
        raise NotImplementedError

    def check_raw(self, values: Tensor) -> Tensor:
        """Check raw values, `shape` or `(n, *shape)`, and convert their type."""
        raise NotImplementedError

    def null(self, count: int, device: torch.device | None = None) -> Tensor:
        """Return `count` null rows."""
        raise NotImplementedError

    def is_null(self, values: Tensor) -> Tensor:
        """Return whether each row of raw values is null, bool `(B,)`."""
        raise NotImplementedError

    def check_shape(self, values: Tensor) -> Tensor:
        """Raise `ValueError` unless `values` have `shape` or `(n, *shape)`."""
        shape = self.shape
        if tuple(values.shape) != shape and tuple(values.shape[1:]) != shape:
            expected = f"{shape} for one image" if shape else "a number for one image"
            raise ValueError(f"expected {expected}, or {('n', *shape)} for n images (got {tuple(values.shape)})")
        return values


class ClassColumn(Column):
    """One of many classes."""

    kind = "class"
    names: list[str] = Field(min_length=1, max_length=1 << 16, description="names of the classes, by id")

    def parse_one(self, value: Any) -> Tensor:
        """Convert a name or an id."""
        if value is None:
            return torch.tensor(-1)
        if isinstance(value, str) and value in self.names:
            return torch.tensor(self.names.index(value))
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < len(self.names):
            return torch.tensor(int(value))
        raise ValueError(f"{value!r} is not a class; allowed are {describe_names(self.names)}, or their numbers from 0")

    def check_raw(self, values: Tensor) -> Tensor:
        """Check ids."""
        values = self.check_shape(values)
        if values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(f"expected whole numbers (got {values.dtype})")
        return check_range(values.long(), len(self.names))

    def null(self, count: int, device: torch.device | None = None) -> Tensor:
        """Return null rows."""
        return torch.full((count,), -1, device=device)

    def is_null(self, values: Tensor) -> Tensor:
        """Return whether each row is null."""
        return values < 0


class FloatColumn(Column):
    """Numbers, of which NaN is null."""

    def check_raw(self, values: Tensor) -> Tensor:
        """Check numbers."""
        if len(self.shape) == 1 and self.shape[0] == 1 and values.ndim < 2:  # a number per image
            values = values[..., None]
        if values.is_complex():
            raise ValueError(f"expected numbers (got {values.dtype})")
        values = self.check_shape(values).float()
        if bool(values.isinf().any()):
            raise ValueError("numbers must be finite (got infinity)")
        return values

    def null(self, count: int, device: torch.device | None = None) -> Tensor:
        """Return null rows."""
        return torch.full((count, *self.shape), math.nan, device=device)

    def is_null(self, values: Tensor) -> Tensor:
        """Return whether each row is null."""
        return values.isnan().flatten(1).any(1)

    def parse_one(self, value: Any) -> Tensor:
        """Convert a list of numbers."""
        if value is None:
            return self.null(1)[0]
        several = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else [value]
        if not all(isinstance(one, (int, float, np.number)) for one in several) or len(several) != self.shape[0]:
            one = "a number" if self.shape == (1,) else f"{self.shape[0]} numbers"
            raise ValueError(f"expected {one} per image (got {shorten(value)})")
        found = torch.tensor([float(one) for one in several])
        if not bool(found.isfinite().all()):
            raise ValueError(f"numbers must be finite (got {shorten(value)})")
        return found


class FlagsColumn(FloatColumn):
    """Any number of names at once."""

    kind = "flags"
    names: list[str] = Field(min_length=1, max_length=1 << 12, description="names of the flags")

    @property
    def shape(self) -> tuple[int, ...]:
        """A number for each flag."""
        return (len(self.names),)

    def is_one_value(self, value: Any) -> bool:
        """A list of names is one value, and so is a list of 0 and 1."""
        if super().is_one_value(value) or isinstance(value, (set, frozenset)):
            return True
        return all(isinstance(one, (str, int, float, np.number)) for one in value)

    def parse_one(self, value: Any) -> Tensor:
        """Convert the names of the flags that are set, or a number 0 or 1 for each flag."""
        if value is None:
            return self.null(1)[0]
        several = [value] if isinstance(value, str) else list(value)
        if all(isinstance(one, str) for one in several):
            if unknown := [one for one in several if one not in self.names]:
                raise ValueError(f"{unknown[0]!r} is not a flag; allowed are {describe_names(self.names)}")
            return torch.tensor([float(name in several) for name in self.names])
        return self.check_raw(super().parse_one([float(one) for one in several]))

    def check_raw(self, values: Tensor) -> Tensor:
        """Check that flags are 0 or 1."""
        values = super().check_raw(values)
        if bool(((values != 0) & (values != 1) & ~values.isnan()).any()):
            raise ValueError("flags must be 0 or 1")
        return values


class NumberColumn(FloatColumn):
    """One or several numbers, standardised by the training split."""

    kind = "number"
    mean: list[float] = Field(min_length=1, max_length=64, description="mean over the training split")
    std: list[Annotated[float, Field(gt=0)]] = Field(description="standard deviation over the training split")
    low: list[float] = Field(description="smallest values of the training split")
    high: list[float] = Field(description="largest values of the training split")

    @property
    def facts(self) -> tuple[list[float], ...]:
        """What is known of each number in the training split."""
        return self.std, self.low, self.high

    @property
    def shape(self) -> tuple[int, ...]:
        """As many numbers as there are means."""
        return (len(self.mean),)

    def is_one_value(self, value: Any) -> bool:
        """A list of numbers is one value if an image has several numbers."""
        if super().is_one_value(value):
            return True
        return len(self.mean) > 1 and all(isinstance(one, (int, float, np.number)) for one in value)


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

    def is_one_value(self, value: Any) -> bool:
        """A list of numbers is one vector."""
        return super().is_one_value(value) or all(isinstance(one, (int, float, np.number)) for one in value)


class GridColumn(Column):
    """The tokens of another image."""

    kind = "grid"
    grid: Grid = Field(description="shape and vocabulary size of the tokens")
    tokenizer: str = Field("", description="fingerprint of the tokenizer that makes the tokens")

    @property
    def shape(self) -> tuple[int, ...]:
        """The grid's shape."""
        return self.grid.shape

    def is_one_value(self, value: Any) -> bool:
        """Numbers nested as deeply as the grid has axes are one value."""
        depth, inner = 0, value
        while isinstance(inner, (list, tuple)) and len(inner):
            depth, inner = depth + 1, inner[0]
        return value is None or depth + getattr(inner, "ndim", 0) == len(self.shape)

    def parse_one(self, value: Any) -> Tensor:
        """Convert tokens of the grid's shape."""
        return self.null(1)[0] if value is None else self.check_raw(torch.as_tensor(value))

    def check_raw(self, values: Tensor) -> Tensor:
        """Check ids."""
        values = self.check_shape(values)
        if values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(f"expected token ids, which are whole numbers (got {values.dtype})")
        return check_range(values.long(), self.grid.vocab_size)

    def null(self, count: int, device: torch.device | None = None) -> Tensor:
        """Return null rows."""
        return torch.full((count, *self.shape), -1, device=device)

    def is_null(self, values: Tensor) -> Tensor:
        """Return whether all cells of each row are null."""
        return (values < 0).flatten(1).all(1)


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


def conditions_problem(conditions: Mapping[str, Column]) -> Iterator[str]:
    """Yield what is wrong with named columns."""
    if len(conditions) > MAX_COLUMNS:
        yield f"at most {MAX_COLUMNS} columns are possible (got {len(conditions)})"
    for name, column in conditions.items():
        if not NAME.fullmatch(name) or name in (LABEL, "labels"):
            yield f"{name!r} cannot name a column; use letters, digits and _, and not {LABEL!r} or 'labels'"
        if isinstance(column, NumberColumn) and any(len(each) != len(column.mean) for each in column.facts):
            yield f"{name}: mean, std, low and high must have equally many numbers"


def check_range(ids: Tensor, count: int) -> Tensor:
    """Raise `ValueError` for ids outside `[-1, count)`."""
    if ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= count):
        found = f"{int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"ids should lie in [0, {count}), or be -1 for null (got {found})")
    return ids


def describe_names(names: list[str]) -> str:
    """List the first names."""
    return ", ".join(names[:FEW]) + (f", ... ({len(names)} in all)" if len(names) > FEW else "")


def shorten(value: Any) -> str:
    """Return the representation of a value, at most 80 characters long."""
    text = repr(value)
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
    return f"the columns are {', '.join(columns)}" if columns else "this prior has no columns"


def make_condition(
    columns: Mapping[str, Column],
    condition: Mapping[str, Any] | None,
    count: int,
    device: torch.device | None = None,
) -> Condition:
    """Return raw columns for `count` images, null where `condition` has no value. Raises `ValueError` for unknown
    columns, invalid values, and a number of values other than 1 and `count`."""
    given, found = parse_values(columns, condition or {}), {}
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
                f"condition: {name}: got {len(values)} values for {count} images; give one, or one per image"
            )
    return found


def select_rows(condition: Condition, at: Any) -> Condition:
    """Return rows of all columns."""
    return {name: values[at] for name, values in condition.items()}


def append_nulls(columns: Mapping[str, Column], condition: Condition, removed: Iterable[str] | None) -> Condition:
    """Append a copy of all rows, in which the `removed` columns (None: all) are null."""
    found = {}
    for name, values in condition.items():
        null = removed is None or name in removed
        copy = columns[name].null(len(values), values.device) if null else values
        found[name] = torch.cat([values, copy])
    return found


def digest_condition(condition: Condition) -> str:
    """Return the sha256 of raw columns."""
    digest = hashlib.sha256()
    for name, values in sorted(condition.items()):
        values = values.detach().cpu().contiguous()
        values = torch.where(values.isnan(), math.nan, values) if values.is_floating_point() else values
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Encoding -----------------------------------------------------------------------------------------


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

    def repeat(self, copies: int) -> Encoded:
        """Repeat all rows, as `Tensor.repeat` does for labels."""
        every = None if self.map is None else self.map.repeat(copies, 1, 1)
        return Encoded(self.labels.repeat(copies), self.vector.repeat(copies, 1), every)

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


class ConditionEncoder(nn.Module):
    """Encodes raw columns. Grids hear the sum of the other columns, which may move what they show."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        width, columns = config.condition_width, config.conditions
        self.width = width
        self.vectors = nn.ModuleDict(
            {f"column_{name}": make_embedding(one, width) for name, one in columns.items() if one.kind != "grid"}
        )
        self.grids = nn.ModuleDict(
            {
                f"column_{name}": GridEncoder(one.grid, config.positions, width)
                for name, one in columns.items()
                if isinstance(one, GridColumn)
            }
        )

    def reset_parameters(self) -> None:
        """Initialize all columns."""
        for module in (*self.vectors.values(), *self.grids.values()):
            module.reset_parameters()  # type: ignore[operator]

    def forward(self, labels: Tensor, condition: Condition) -> Encoded:
        """Encode `condition`, which has all columns."""
        vectors = [embed(condition[name.removeprefix("column_")]) for name, embed in self.vectors.items()]
        weight = next(self.parameters())
        vector = torch.stack(vectors).sum(0) if vectors else weight.new_zeros(len(labels), self.width)
        maps = [encode(condition[name.removeprefix("column_")], vector) for name, encode in self.grids.items()]
        if not maps:
            return Encoded(labels, vector)
        every = torch.stack(maps).sum(0)
        return Encoded(labels, vector + every.mean(1), every)


def make_embedding(column: Column, width: int) -> nn.Module:
    """Return the embedding of a column's raw values, `(B, ...)` to `(B, width)`."""
    return ClassEmbedding(column, width) if isinstance(column, ClassColumn) else FloatEmbedding(column, width)


class ClassEmbedding(nn.Embedding):
    """A vector for each class; the last is null."""

    def __init__(self, column: ClassColumn, width: int) -> None:
        super().__init__(len(column.names) + 1, width)

    def reset_parameters(self) -> None:
        """Start small, as the embedding of the class does."""
        nn.init.normal_(self.weight, std=STD)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids `(B,)`."""
        return super().forward(ids % self.num_embeddings)  # -1 is the last


class Constants(nn.Module):
    """A module whose buffers never have less than 32 bits: years, for example, need more than bfloat16."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, before[name].to(buffer.device))
        return self


class FloatEmbedding(Constants):
    """Two layers over the numbers of a column and whether each is given. Numbers are standardised, limited to six
    standard deviations, and accompanied by four octaves of sine and cosine."""

    shift: Tensor
    scale: Tensor
    octaves: Tensor

    def __init__(self, column: Any, width: int) -> None:
        super().__init__()
        size = column.shape[0]
        mean, std = [0.0] * size, [1.0] * size
        if column.kind == "number":
            mean, std = column.mean, column.std
        elif column.kind == "vector":
            std = [column.scale] * size
        self.waves = column.kind == "number"
        self.register_buffer("shift", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("scale", torch.tensor(std, dtype=torch.float32), persistent=False)
        self.register_buffer("octaves", 2.0 ** torch.arange(OCTAVES), persistent=False)
        self.first = nn.Linear(size * (2 + 2 * OCTAVES * self.waves), width)
        self.second = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start small, as the embedding of the class does."""
        self.first.reset_parameters()
        nn.init.normal_(self.second.weight, std=STD)
        nn.init.zeros_(self.second.bias)

    def forward(self, values: Tensor) -> Tensor:
        """Embed `(B, size)`."""
        weight = self.first.weight
        given = ~values.isnan()
        x = ((values - self.shift) / self.scale).clamp(-CLAMP, CLAMP).to(at_least_float32(weight).dtype)
        x = torch.where(given, x, 0)
        features = [x, given]
        if self.waves:
            angles = (x[..., None] * self.octaves).flatten(1)
            masks = given[..., None].expand(-1, -1, OCTAVES).flatten(1)
            features += [angles.sin() * masks, angles.cos() * masks]
        return self.second(F.silu(self.first(torch.cat([each.to(weight.dtype) for each in features], 1))))


class GridEncoder(nn.Module):
    """Embeds the ids of another image, lays them over the prior's positions, and lets them see one another and the
    vector in one bidirectional transformer block.

    If the prior's sides divide the other grid's, the cells under a position are joined by a linear layer; otherwise
    cells are averaged by area, or repeated. Grids with different numbers of axes are laid over one another as
    sequences.
    """

    cells: Tensor
    offsets: Tensor

    def __init__(self, grid: TokenGrid, target: TokenGrid, width: int) -> None:
        from .transformer import Block, Rotations, coordinates

        super().__init__()
        self.vocab_size = grid.vocab_size
        self.register_buffer("cells", grid.cells, persistent=False)
        self.embedding = nn.Embedding(grid.ids_per_position * (grid.vocab_size + 1), width)  # the last id is null
        offsets = torch.arange(grid.ids_per_position, device="cpu") * (grid.vocab_size + 1)
        self.register_buffer("offsets", offsets, persistent=False)
        self.sources: tuple[tuple[int, ...], ...] = grid.scales or (grid.positions.shape,)
        shape: tuple[int, ...] = target.scales[-1] if target.scales else target.shape
        if any(len(sides) != len(shape) for sides in self.sources):
            self.sources, shape = tuple((math.prod(sides),) for sides in self.sources), (math.prod(shape),)
        self.shape = shape
        self.folds = [fold_factors(sides, shape) for sides in self.sources]
        self.joins: Any = nn.ModuleList(nn.Linear(math.prod(fold) * width, width, bias=False) for fold in self.folds)
        self.resizes: Any = nn.ModuleList(
            AreaResize([side // factor for side, factor in zip(sides, fold, strict=True)], shape)
            for sides, fold in zip(self.sources, self.folds, strict=True)
        )
        self.scales: Any = nn.ModuleList(AreaResize(shape, sides) for sides in target.scales)
        self.hear = nn.Linear(width, width, bias=False)
        heads = next(count for count in (4, 2, 1) if width % (2 * count) == 0)
        sizes: Any = SimpleNamespace(
            dim=width, heads=heads, hidden=None, dropout=0.0, attention_dropout=0.0, rope_base=100.0
        )
        self.block = Block(sizes, causal=False)
        self.rotations = Rotations(sizes, coordinates(shape))
        self.norm = nn.RMSNorm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with features of size 1, which are worth more than the class."""
        nn.init.normal_(self.embedding.weight)
        for layer in (*self.joins, self.hear, self.block.qkv, self.block.project, self.block.gate_up, self.block.down):
            nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, vector: Tensor) -> Tensor:
        """Encode tokens `(B, *grid.shape)`, given the vector `(B, width)`: `(B, P, width)`."""
        ids = tokens.flatten(1)[:, self.cells]
        embedded = self.embedding(torch.where(ids < 0, self.vocab_size, ids) + self.offsets).sum(2)
        parts = embedded.split([math.prod(sides) for sides in self.sources], 1)
        layers = zip(parts, self.sources, self.folds, self.joins, self.resizes, strict=True)
        x = sum(resize(join(fold(part.unflatten(1, sides), by))) for part, sides, by, join, resize in layers)
        x = x.flatten(1, -2) + self.hear(vector)[:, None]
        x = self.norm(self.block(x, self.rotations.table[:, None].expand(-1, 2, -1, -1)))
        if not len(self.scales):
            return x
        whole = x.unflatten(1, self.shape)
        return torch.cat([resize(whole).flatten(1, -2) for resize in self.scales], 1)


def fold_factors(sides: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many cells of a grid lie under one position along each axis; 1 if they are not whole."""
    whole = all(side % target == 0 for side, target in zip(sides, shape, strict=True))
    return tuple(side // target if whole else 1 for side, target in zip(sides, shape, strict=True))


def fold(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Join neighbouring cells: `(B, *sides, C)` to `(B, *(sides / factors), C * product of factors)`."""
    if math.prod(factors) == 1:
        return x
    for axis, factor in enumerate(factors):
        x = x.unflatten(1 + 2 * axis, (-1, factor))
    outer, inner = range(1, 2 * len(factors), 2), range(2, 2 * len(factors) + 1, 2)
    return x.permute(0, *outer, *inner, x.ndim - 1).flatten(1 + len(factors))


class AreaResize(Constants):
    """Resizes maps `(B, *sides, C)` to `(B, *shape, C)`: each cell is the mean of the area that it covers."""

    def __init__(self, sides: Iterable[int], shape: Iterable[int]) -> None:
        super().__init__()
        self.names = []
        for axis, (side, target) in enumerate(zip(sides, shape, strict=True)):
            if side != target:
                self.register_buffer(f"axis_{axis}", area_matrix(target, side), persistent=False)
                self.names.append((axis, f"axis_{axis}"))

    def forward(self, x: Tensor) -> Tensor:
        """Resize along each axis by a matrix product, which is deterministic on a GPU, too."""
        for axis, name in self.names:
            x = torch.tensordot(getattr(self, name).to(x.dtype), x, ([1], [1 + axis])).movedim(0, 1 + axis)
        return x


# In models ----------------------------------------------------------------------------------------


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
