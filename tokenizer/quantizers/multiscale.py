"""Multi-scale residual quantization (VAR, Tian et al. 2024, algorithms 1 and 2): maps of ids of several sizes, coarse
to fine; each quantizes the residual that the coarser maps leave.

There are two differences from the paper. Each scale is divided by its running root mean square before the search;
otherwise nearly all vectors at 1x1, where residuals are small, share one or two codes of the common codebook. By
default there are no convolutions `phi`.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import ModelConfig
from ..files import ConfigError
from ..precision import full_float32
from ..scales import Resize, Scales, areas, by, scales_problem
from .base import Quantized, Quantizer, QuantizerNode
from .codebook import Codebook, first_rows, map_of, nearest_codes, overpay, rows_of, squared_distances
from .ema import EMAConfig
from .gradients import pass_gradient
from .price import MEASURED, Price
from .updates import SelfUpdating, mean_over_ranks

BOOKS = ("bsq", "ema", "fsq", "lfq", "simvq", "vq")
ROUNDS = 2  # of k-means over residuals of actual codes, after one round that assumes perfect codes
PAIR = r"[1-9]\d{0,2}x[1-9]\d{0,2}"
DECAY = 0.9  # of the running means, per training batch, if the codebook has no decay


class MultiScaleConfig(ModelConfig):
    scales: tuple[Annotated[int, Field(ge=1, le=256)] | str, ...] = Field(
        (1, 2, 4, 7), min_length=1, description="sides or HEIGHTxWIDTH of the maps, up to the size of the latents"
    )
    book: QuantizerNode = Field(EMAConfig(), description=f"the common codebook, one of {', '.join(BOOKS)}")
    rms: bool = Field(True, description="divide each scale by its running root mean square, to use all codes")
    center: bool = Field(True, description="subtract the running mean of latents before the first scale")
    phi: int = Field(0, ge=0, le=64, description="smoothing convolutions, shared by neighbouring scales (VAR: 4)")
    truncate: float = Field(
        0.0, ge=0, le=1, description="share of training images without their last scales, to decode coarse scales alone"
    )

    @property
    def sides(self) -> Scales:
        """(height, width) of each scale."""
        pairs = [f"{scale}x{scale}" if isinstance(scale, int) else scale for scale in self.scales]
        return tuple((int(height), int(width)) for height, _, width in (pair.partition("x") for pair in pairs))

    def check(self) -> Iterator[str]:
        if invalid := [pair for pair in self.scales if isinstance(pair, str) and not re.fullmatch(PAIR, pair)]:
            yield f"scales: a size must be a side or HEIGHTxWIDTH, such as 4 or 3x4 (got {invalid[0]!r})"
        elif problem := scales_problem(self.sides):
            yield f"scales: {problem}"
        book: Any = self.book
        if book.kind not in BOOKS:
            yield f"book: must be one of {', '.join(BOOKS)} (got {book.kind!r})"
        elif getattr(book, "normalize", False):
            yield "book.normalize: must be false, because the length of residuals has to be quantized too"
        elif book.kind in ("lfq", "bsq") and book.levels > 1:
            yield f"book.levels: must be 1, because a position of a scale has one id (got {book.levels})"


class Descent(NamedTuple):
    """Results of a pass over the scales, with one list entry per scale: residuals `(B, dim, h, w)` before the division
    by `sigma`; ids `(B, h, w)`; sums of codes so far `(B, dim, H, W)`; and further losses of the codebook."""

    residuals: list[Tensor]
    tokens: list[Tensor]
    sums: list[Tensor]
    losses: list[dict[str, Tensor]]


class MultiScale(SelfUpdating, Quantizer, name="multiscale"):
    """The grid `(L,)` concatenates the scales, each in raster order. z_q is the sum of the upsampled codes of all
    scales.

    The losses `commitment` and, if codes or convolutions are learned, `codebook` are computed for every partial sum and
    averaged over scales.
    """

    Config = MultiScaleConfig
    shares: Tensor  # (scales,) area of each scale in that of the last
    mean: Tensor  # (dim,) running mean of the latents, the first term of the sum; zero without `center`
    squares: Tensor  # (scales,) running mean square of each scale's residuals
    left: Tensor  # (scales,) running share of the latents' variance that remains after each scale

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__(config)
        kind: Any = Quantizer.find(config.book.kind)
        rate = getattr(config.book, "rate", 0.0)
        self.book: Any = kind(config.book.model_copy(update={"rate": 0.0}) if rate else config.book)
        self.searches_codes = isinstance(self.book, Codebook)
        self.scales, self.vocab_size, self.dim = config.sides, self.book.vocab_size, self.book.dim
        self.resize = Resize(self.scales)
        self.price = Price(rate, self.vocab_size, tuple(areas(self.scales))) if rate else None
        self.phis = nn.ModuleList(nn.Conv2d(self.dim, self.dim, 3, padding=1) for _ in range(config.phi))
        shares = torch.tensor(areas(self.scales)) / math.prod(self.scales[-1])
        self.register_buffer("shares", shares, persistent=False)
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("squares", torch.ones(len(self.scales)))
        self.register_buffer("left", torch.ones(len(self.scales)))
        self.decay = getattr(config.book, "decay", DECAY)
        self.learned = any(parameter.requires_grad for parameter in self.parameters())

    @property
    def loss_weights(self) -> dict[str, float]:
        others = {k: v for k, v in self.book.loss_weights.items() if k not in ("commitment", "codebook")}
        learned = {"codebook": 1.0} if self.learned else {}
        return {"commitment": getattr(self.config.book, "beta", 0.25), **learned, **others}

    @property
    def figures(self) -> dict[str, Tensor]:
        """The share of the latents' variance that remains after each scale: `left_1x1`, `left_2x2`, ..."""
        return {f"left_{by(sides)}": share for sides, share in zip(self.scales, self.left, strict=True)}

    def grid_shape(self, height: int, width: int) -> tuple[int, ...]:
        if self.scales[-1] != (height, width):
            size, scales = by((height, width)), ", ".join(map(by, self.scales))
            raise ConfigError(f"quantizer.scales: must end with the latents' size {size} (got {scales})")
        return (sum(areas(self.scales)),)

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        return self.lookup_scales(tokens, len(self.scales))

    def lookup_scales(self, tokens: Tensor, count: int) -> Tensor:
        if not 1 <= count <= len(self.scales):
            raise ValueError(f"count should be 1 to {len(self.scales)}, the number of scales (got {count})")
        with full_float32(), torch.autocast(tokens.device.type, enabled=False):
            table, sigma, total = self._table(), self.sigma(), self.mean[:, None, None]
            for k, ids in enumerate(list(self.resize.split(tokens))[:count]):
                total = total + self._added(self._codes(ids, table), k, sigma)
        return total

    def sigma(self) -> Tensor:
        """Return the divisor of each scale's residuals, (scales,); ones without `rms`."""
        return self.squares.clamp(min=1e-12).sqrt()

    def _table(self) -> Tensor | None:
        return self.book.table() if isinstance(self.book, Codebook) else None

    def _codes(self, ids: Tensor, table: Tensor | None) -> Tensor:
        """Look up `(B, dim, h, w)` for `ids` `(B, h, w)`. Bits become +1 and -1, because codes of length 1 would be too
        short."""
        if table is None:
            return self.book.lookup_checked(ids) / getattr(self.book, "size", 1.0)
        return F.embedding(ids, table).movedim(-1, 1)

    def _added(self, codes: Tensor, k: int, sigma: Tensor) -> Tensor:
        """Return the contribution of scale `k` to the sum, `(B, dim, H, W)`, given its codes `(B, dim, h, w)`."""
        up = self.resize.up(codes * sigma[k], k)
        return up.lerp(self.phis[self._phi_of(k)](up), 0.5) if self.phis else up

    def _phi_of(self, k: int) -> int:
        """Return the index of the convolution nearest to scale `k`, both spread evenly over [0, 1]. Four convolutions
        are spread slightly wider, as in VAR."""
        margin = 1 / (3 if len(self.phis) == 4 else 2) / len(self.phis)
        ticks = torch.linspace(margin, 1 - margin, len(self.phis), dtype=torch.float64, device="cpu")
        return int((ticks - k / max(1, len(self.scales) - 1)).abs().argmin())

    def _quantize(self, z: Tensor) -> Quantized:
        recorded = self.may_record(z.detach())
        found = self._descend(z)
        kind = getattr(self.config.book, "gradient", "straight_through")
        z_q = pass_gradient(kind, rows_of(z), rows_of(self._truncate(found.sums)))
        if recorded:
            self._record(z.detach(), found)
        tokens = torch.cat([ids.flatten(1) for ids in found.tokens], 1)
        return Quantized(map_of(z_q, z), tokens, self._losses(z, found))

    @torch.no_grad()
    def _nearest_distances(self, z: Tensor) -> Tensor:
        """Return the squared distances of vectors of some images to what the nearest codes of all scales add up to."""
        count = -(-MEASURED // math.prod(self.scales[-1]))
        some = first_rows(z.flatten(1), count, self.config.book.seed).view(-1, *z.shape[1:])
        return (some - self._descend(some, priced=False).sums[-1]).square().sum(1).flatten()

    def _scaled_prices(self, price: Price, sigma: Tensor) -> Tensor:
        """Return the prices of each scale's codes, `(scales, codes)`, in units of squared distances of vectors of this
        scale, each of which stands for the vectors of an area of the full size."""
        return price.of_codes() * (self.shares / sigma.square()).unsqueeze(1)

    def _descend(self, z: Tensor, priced: bool = True) -> Descent:
        """Quantize `z` `(B, dim, H, W)` scale by scale. Gradients flow from residuals to `z`, and from sums to
        parameters. priced: False chooses the nearest codes."""
        if tuple(z.shape[2:]) != self.scales[-1]:
            raise ValueError(f"z should have the last scale's size {by(self.scales[-1])}, got {by(z.shape[2:])}")
        found, total = Descent([], [], [], []), self.mean[:, None, None].expand_as(z)
        table, sigma = self._table(), self.sigma()
        prices = self._scaled_prices(self.price, sigma) if priced and self.price is not None else None
        for k in range(len(self.scales)):
            rest = self.resize.down(z - total.detach(), k)
            ids, losses = self._search(rest / sigma[k], table, None if prices is None else prices[k])
            total = total + self._added(self._codes(ids, table), k, sigma)
            for results, new in zip(found, (rest, ids, total, losses), strict=True):
                results.append(new)  # type: ignore[attr-defined]
        return found

    def _search(self, vectors: Tensor, table: Tensor | None, prices: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the ids `(B, h, w)` of `vectors` `(B, dim, h, w)`, and the codebook's losses but the commitment."""
        if table is None:
            found = self.book.quantize(vectors)
            return found.tokens, {k: v for k, v in found.losses.items() if k != "commitment"}
        ids = nearest_codes(rows_of(vectors.detach()), table.detach(), prices)
        return ids.reshape(vectors.shape[0], *vectors.shape[2:]), {}

    @torch.no_grad()
    def distances(self, z: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """See `Quantizer`. The places must be those of one scale; a vector of it stands for an area of the full
        size."""
        starts = [0, *accumulate(areas(self.scales))]
        k = bisect(starts, int(places[0])) - 1
        with full_float32():
            done = self.lookup_scales(tokens, k) if k else self.mean[:, None, None]
            sigma = self.sigma()[k]
            rest = self.resize.down(z.float() - done, k) / sigma
            area = math.prod(self.scales[-1]) / math.prod(self.scales[k])
            rows = rest.flatten(2).mT[:, places - starts[k]]
            return squared_distances(rows, self.book.table()) * sigma.square() * area

    def _truncate(self, sums: list[Tensor]) -> Tensor:
        """Return the decoder's input: the last of `sums`, or an earlier one for a random share of training images."""
        if not (self.training and self.config.truncate and len(sums) > 1):
            return sums[-1]
        count, last = len(sums[0]), len(sums) - 1
        cut = torch.rand(count, device="cpu") < self.config.truncate
        chosen = torch.where(cut, torch.randint(last, (count,), device="cpu"), last).to(sums[0].device)
        return torch.stack(sums, 1)[torch.arange(count, device=chosen.device), chosen]

    def _losses(self, z: Tensor, found: Descent) -> dict[str, Tensor]:
        parts = []
        for total, more in zip(found.sums, found.losses, strict=True):
            learned = {"codebook": F.mse_loss(total, z.detach())} if self.learned else {}
            parts.append({"commitment": F.mse_loss(z, total.detach()), **learned, **more})
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    # Running means and the first codebook

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        if self.config.center:
            self.mean.copy_(mean_over_ranks(z.mean((0, 2, 3))))
        self._start(self._perfect(z))
        for _ in range(ROUNDS):
            self._start(self._descend(z).residuals)

    def _perfect(self, z: Tensor) -> list[Tensor]:
        """Return the residuals `(B, dim, h, w)` of each scale of `z`, assuming that every vector is a code."""
        rests, total = [], self.mean[:, None, None].expand_as(z)
        for k in range(len(self.scales)):
            rests.append(self.resize.down(z - total, k))
            total = total + self.resize.up(rests[-1], k)
        return rests

    def _start(self, rests: list[Tensor]) -> None:
        """Set each scale's root mean square, and fit the codebook to equally many normalised residuals of each scale,
        or all of a smaller scale. (Duplicate vectors would tie between two centres.)"""
        if self.config.rms:
            self.squares.copy_(mean_over_ranks(torch.stack([rest.square().mean() for rest in rests])))
        if not isinstance(self.book, Codebook):
            return
        each, taken = -(-sum(areas(self.scales)) // len(rests)), []
        for rest, sigma in zip(rests, self.sigma(), strict=True):
            rows = rest.flatten(2) / sigma
            count = min(each, rows.shape[2])
            taken.append(rows[..., torch.arange(count, device=rows.device) * rows.shape[2] // count])
        self.book.start(torch.cat(taken, 2).transpose(1, 2).flatten(0, 1))

    @torch.no_grad()
    def _record(self, z: Tensor, found: Descent) -> None:
        """Record per-image statistics and, for a learned table, the vectors of all scales."""
        squares = [rest.detach().square().flatten(1).mean(1) for rest in found.residuals]
        errors = [(z - total.detach()).square().flatten(1).mean(1) for total in found.sums]
        power, means = z.flatten(2).square().mean((1, 2)), z.flatten(2).mean(2)
        self.record(torch.cat([torch.stack([*squares, *errors, power], 1), means], 1))
        if isinstance(self.book, Codebook):
            sigma = self.sigma()
            rows = [(rest.detach() / sigma[k]).flatten(2) for k, rest in enumerate(found.residuals)]
            vectors = torch.cat(rows, 2).transpose(1, 2)
            ids = torch.cat([part.flatten(1) for part in found.tokens], 1)
            parts = [vectors.flatten(0, 1), ids.flatten()]
            if self.price is not None:
                codes, sizes = self.book.table()[ids], areas(self.scales)
                prices = self._scaled_prices(self.price, sigma)
                levels = zip(vectors.split(sizes, 1), codes.split(sizes, 1), ids.split(sizes, 1), prices, strict=True)
                paid = [overpay(*level) for level in levels]
                parts.append(torch.cat(paid, 1).flatten())
                self.price.record_ids(z, ids, self._nearest_distances(z))
            self.book.record(*parts)

    def update(self, statistics: Tensor) -> None:  # type: ignore[override]
        """Move the running means towards the batch's means, if these are finite."""
        means = mean_over_ranks(statistics.mean(0))
        finite = torch.isfinite(means).all()
        squares, errors, power, center = means.split([len(self.scales), len(self.scales), 1, self.dim])
        left = errors / (power - center.square().mean()).clamp(min=1e-12)
        if self.config.center:
            self.mean.lerp_(torch.where(finite, center, self.mean), 1 - self.decay)
        if self.config.rms:
            self.squares.lerp_(torch.where(finite, squares, self.squares), 1 - self.decay)
        self.left.lerp_(torch.where(finite, left, self.left), 1 - self.decay if self.step else 1.0)
        super().update()
