"""Encodes the raw columns of `prior.conditions`: a vector per image and, with grids, a vector per position of the
prior's grid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.base import TokenGrid
from tokenizer.precision import Constants, at_least_float32
from tokenizer.scales import area_matrix

from .conditions import ClassColumn, Column, Condition, Encoded, GridColumn

if TYPE_CHECKING:
    from .base import PriorConfig

CLAMP = 6.0  # standard deviations of a number
OCTAVES = 4
STD = 0.02  # of the encoding of a vector column at the start of training, as of a class embedding
MAP = 0.25  # of the features of a grid at the start of training; 1 costs 0.03 to 0.3 bits after 300 steps


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
        from .transformer import EPS, Block, Rotations, coordinates

        super().__init__()
        self.vocab_size = grid.vocab_size
        self.register_buffer("cells", grid.cells, persistent=False)
        self.embedding = nn.Embedding(grid.ids_per_position * (grid.vocab_size + 1), width)  # the last id is null
        offsets = torch.arange(grid.ids_per_position, device="cpu") * (grid.vocab_size + 1)
        self.register_buffer("offsets", offsets, persistent=False)
        self.sources: tuple[tuple[int, ...], ...] = grid.scales or (grid.positions.shape,)
        shape: tuple[int, ...] = target.scales[-1] if target.scales else target.shape
        scales: tuple[tuple[int, ...], ...] = target.scales
        if any(len(sides) != len(shape) for sides in self.sources):
            self.sources, scales = (tuple((math.prod(sides),) for sides in each) for each in (self.sources, scales))
            shape = (math.prod(shape),)
        self.shape = shape
        self.folds = [fold_factors(sides, shape) for sides in self.sources]
        self.joins: Any = nn.ModuleList(nn.Linear(math.prod(fold) * width, width, bias=False) for fold in self.folds)
        self.resizes: Any = nn.ModuleList(
            AreaResize([side // factor for side, factor in zip(sides, fold, strict=True)], shape)
            for sides, fold in zip(self.sources, self.folds, strict=True)
        )
        self.scales: Any = nn.ModuleList(AreaResize(shape, sides) for sides in scales)
        self.hear = nn.Linear(width, width, bias=False)
        heads = next(count for count in (4, 2, 1) if width % (2 * count) == 0)
        sizes: Any = SimpleNamespace(
            dim=width, heads=heads, hidden=None, dropout=0.0, attention_dropout=0.0, rope_base=100.0
        )
        self.block = Block(sizes, causal=False)
        self.rotations = Rotations(sizes, coordinates(shape))
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with features of size `MAP`, whatever the size of the embeddings."""
        nn.init.normal_(self.embedding.weight)
        nn.init.constant_(self.norm.weight, MAP)
        for layer in (*self.joins, self.hear, self.block.qkv, self.block.project, self.block.gate_up, self.block.down):
            nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, vector: Tensor) -> Tensor:
        """Encode tokens `(B, *grid.shape)`, given the vector `(B, width)`: `(B, P, width)`."""
        ids = tokens.flatten(1)[:, self.cells]
        embedded = self.embedding(torch.where(ids < 0, self.vocab_size, ids) + self.offsets).sum(2)
        parts = embedded.split([math.prod(sides) for sides in self.sources], 1)
        layers = zip(parts, self.sources, self.folds, self.joins, self.resizes, strict=True)
        x = sum(resize(join(fold(part.unflatten(1, sides), by))) for part, sides, by, join, resize in layers)
        x = (x.flatten(1, -2) + self.hear(vector)[:, None]).to(embedded.dtype)  # not autocast's, as norms expect
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
