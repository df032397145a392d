"""Residual quantization: several codes per position, each the nearest to what those before it left over.

SoundStream (Zeghidour et al. 2021, section III-C) has a codebook for each level, RQ-VAE (Lee et al. 2022, section 3.1)
one for all. With `depth` levels of K codes a position takes one of K^depth values, at the price of depth searches of K.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import ModelConfig, Node
from .base import Quantized, Quantizer
from .codebook import CodebookConfig, map_of, nearest, rows_of
from .ema import EMAConfig
from .gradients import pass_gradient
from .steps import Taken

BOOKS = ("ema", "simvq", "vq")
SHARED_STARTS = 2  # the first takes 15 to 90 % off the error, the second up to 30 % more, a third nothing


class RVQConfig(ModelConfig):
    """How many codes a position takes, and from which books."""

    depth: int = Field(
        4, ge=1, le=64, description="ids per position: each is the code nearest to what those before it left"
    )
    shared: bool = Field(False, description="one codebook for all levels (RQ-VAE), not one for each (SoundStream)")
    book: Annotated[ModelConfig, Node("tokenizer.quantizers:Quantizer")] = Field(
        EMAConfig(), description=f"a level's codebook, one of {', '.join(BOOKS)}; all have its settings"
    )

    def check(self) -> Iterator[str]:
        """Levels are nearest-code searches among vectors of any length."""
        if not isinstance(self.book, CodebookConfig) or self.book.kind not in BOOKS:
            yield f"book: must be one of {', '.join(BOOKS)} (got {self.book.kind!r})"
        elif self.book.normalize:
            yield "book.normalize: must be false, as the length of what is left over has to be quantized too"


class RVQ(Quantizer, name="rvq"):
    """`books` (`depth` of them, or a shared one) are codebooks of their own kind; their codes add up to `z_q`.

    The losses are the book's, averaged over levels (RQ-VAE adds them up; the mean leaves beta as it is for one level).
    As level l's vectors are z less the codes before it, its commitment is that of the partial sum,
    |z - sg(e_1 + .. + e_l)|^2, as in the paper.
    """

    Config = RVQConfig

    def __init__(self, config: RVQConfig) -> None:
        super().__init__(config)
        book: Any = config.book
        self.vocab_size, self.dim, self.levels = book.codes, book.dim, config.depth
        # Seeds of their own: two levels that revive codes from the same places would quantize the same vectors twice.
        seeds = [book.seed + level for level in range(1 if config.shared else config.depth)]
        kind: Any = Quantizer.find(book.kind)
        self.books: Any = nn.ModuleList(kind(book.model_copy(update={"seed": seed})) for seed in seeds)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The book's."""
        return self.books[0].loss_weights

    def tables(self) -> list[Tensor]:
        """The codes of each level, `(codes, dim)`."""
        return self._of_levels([book.table() for book in self.books])

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        """Sums of codes `(B, dim, *spatial)`, coarse ones first, of `tokens` `(B, levels * rows, ...)`."""
        levels = zip(tokens.chunk(self.levels, 1), self.tables(), strict=True)
        return add_up(F.embedding(ids, table) for ids, table in levels).movedim(-1, 1)

    def _of_levels(self, things: Any) -> list[Any]:
        """`things`, one for each book, as one for each level."""
        return list(things) * (self.levels // len(self.books))

    def _quantize(self, z: Tensor) -> Quantized:
        rows = rows_of(z)
        if self.training:
            self._begin(rows.detach())
        left, tokens, codes = self._descend(rows, self.tables())
        losses = self._losses(left, codes)
        z_q = pass_gradient(self.config.book.gradient, rows, add_up(codes))
        if self.training:
            self._collect(left, tokens)
        ids = [part.reshape(z.shape[0], *z.shape[2:]) for part in tokens]
        return Quantized(map_of(z_q, z), torch.cat(ids, 1), losses)

    def _descend(self, rows: Tensor, tables: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What each level has left of rows `(n, dim)`, with their gradient; its tokens `(n,)` and codes `(n, dim)`."""
        left, tokens, codes = [rows], [], []
        for table in tables:
            tokens.append(nearest(left[-1].detach(), table.detach()))
            codes.append(F.embedding(tokens[-1], table))
            left.append(left[-1] - codes[-1].detach())
        return left[:-1], tokens, codes

    def _losses(self, left: list[Tensor], codes: list[Tensor]) -> dict[str, Tensor]:
        parts = [book.losses(*level) for book, *level in zip(self._of_levels(self.books), left, codes, strict=True)]
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """k-means level by level over what is left of rows `(n, dim)`. A shared book starts from the rows, then from
        what it leaves at all levels: it needs fine codes as well as coarse ones."""
        left = rows
        for book in self.books:
            book.start(left)
            left = left - self._descend(left, [book.table()])[2][0]
        for _ in range(SHARED_STARTS if self.config.shared else 0):
            self.books[0].start(laid_out(self._descend(rows, self.tables())[0]))

    def _begin(self, rows: Tensor) -> None:
        """At the first micro-batch of a step, tell the books which step it is; at that of training, start."""
        first = self.books[0]
        if first.micro_batches:
            return
        first.find_step()
        for book in self.books:
            book.step = first.step
        if first.step == 0:
            self.start(rows)

    def _collect(self, left: list[Tensor], tokens: list[Tensor]) -> None:
        """For each book, the vectors of all the levels that it serves."""
        each = self.levels // len(self.books)
        for index, book in enumerate(self.books):
            levels = slice(index * each, (index + 1) * each)
            book.collect(laid_out(left[levels]).detach(), laid_out(tokens[levels]))

    def finish_step(self, taken: Taken = True) -> None:
        """Each book moves, once."""
        taken = self.books[0].find_taken(taken)
        for book in self.books:
            book.finish_step(taken)


def add_up(codes: Iterable[Tensor]) -> Tensor:
    """The sum, in this order: floats added up in another would make another `z_q`."""
    return reduce(torch.add, codes)


def laid_out(levels: list[Tensor]) -> Tensor:
    """Levels' `(n, ...)` as one `(n * levels, ...)`, position by position: so the rows of all ranks laid end to end are
    those of one process with all the positions, and codes start and are revived from the same ones."""
    return torch.stack(levels, 1).flatten(0, 1)
