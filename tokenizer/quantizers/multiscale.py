"""Multi-scale residual quantization (VAR, Tian et al. 2024, algorithms 1 and 2): a map of ids at each of several sizes,
coarse to fine, each the codes nearest to what those before it left over.

Two things are not the paper's. Each scale is divided by its running root mean square before its codes are searched:
what is left over at 1x1 is small, so without it nearly all vectors of that scale share one or two codes of the
codebook that all scales share. And the convolutions `phi` are none by default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import ModelConfig, Node
from ..files import ConfigError
from ..precision import full_float32
from ..scales import Resize, Scales, areas, by, scales_problem
from .base import Quantized, Quantizer
from .codebook import Codebook, average, map_of, nearest, rows_of
from .ema import EMAConfig
from .gradients import pass_gradient
from .steps import Stepped, Taken, moved_if

BOOKS = ("bsq", "ema", "fsq", "lfq", "simvq", "vq")
ROUNDS = 2  # of k-means over what real codes leave over, after one over what perfect ones would
PAIR = r"[1-9]\d{0,2}x[1-9]\d{0,2}"
DECAY = 0.9  # of the running means, per training step, beside a book that has none


class MultiScaleConfig(ModelConfig):
    """The scales, and the codebook that they share."""

    scales: tuple[Annotated[int, Field(ge=1, le=256)] | str, ...] = Field(
        (1, 2, 4, 7),
        min_length=1,
        description="sizes of the maps of ids, coarse to fine, the last that of the latents: the side of a square, or "
        "HEIGHTxWIDTH",
    )
    book: Annotated[ModelConfig, Node("tokenizer.quantizers:Quantizer")] = Field(
        EMAConfig(), description=f"the codebook of all scales, one of {', '.join(BOOKS)}; all have its settings"
    )
    rms: bool = Field(True, description="divide each scale by its running root mean square, so that all use the codes")
    center: bool = Field(True, description="subtract the running mean of latents before the first scale")
    phi: int = Field(
        0, ge=0, le=64, description="convolutions that smooth what scales add up, shared by neighbours (VAR: 4)"
    )
    truncate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="in training, the share of images of which the decoder sees the first few scales only, so that "
        "these alone make a picture",
    )

    @property
    def sides(self) -> Scales:
        """(height, width) of each scale."""
        pairs = [f"{scale}x{scale}" if isinstance(scale, int) else scale for scale in self.scales]
        return tuple((int(height), int(width)) for height, _, width in (pair.partition("x") for pair in pairs))

    def check(self) -> Iterator[str]:
        """Scales grow, and a scale's code is one id that says how long the vector is."""
        if strange := [pair for pair in self.scales if isinstance(pair, str) and not re.fullmatch(PAIR, pair)]:
            yield f"scales: a size is a side or HEIGHTxWIDTH, as in 4 or 3x4 (got {strange[0]!r})"
        elif problem := scales_problem(self.sides):
            yield f"scales: {problem}"
        book: Any = self.book
        if book.kind not in BOOKS:
            yield f"book: must be one of {', '.join(BOOKS)}, where a vector takes its nearest code (got {book.kind!r})"
        elif getattr(book, "normalize", False):
            yield "book.normalize: must be false, as the length of what is left over has to be quantized too"
        elif book.kind in ("lfq", "bsq") and book.levels > 1:
            yield f"book.levels: must be 1, as a position of a scale takes one id (got {book.levels})"


class Descent(NamedTuple):
    """What a pass over the scales finds, a list of each: residuals `(B, dim, h, w)` as they are searched, times their
    `sigma`; ids `(B, h, w)`; sums of codes so far `(B, dim, H, W)`; and further losses of the book."""

    residuals: list[Tensor]
    tokens: list[Tensor]
    sums: list[Tensor]
    losses: list[dict[str, Tensor]]


class MultiScale(Stepped, Quantizer, name="multiscale"):
    """Grid `(L,)`, scale after scale, each in raster order. z_q is the sum of what the scales' codes add.

    `commitment` and `codebook`, the latter where codes or convolutions are learned, are those of every partial sum,
    averaged over scales.
    """

    Config = MultiScaleConfig
    mean: Tensor
    """(dim,) running mean of the latents, from which the sum starts; zero without `center`."""
    squares: Tensor
    """(scales,) running mean square of what a scale quantizes."""
    left: Tensor
    """(scales,) running share of the latents' variance that is left over after each scale."""

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__(config)
        kind: Any = Quantizer.find(config.book.kind)
        self.book: Any = kind(config.book)
        self.scales, self.vocab_size, self.dim = config.sides, self.book.vocab_size, self.book.dim
        self.resize = Resize(self.scales)
        self.phis = nn.ModuleList(nn.Conv2d(self.dim, self.dim, 3, padding=1) for _ in range(config.phi))
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("squares", torch.ones(len(self.scales)))
        self.register_buffer("left", torch.ones(len(self.scales)))
        self.decay = getattr(config.book, "decay", DECAY)
        self.seen: list[Tensor] = []  # of each micro-batch of this step
        self.learned = any(parameter.requires_grad for parameter in self.parameters())

    @property
    def loss_weights(self) -> dict[str, float]:
        """beta of the book for the commitment, 1 for what is learned, and the book's others."""
        others = {k: v for k, v in self.book.loss_weights.items() if k not in ("commitment", "codebook")}
        learned = {"codebook": 1.0} if self.learned else {}
        return {"commitment": getattr(self.config.book, "beta", 0.25), **learned, **others}

    @property
    def figures(self) -> dict[str, Tensor]:
        """The share of the latents' variance that is left over after each scale: `left_1x1`, `left_2x2`, ..."""
        return {f"left_{by(sides)}": share for sides, share in zip(self.scales, self.left, strict=True)}

    def grid_shape(self, height: int, width: int) -> tuple[int, ...]:
        """One axis, of all scales' ids. Raises `ConfigError` unless the last scale has the size of the latents."""
        if self.scales[-1] != (height, width):
            wanted, given = by((height, width)), ", ".join(map(by, self.scales))
            raise ConfigError(f"quantizer.scales: must end at the latents' size {wanted} (got {given})")
        return (sum(areas(self.scales)),)

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        """The sums of codes `(B, dim, H, W)` of `tokens` `(B, L)`."""
        return self.lookup_scales(tokens, len(self.scales))

    def lookup_scales(self, tokens: Tensor, count: int) -> Tensor:
        """`lookup_checked` of the first `count` scales alone. Raises `ValueError` for more scales than there are."""
        if not 1 <= count <= len(self.scales):
            raise ValueError(f"count should be 1 to {len(self.scales)}, the number of scales (got {count})")
        with full_float32(), torch.autocast(tokens.device.type, enabled=False):
            table, sigma, total = self._table(), self.sigma(), self.mean[:, None, None]
            for k, ids in enumerate(list(self.resize.split(tokens))[:count]):
                total = total + self._added(self._codes(ids, table), k, sigma)
        return total

    def sigma(self) -> Tensor:
        """(scales,) what the vectors of each scale are divided by; ones without `rms`."""
        return self.squares.clamp(min=1e-12).sqrt()

    def _table(self) -> Tensor | None:
        """The codes `(codes, dim)`, where the book has any."""
        return self.book.table() if isinstance(self.book, Codebook) else None

    def _codes(self, ids: Tensor, table: Tensor | None) -> Tensor:
        """`(B, dim, h, w)` of `ids` `(B, h, w)`. Bits become +1 and -1: of length 1 in all, they would be too short."""
        if table is None:
            return self.book.lookup_checked(ids) / getattr(self.book, "size", 1.0)
        return F.embedding(ids, table).movedim(-1, 1)

    def _added(self, codes: Tensor, k: int, sigma: Tensor) -> Tensor:
        """What codes `(B, dim, h, w)` of scale `k` add to the sum, `(B, dim, H, W)`."""
        up = self.resize.up(codes * sigma[k], k)
        return up.lerp(self.phis[self._phi_of(k)](up), 0.5) if self.phis else up

    def _phi_of(self, k: int) -> int:
        """Which convolution scale `k` takes: both are spread evenly over [0, 1], and the nearest ones meet. VAR's four
        lie a little further out."""
        margin = 1 / (3 if len(self.phis) == 4 else 2) / len(self.phis)
        ticks = torch.linspace(margin, 1 - margin, len(self.phis), dtype=torch.float64, device="cpu")
        return int((ticks - k / max(1, len(self.scales) - 1)).abs().argmin())

    def _quantize(self, z: Tensor) -> Quantized:
        if self.training and not self.seen:
            self._begin(z.detach())
        found = self._descend(z)
        kind = getattr(self.config.book, "gradient", "straight_through")
        z_q = pass_gradient(kind, rows_of(z), rows_of(self._shown(found.sums)))
        if self.training:
            self._collect(z.detach(), found)
        tokens = torch.cat([ids.flatten(1) for ids in found.tokens], 1)
        return Quantized(map_of(z_q, z), tokens, self._losses(z, found))

    def _descend(self, z: Tensor) -> Descent:
        """Quantize `z` `(B, dim, H, W)` scale by scale; residuals have its gradient, sums that of what is learned."""
        if tuple(z.shape[2:]) != self.scales[-1]:
            raise ValueError(f"z should be of the last scale's size {by(self.scales[-1])}, got {by(z.shape[2:])}")
        found, total = Descent([], [], [], []), self.mean[:, None, None].expand_as(z)
        table, sigma = self._table(), self.sigma()
        for k in range(len(self.scales)):
            rest = self.resize.down(z - total.detach(), k)
            ids, losses = self._search(rest / sigma[k], table)
            total = total + self._added(self._codes(ids, table), k, sigma)
            for kept, new in zip(found, (rest, ids, total, losses), strict=True):
                kept.append(new)  # type: ignore[attr-defined]
        return found

    def _search(self, vectors: Tensor, table: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Ids `(B, h, w)` of `vectors` `(B, dim, h, w)`, and the book's losses that are not of a sum of codes."""
        if table is None:
            found = self.book.quantize(vectors)
            return found.tokens, {k: v for k, v in found.losses.items() if k != "commitment"}
        ids = nearest(rows_of(vectors.detach()), table.detach())
        return ids.reshape(vectors.shape[0], *vectors.shape[2:]), {}

    def _shown(self, sums: list[Tensor]) -> Tensor:
        """What the decoder sees: the last of `sums`, or in training, of some images, an earlier one."""
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

    # What moves by itself

    def matters(self, step: int) -> bool:
        """Also what matters to the book."""
        return super().matters(step) or (isinstance(self.book, Codebook) and self.book.matters(step))

    @torch.no_grad()
    def _begin(self, z: Tensor) -> None:
        """At the first micro-batch of a step, tell the book which step it is; at that of training, start from `z`."""
        self.find_step()
        if isinstance(self.book, Codebook):
            self.book.step = self.step
        if self.step == 0 and self.config.center:
            self._set(self.mean, average(z.mean((0, 2, 3))))
        for attempt in range(1 + ROUNDS) if self.step == 0 else ():
            self._start(self._perfect(z) if attempt == 0 else self._descend(z).residuals)

    def _perfect(self, z: Tensor) -> list[Tensor]:
        """Residuals `(B, dim, h, w)` of each scale of `z`, if every vector were a code."""
        rests, total = [], self.mean[:, None, None].expand_as(z)
        for k in range(len(self.scales)):
            rests.append(self.resize.down(z - total, k))
            total = total + self.resize.up(rests[-1], k)
        return rests

    def _start(self, rests: list[Tensor]) -> None:
        """Set each scale's root mean square, and the codebook by k-means over residuals in units of it: as many of each
        scale, as far as its map has them. (Between centres on one vector, taken twice, rounding would decide.)"""
        if self.config.rms:
            self._set(self.squares, average(torch.stack([rest.square().mean() for rest in rests])))
        if not isinstance(self.book, Codebook):
            return
        each, taken = -(-sum(areas(self.scales)) // len(rests)), []
        for rest, sigma in zip(rests, self.sigma(), strict=True):
            rows = rest.flatten(2) / sigma
            count = min(each, rows.shape[2])
            taken.append(rows[..., torch.arange(count, device=rows.device) * rows.shape[2] // count])
        self.book.start(torch.cat(taken, 2).transpose(1, 2).flatten(0, 1))

    def _set(self, mean: Tensor, value: Tensor) -> None:
        """Start a running mean, but not from what is not finite, which it would not recover from."""
        if bool(torch.isfinite(value).all()):  # alike on all ranks
            mean.copy_(value)

    @torch.no_grad()
    def _collect(self, z: Tensor, found: Descent) -> None:
        """Keep, of each image, what the running means need; and for a codebook the vectors of all scales."""
        squares = [rest.detach().square().flatten(1).mean(1) for rest in found.residuals]
        errors = [(z - total.detach()).square().flatten(1).mean(1) for total in found.sums]
        power, means = z.flatten(2).square().mean((1, 2)), z.flatten(2).mean(2)
        self.seen.append(torch.cat([torch.stack([*squares, *errors, power], 1), means], 1))
        if isinstance(self.book, Codebook):
            sigma = self.sigma()
            rows = [(rest.detach() / sigma[k]).flatten(2) for k, rest in enumerate(found.residuals)]
            ids = torch.cat([part.flatten(1) for part in found.tokens], 1)
            self.book.collect(torch.cat(rows, 2).transpose(1, 2).flatten(0, 1), ids.flatten())

    @torch.no_grad()
    def finish_step(self, taken: Taken = True) -> None:
        """The book and the running means move, once."""
        seen, self.seen, taken = self.seen, [], self.find_taken(taken)
        self.book.finish_step(taken)
        if not seen or taken is False:
            return
        squares, errors, power, means = average(torch.cat(seen).mean(0)).split([*[len(self.scales)] * 2, 1, self.dim])
        shares = errors / (power - means.square().mean()).clamp(min=1e-12)
        if self.config.center:
            self.mean.lerp_(moved_if(taken, means, self.mean), 1 - self.decay)
        if self.config.rms:
            self.squares.lerp_(moved_if(taken, squares, self.squares), 1 - self.decay)
        self.left.lerp_(moved_if(taken, shares, self.left), 1 - self.decay if self.step else 1.0)
        self.count_step(taken)
