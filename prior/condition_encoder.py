"""Encodes what is given: raw rows of columns become a vector per image and, with grids, a vector per position of the
prior's grid. A model adds `ConditionEmbedding` where it adds the embedding of the class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.base import TokenGrid
from tokenizer.precision import Constants, at_least_float32
from tokenizer.scales import area_matrix

from .attention import EPS, Block, Rotations, coordinates

if TYPE_CHECKING:
    from .config import PriorConfig
    from .given import Given

CLAMP = 6.0  # standard deviations of a number
OCTAVES = 4
STD = 0.02  # of the encoding of a vector column at the start of training, as of a class embedding
MAP = 0.25  # of the features of a grid at the start of training; 1 costs 0.03 to 0.3 bits after 300 steps


@dataclass
class Encoded:
    """Classes and encoded columns of a batch, as networks receive them; only a `Given` is set to null."""

    labels: Tensor  # (B,) from 0 to `num_classes`, which is the null class
    vector: Tensor | None = None  # (B, width): the sum of all columns, with the means of grids; None without columns
    map: Tensor | None = None  # (B, P, width) for the prior's positions in raster order; None without grids

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: Any) -> Encoded:
        return Encoded(*(None if part is None else part[at] for part in self.parts))  # type: ignore[arg-type]

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.labels, self.vector, self.map

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def positions(self) -> Tensor:
        """`(B, 1 or P, width)`: the vector of each position."""
        assert self.vector is not None
        return self.vector[:, None] if self.map is None else self.vector[:, None] + self.map

    def join(self, other: Encoded) -> Encoded:
        pairs = zip(self.parts, other.parts, strict=True)
        joined = (None if one is None or two is None else torch.cat([one, two]) for one, two in pairs)
        return Encoded(*joined)  # type: ignore[arg-type]


class ConditionEncoder(nn.Module):
    """Encodes all columns but the class. Grids receive the sum of the other columns, which may shift their features."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.width = config.condition_width
        self.vectors, self.grids = nn.ModuleDict(), nn.ModuleDict()
        for name, column in sorted(config.conditions.items(), key=lambda each: each[1].is_map):
            part = self.grids if column.is_map else self.vectors
            part[f"column_{name}"] = column.embedding(self.width, config.positions)

    def reset_parameters(self) -> None:
        for module in (*self.vectors.values(), *self.grids.values()):
            module.reset_parameters()  # type: ignore[operator]

    def networks(self) -> dict[str, nn.Module]:
        parts = {**self.vectors, **self.grids}
        return {name.removeprefix("column_"): module for name, module in parts.items()}

    def forward(self, given: Given) -> tuple[Tensor, Tensor | None]:
        weight = next(self.parameters())
        raw = {name: given.raw(name.removeprefix("column_"), weight.device) for name in (*self.vectors, *self.grids)}
        vectors = [embed(raw[name]) for name, embed in self.vectors.items()]
        vector = torch.stack(vectors).sum(0) if vectors else weight.new_zeros(len(given), self.width)
        maps = [encode(raw[name], vector) for name, encode in self.grids.items()]
        if not maps:
            return vector, None
        every = torch.stack(maps).sum(0)
        return vector + every.mean(1), every


# Columns ------------------------------------------------------------------------------------------


class ClassEmbedding(nn.Embedding):
    """A vector for each of `count` classes; the last is null."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count + 1, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=STD)

    def remove_effect(self) -> None:
        """Encode everything as zero."""
        nn.init.zeros_(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids % self.num_embeddings)  # -1 is the last


Features = Callable[[Tensor, torch.dtype], list[Tensor]]
"""Computes features of raw numbers `(B, size)`, each `(B, n)`, in this type or bool."""


class Standardized(Constants):
    """The features of numbers: standardised and limited to six standard deviations, 0 where null; whether each is
    given; with `waves`, also four octaves of sine and cosine."""

    shift: Tensor
    scale: Tensor
    octaves: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, waves: bool = False) -> None:
        super().__init__()
        self.waves, self.size = waves, len(mean) * (2 + 2 * OCTAVES * waves)
        self.register_buffer("shift", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("scale", torch.tensor(std, dtype=torch.float32), persistent=False)
        self.register_buffer("octaves", 2.0 ** torch.arange(OCTAVES), persistent=False)

    def forward(self, values: Tensor, dtype: torch.dtype) -> list[Tensor]:
        given = ~values.isnan()
        x = ((values - self.shift) / self.scale).clamp(-CLAMP, CLAMP).to(dtype)
        x = torch.where(given, x, 0)
        if not self.waves:
            return [x, given]
        angles = (x[..., None] * self.octaves).flatten(1)
        masks = given[..., None].expand(-1, -1, OCTAVES).flatten(1)
        return [x, given, angles.sin() * masks, angles.cos() * masks]


def embed_standardized(mean: Sequence[float], std: Sequence[float], width: int, *, waves: bool = False) -> nn.Module:
    features = Standardized(mean, std, waves=waves)
    return FloatEmbedding(features, features.size, width)


class FloatEmbedding(nn.Module):
    """Two layers over `size` features of numbers."""

    def __init__(self, features: Features, size: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.first = nn.Linear(size, width)
        self.second = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.first.reset_parameters()
        nn.init.normal_(self.second.weight, std=STD)
        nn.init.zeros_(self.second.bias)

    def remove_effect(self) -> None:
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, values: Tensor) -> Tensor:
        weight = self.first.weight
        features = self.features(values, at_least_float32(weight).dtype)
        return self.second(F.silu(self.first(torch.cat([each.to(weight.dtype) for each in features], 1))))


class GridEncoder(nn.Module):
    """Embeds the ids of another image, lays them over the prior's positions, and lets them see one another and the
    vector in one bidirectional transformer block.

    If the prior's sides divide the other grid's, the cells under a position are joined by a linear layer; otherwise
    cells are averaged by area, or repeated. Grids with different numbers of axes are laid over one another as
    sequences."""

    cells: Tensor
    offsets: Tensor

    def __init__(self, grid: TokenGrid, target: TokenGrid, width: int) -> None:
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

    def remove_effect(self) -> None:
        nn.init.zeros_(self.norm.weight)

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


# In models ----------------------------------------------------------------------------------------


class ColumnProjection(nn.Linear):
    """Maps encoded columns to a model's width, and keeps their size at the start of training."""

    def __init__(self, config: PriorConfig, size: int) -> None:
        super().__init__(config.condition_width, size, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


class ConditionEmbedding(nn.Embedding):
    """An embedding of the class, whose last row is the null class, plus projections of encoded columns."""

    def __init__(self, config: PriorConfig, size: int) -> None:
        super().__init__(config.num_classes + 1, size)
        self.columns = ColumnProjection(config, size) if config.conditions else None

    def forward(self, encoded: Encoded) -> Tensor:  # type: ignore[override]
        """Return the embedding of each image, `(B, size)`."""
        x = super().forward(encoded.labels)
        return x if self.columns is None else x + self.columns(encoded.vector)

    def at_positions(self, encoded: Encoded, order: Tensor | None = None) -> Tensor:
        """Return the embedding at each position, `(B, 1 or P, size)`, in raster or this order `([B,] P)`."""
        x = super().forward(encoded.labels)[:, None]
        if self.columns is None:
            return x
        x = x + self.columns(encoded.positions)
        return x if order is None or encoded.map is None else x.take_along_dim(order.expand(x.shape[:2])[..., None], 1)

    def on_map(self, encoded: Encoded, width: int) -> Tensor:
        """Return the embedding on a map of this width, `(B, H, W, size)`, or `(B, 1, 1, size)` without grids."""
        x = self.at_positions(encoded)
        return x.unflatten(1, (-1, width)) if x.shape[1] > 1 else x[:, :, None]
