"""Residual quantization: several codes per position, each nearest to the residual of the preceding ones.

SoundStream (Zeghidour et al. 2021, section III-C) has a codebook for each level, RQ-VAE (Lee et al. 2022, section 3.1)
a single one. With `depth` levels of K codes, a position has K^depth values at the cost of `depth` searches among K
codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import ModelConfig
from ..precision import full_float32
from .base import Quantized, Quantizer, QuantizerNode
from .codebook import CodebookConfig, first_rows, map_of, nearest_codes, overpay, rows_of, squared_distances
from .ema import EMAConfig
from .gradients import pass_gradient
from .price import MEASURED, Price, uses

BOOKS = ("ema", "simvq", "vq")
SHARED_STARTS = 2  # the first reduces the error by 15 to 90 %, the second by up to 30 %, a third by nothing


class RVQConfig(ModelConfig):
    depth: int = Field(4, ge=1, le=64, description="ids per position; each quantizes the residual of those before")
    shared: bool = Field(False, description="one codebook for all levels (RQ-VAE), not one each (SoundStream)")
    book: QuantizerNode = Field(EMAConfig(), description=f"codebook of every level, one of {', '.join(BOOKS)}")

    def check(self) -> Iterator[str]:
        if not isinstance(self.book, CodebookConfig) or self.book.kind not in BOOKS:
            yield f"book: must be one of {', '.join(BOOKS)} (got {self.book.kind!r})"
        elif self.book.normalize:
            yield "book.normalize: must be false, because the length of residuals has to be quantized too"


class RVQ(Quantizer, name="rvq"):
    """`z_q` is the sum of codes from `books` (`depth` codebooks, or a shared one).

    Losses are those of the codebook, averaged over levels (RQ-VAE sums them; the mean preserves the meaning of beta).
    Level l quantizes z minus the preceding codes, so its commitment loss is that of the partial sum, |z - sg(e_1 + .. +
    e_l)|^2, as in the paper.
    """

    Config = RVQConfig
    searches_codes = True

    def __init__(self, config: RVQConfig) -> None:
        super().__init__(config)
        book: Any = config.book
        self.vocab_size, self.dim, self.levels = book.codes, book.dim, config.depth
        # Seeds differ, because levels that revived codes at the same positions would quantize the same vectors twice.
        seeds = [book.seed + level for level in range(1 if config.shared else config.depth)]
        kind: Any = Quantizer.find(book.kind)
        self.has_means = kind.has_means
        books = [book.model_copy(update={"seed": seed, "rate": 0.0}) for seed in seeds]
        self.books: Any = nn.ModuleList(map(kind, books))
        self.price = Price(book.rate, book.codes, (1,) * config.depth) if book.rate else None

    @property
    def loss_weights(self) -> dict[str, float]:
        return self.books[0].loss_weights

    def tables(self) -> list[Tensor]:
        return self._per_level([book.table() for book in self.books])

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        levels = zip(tokens.chunk(self.levels, 1), self.tables(), strict=True)
        return sum_in_order(F.embedding(ids, table) for ids, table in levels).movedim(-1, 1)

    def _per_level(self, per_book: Any) -> list[Any]:
        return list(per_book) * (self.levels // len(self.books))

    def _quantize(self, z: Tensor) -> Quantized:
        rows = rows_of(z)
        recorded = self.books[0].may_record(rows.detach(), self.start)
        tables = self.tables()
        residuals, tokens, codes = self._descend(rows, tables, self._prices())
        losses = self._losses(residuals, codes)
        z_q = pass_gradient(self.config.book.gradient, rows, sum_in_order(codes))
        if recorded:
            self._record(residuals, tokens, codes)
        ids = [part.reshape(z.shape[0], *z.shape[2:]) for part in tokens]
        return Quantized(map_of(z_q, z), torch.cat(ids, 1), losses)

    def _prices(self) -> Sequence[Tensor | None]:
        return [None] * self.levels if self.price is None else list(self.price.of_codes())

    def _descend(
        self, rows: Tensor, tables: list[Tensor], prices: Sequence[Tensor | None] | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return for each level its input (the residual of rows `(n, dim)`, with their gradient), its tokens `(n,)` and
        codes `(n, dim)`. prices: of each level's codes."""
        residuals, tokens, codes = [rows], [], []
        for table, price in zip(tables, prices or [None] * len(tables), strict=True):
            tokens.append(nearest_codes(residuals[-1].detach(), table.detach(), price))
            codes.append(F.embedding(tokens[-1], table))
            residuals.append(residuals[-1] - codes[-1].detach())
        return residuals[:-1], tokens, codes

    def _losses(self, residuals: list[Tensor], codes: list[Tensor]) -> dict[str, Tensor]:
        levels = zip(self._per_level(self.books), residuals, codes, strict=True)
        parts = [book.losses(*level) for book, *level in levels]
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    @torch.no_grad()
    def distances(self, z: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """See `Quantizer`. `z` minus the codes of coarser levels is what a level's codes are compared with."""
        rows, tables = z.float().flatten(2).mT, torch.stack(self.tables())
        level, position = places // rows.shape[1], places % rows.shape[1]
        left, ids = rows[:, position], tokens.unflatten(1, (self.levels, -1))[..., position]
        with full_float32():
            for k in range(self.levels - 1):
                left = left - F.embedding(ids[:, k], tables[k]) * (k < level).unsqueeze(1)
            return squared_distances(left.unsqueeze(2), tables[level]).squeeze(2)

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Run k-means level by level over residuals of rows `(n, dim)`. A shared codebook is fitted to the rows and
        then to its own residuals at all levels, because it needs both coarse and fine codes."""
        residual = rows
        for book in self.books:
            book.start(residual)
            residual = residual - self._descend(residual, [book.table()])[2][0]
        for _ in range(SHARED_STARTS if self.config.shared else 0):
            self.books[0].start(interleave(self._descend(rows, self.tables())[0]))

    @torch.no_grad()
    def lloyd_step(self, batches: Sequence[Tensor]) -> None:
        """See `Quantizer`. Levels follow one another, each on the residuals of the preceding ones; a shared codebook
        takes one step on the residuals of all levels."""
        residuals = [rows_of(z.float()) for z in batches]
        every, counts = list[tuple[Tensor, Tensor]](), list[Tensor]()
        for book, prices in zip(self._per_level(self.books), self._prices(), strict=True):
            parts = [(rows, self._search(rows, book, prices)) for rows in residuals]
            if self.config.shared:
                every += parts
                counts.append(torch.stack([uses(tokens, self.vocab_size) for _, tokens in parts]).sum(0))
            else:
                counts.append(book.move_to_means(parts))
                parts = [(rows, self._search(rows, book, prices)) for rows in residuals]
            residuals = [rows - F.embedding(tokens, book.table().to(rows.device)) for rows, tokens in parts]
        if self.config.shared:
            self.books[0].move_to_means(every)
        if self.price is not None:
            self.price.set_counts(torch.stack(counts))

    def _search(self, rows: Tensor, book: Any, prices: Tensor | None) -> Tensor:
        with full_float32():
            return nearest_codes(rows.to(book.codebook.device), book.table(), prices).to(rows.device)

    @torch.no_grad()
    def _record(self, residuals: list[Tensor], tokens: list[Tensor], codes: list[Tensor]) -> None:
        each, parts = self.levels // len(self.books), [residuals, tokens]
        if self.price is not None:
            parts.append(
                [overpay(*level) for level in zip(residuals, codes, tokens, self.price.of_codes(), strict=True)]
            )
            left, _, nearest = self._descend(first_rows(residuals[0], MEASURED, self.config.book.seed), self.tables())
            self.price.record_ids(residuals[0], torch.stack(tokens, 1), (left[-1] - nearest[-1]).square().sum(1))
        for index, book in enumerate(self.books):
            own = slice(index * each, (index + 1) * each)
            book.record(*(interleave(part[own]).detach() for part in parts))


def sum_in_order(codes: Iterable[Tensor]) -> Tensor:
    """Sum in order, so that rounding is always the same."""
    return reduce(torch.add, codes)


def interleave(levels: list[Tensor]) -> Tensor:
    """Join levels `(n, ...)` to `(n * levels, ...)`, position by position. The concatenated rows of all ranks then have
    the order of a single process, so codes are initialized and revived from the same rows."""
    return torch.stack(levels, 1).flatten(0, 1)
