"""Colour palette (ImageGPT, Chen et al. 2020): a pixel's id is the nearest of 512 colours, which k-means fits to the
training images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .base import Reconstruction, TokenGrid, Tokenizer, TokenizerConfig
from .files import ConfigError
from .precision import full_float32
from .quantizers.codebook import nearest_codes, rows_of


class PaletteConfig(TokenizerConfig):
    colors: int = Field(512, ge=2, le=1 << 16, description="size of the palette")
    iterations: int = Field(50, ge=0, description="maximum number of k-means steps; stops early when no colour moves")
    seed: int = Field(0, ge=0, description="seed of the initial colours")

    def check(self) -> Iterator[str]:
        yield from super().check()
        yield from self.check_picture("palette", alpha=True)


class Palette(Tokenizer, name="palette"):
    """Maps each pixel to the nearest colour of `table`, (colors, C), sorted from dark to light. Before `initialize` the
    table is a regular lattice. There is no pixel likelihood."""

    Config = PaletteConfig
    resizable = True
    halo = 0
    table: Tensor

    def __init__(self, config: PaletteConfig) -> None:
        super().__init__(config)
        height, width = config.image_size
        self.grid = TokenGrid((height, width), config.colors)
        self.register_buffer("table", lattice(config.colors, config.channels))

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Fit the palette to `images` `(B, C, H, W)`. Raises `ConfigError` if they have too few colours."""
        self.spec.check(images)
        points, counts = distinct_colors(images)
        if len(points) < self.config.colors:
            raise ConfigError(
                f"palette: colors: must be at most {len(points)}, the number of colours in {len(images)} training "
                f"images (got {self.config.colors})"
            )
        colors = weighted_kmeans(points, counts, self.config.colors, self.config.iterations, self.config.seed)
        self.table.copy_(colors[colors.sum(1).argsort(stable=True)])

    def encode(self, images: Tensor) -> Tensor:
        self.spec.check(images)
        with full_float32(), torch.autocast(images.device.type, enabled=False):  # to distinguish similar colours
            ids = nearest_codes(rows_of(images.float()), self.table.float())
        return ids.reshape(images.shape[0], *self.grid.shape)

    def decode(self, tokens: Tensor) -> Tensor:
        self.grid.check(tokens)
        return F.embedding(tokens.long(), self.table).movedim(-1, 1).float().clamp(-1, 1)

    def forward(self, images: Tensor) -> Reconstruction:
        tokens = self.encode(images)
        return Reconstruction(self.decode(tokens), tokens, {})


def lattice(count: int, channels: int) -> Tensor:
    """Return distinct colours `(count, channels)` in [-1, 1], evenly from the smallest regular grid that has enough."""
    side = next(side for side in range(2, count + 1) if side**channels >= count)
    axes = torch.linspace(-1, 1, side).expand(channels, side)
    points = torch.cartesian_prod(*axes).reshape(-1, channels)
    return points[torch.arange(count) * (len(points) - 1) // (count - 1)]


def distinct_colors(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct 8-bit colours of `images`, (n, C) in [-1, 1], and their counts `(n,)` float64."""
    values = ((rows_of(images.float().cpu()) + 1) * 127.5).round().long()
    places = 256 ** torch.arange(values.shape[1])
    codes, counts = (values * places).sum(1).unique(return_counts=True)
    return codes.unsqueeze(1) // places % 256 / 127.5 - 1, counts.double()


def weighted_kmeans(points: Tensor, counts: Tensor, clusters: int, iterations: int, seed: int) -> Tensor:
    """Run Lloyd's algorithm on distinct `points` (n, C) with `counts` (n,); return the centres (clusters, C).

    The centre of an empty cluster moves to the point with the largest error, also after the last step. All centres are
    therefore distinct: the second of two equal centres would have an empty cluster.
    """
    centres = kmeans_plus_plus(points, counts, clusters, torch.Generator().manual_seed(seed % (1 << 63)))
    for step in range(iterations + 1):
        ids = nearest_codes(points, centres)
        unused = torch.bincount(ids, minlength=clusters) == 0
        if bool(unused.any()):
            errors = (points - centres[ids]).square().sum(1) * counts
            centres[unused] = points[errors.topk(int(unused.sum())).indices]
        elif step < iterations:
            before, centres = centres, means(points, counts, ids, clusters)
            if torch.equal(centres, before):
                break
    return centres


def means(points: Tensor, counts: Tensor, ids: Tensor, clusters: int) -> Tensor:
    """Return the mean of each cluster, (clusters, C), summed in float64. No cluster may be empty."""
    totals = torch.bincount(ids, counts, minlength=clusters)
    sums = [torch.bincount(ids, counts * column, minlength=clusters) for column in points.unbind(1)]
    return (torch.stack(sums, 1) / totals.unsqueeze(1)).to(points.dtype)


def kmeans_plus_plus(points: Tensor, counts: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Draw distinct points (clusters, C) by k-means++ (Arthur & Vassilvitskii 2007): the probability of a point is
    proportional to its count times its squared distance to the points already drawn."""
    columns = points.t().contiguous()
    chosen: list[Tensor] = []
    weights, distances = counts, torch.full_like(columns[0], torch.inf)
    for draw in torch.rand(clusters, dtype=torch.float64, generator=generator):
        cumulated = weights.cumsum(0)
        chosen.append(points[torch.searchsorted(cumulated, draw * cumulated[-1], right=True)])
        distances = torch.minimum(distances, (columns - chosen[-1].unsqueeze(1)).square().sum(0))
        weights = counts * distances
    return torch.stack(chosen)
