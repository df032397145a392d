"""Base class of quantizers with a codebook: nearest-code search, k-means initialization over all ranks, and revival of
dead codes (Dhariwal et al. 2020, Jukebox)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..config import ModelConfig
from ..precision import full_float32
from .base import Quantized, Quantizer
from .gradients import Gradient, pass_gradient
from .price import MEASURED, Price, PricedConfig, uses
from .updates import SelfUpdating, sum_over_ranks, world_size

# Distances per block on a CPU, so that they fit in cache; a GPU uses 64 times as many.
SEARCH_ELEMENTS = 1 << 20


class CodebookConfig(ModelConfig):
    codes: int = Field(512, ge=2, le=1 << 18, description="size of the codebook")
    dim: int = Field(64, ge=1, le=4096, description="width of a code")
    beta: float = Field(0.25, ge=0, description="weight of the commitment loss, which pulls vectors to their codes")
    kmeans_iterations: int = Field(10, ge=0, description="k-means steps on the first batch that set the codebook")
    seed: int = Field(0, ge=0, description="seed of the initial codes and of the candidates for revival")
    normalize: bool = Field(
        False, description="compare directions: vectors and codes of length 1, for large codebooks of few dimensions"
    )
    gradient: Gradient = Field("straight_through", description="gradient estimator for the nearest code")

    def check(self) -> Iterator[str]:
        if self.normalize and self.dim < 2:
            yield f"normalize: needs a dim of 2 or more (got {self.dim})"


class CountedConfig(PricedConfig, CodebookConfig):
    decay: float = Field(0.9, ge=0, lt=1, description="decay of the running counts of use, per training batch")
    revive_below: float = Field(0.05, ge=0, lt=1, description="a code is revived below this share of the mean use")
    revive_every: int = Field(10, ge=1, description="training batches between revivals")


class Codebook(SelfUpdating, Quantizer):
    """Nearest of `codes` vectors (van den Oord et al. 2017). Subclasses own `codebook` (codes, dim).

    With `normalize`, directions are compared and looked up (Yu et al. 2021, ViT-VQGAN).
    """

    Config: ClassVar[type[ModelConfig]] = CodebookConfig
    searches_codes = True
    codebook: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        self.vocab_size, self.dim = config.codes, config.dim
        rate = config.rate if isinstance(config, PricedConfig) else 0.0
        self.price = Price(rate, config.codes) if rate else None

    def table(self) -> Tensor:
        """Return the codes, (codes, dim), of length 1 with `normalize`."""
        if not self.config.normalize:
            return self.codebook
        return F.normalize(self.codebook.clone(), dim=1)  # `update` may write to the codebook before a backward pass

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table()).movedim(-1, 1)

    def _quantize(self, z: Tensor) -> Quantized:
        rows = self.comparable(rows_of(z))
        recorded = self.may_record(rows.detach())
        table = self.table()
        tokens = self.search(rows.detach(), table.detach())
        codes = F.embedding(tokens, table)
        losses = self.losses(rows, codes)
        z_q = pass_gradient(self.config.gradient, rows, codes)
        if recorded:
            self._record(rows.detach(), tokens, table.detach())
        return Quantized(map_of(z_q, z), tokens.reshape(z.shape[0], *z.shape[2:]), losses)

    @torch.no_grad()
    def _record(self, rows: Tensor, tokens: Tensor, table: Tensor) -> None:
        if self.price is None:
            self.record(rows, tokens)
            return
        self.record(rows, tokens, overpay(rows, table[tokens], tokens, self.price.of_codes()[0]))
        some = first_rows(rows, MEASURED, self.config.seed)
        self.price.record_ids(rows, tokens.unsqueeze(1), (some - table[nearest_codes(some, table)]).square().sum(1))

    def _encode(self, z: Tensor) -> Tensor:
        tokens = self.search(self.comparable(rows_of(z)), self.table())
        return tokens.reshape(z.shape[0], *z.shape[2:])

    def search(self, rows: Tensor, table: Tensor) -> Tensor:
        """Return the id of the code in `table` for each row, `(n,)`: the nearest, or the best by distance and price."""
        return nearest_codes(rows, table, None if self.price is None else self.price.of_codes()[0])

    @torch.no_grad()
    def distances(self, z: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """See `Quantizer`."""
        with full_float32():
            return squared_distances(self.comparable(z.float()).flatten(2).mT[:, places], self.table())

    def comparable(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1) if self.config.normalize else z

    def losses(self, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Return |sg(z) - e|^2 and |z - sg(e)|^2 of rows z and their codes e, `(n, dim)`, averaged over elements."""
        return {"codebook": F.mse_loss(codes, rows.detach()), "commitment": F.mse_loss(rows, codes.detach())}

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"codebook": 1.0, "commitment": self.config.beta}

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Use the k-means centres of the rows of all ranks; fewer rows than codes are repeated with a little noise."""
        sample = first_rows(rows, 32 * self.vocab_size, self.config.seed)
        iterations = self.config.kmeans_iterations
        if len(sample) < self.vocab_size:
            iterations, repeats = 0, -(-self.vocab_size // len(sample))
            generator = torch.Generator().manual_seed(self.config.seed % (1 << 63))
            noise = torch.randn(len(sample) * repeats, self.dim, generator=generator)
            sample = sample.repeat(repeats, 1) + 0.01 * sample.std().clamp(min=1e-3) * noise.to(sample)
        self.codebook.copy_(kmeans(sample, self.vocab_size, iterations))
        if world_size() > 1:
            dist.broadcast(self.codebook.data, 0)


class CountedCodebook(Codebook):
    """Counts code usage, and revives rarely used codes by moving them to vectors of the batch."""

    has_means = True
    counts: Tensor  # (codes,) running mean of each code's use per batch

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        super().start(rows)
        self.counts.fill_(len(rows) * world_size() / self.vocab_size)

    @torch.no_grad()
    def lloyd_step(self, batches: Sequence[Tensor]) -> None:
        """See `Quantizer`."""
        rows = [self.comparable(rows_of(z.float())) for z in batches]
        tokens = [self.encode(z.to(self.codebook.device)).flatten() for z in batches]
        counts = self.move_to_means(zip(rows, tokens, strict=True))
        if self.price is not None:
            self.price.set_counts(counts.unsqueeze(0))

    @torch.no_grad()
    def move_to_means(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Move each code to the mean of its vectors, given parts of vectors `(n, dim)` and their ids `(n,)`; return how
        many each has, `(codes,)`. Sums are taken on the CPU, where they do not depend on the order of threads."""
        sums = torch.zeros(self.vocab_size, self.dim, dtype=torch.float64)
        counts = torch.zeros(self.vocab_size, dtype=torch.float64)
        for rows, tokens in parts:
            sums.index_add_(0, tokens.cpu(), rows.cpu().double())
            counts += uses(tokens.cpu(), self.vocab_size)
        means = sums / counts.clamp(min=1).unsqueeze(1)
        self.codebook.copy_(torch.where(counts.unsqueeze(1) > 0, means, self.codebook.detach().cpu()))
        return counts

    def revives(self, step: int) -> bool:
        return (step + 1) % self.config.revive_every == 0

    def dead_codes(self, rows: Tensor, overpaying: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the ids `(k,)` of codes to revive, and a new vector for each, `(k, dim)`: rows of the batch `(n, dim)`
        on all ranks, chosen by (seed, step) only. Syncs with the GPU.

        An unused code with a price may be too dear rather than dead. It is moved only to a row that would choose it
        there, of which `overpaying` `(n,)` is True (see `overpay`)."""
        total = len(rows) * world_size()
        dead = (self.counts < self.config.revive_below * self.counts.mean()).nonzero().squeeze(1)[:total]
        chosen = seeded(total, len(dead), self.config.seed, self.step + 1, rows.device)
        if not len(dead):
            return dead, rows[:0]
        vectors = gather_rows(rows, chosen)
        if overpaying is not None:
            vectors = vectors[gather_rows(overpaying.float().unsqueeze(1), chosen).squeeze(1) > 0]
        return dead[: len(vectors)], vectors


def rows_of(z: Tensor) -> Tensor:
    """Reshape `(B, D, *spatial)` to `(B * positions, D)`, as a view if `z` is channels-last."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def map_of(rows: Tensor, z: Tensor) -> Tensor:
    """Reshape `(B * positions, D)` to `(B, D, *spatial)` with the size of `z`, inverting `rows_of`."""
    return rows.reshape(z.shape[0], *z.shape[2:], rows.shape[1]).movedim(-1, 1)


def nearest_codes(rows: Tensor, codebook: Tensor, prices: Tensor | None = None) -> Tensor:
    """Return the index `(n,)` of the code `(V, D)` nearest to each row `(n, D)`: argmin |e|^2 - 2 z.e, in blocks.
    prices: of the codes, `(V,)`, to be added to the squared distances."""
    squares, transposed = codebook.square().sum(1), codebook.t()
    squares = squares if prices is None else squares + prices
    elements = SEARCH_ELEMENTS if rows.device.type == "cpu" else 64 * SEARCH_ELEMENTS
    blocks = rows.split(max(1, elements // len(codebook)))
    ids = [torch.addmm(squares, block, transposed, alpha=-2).argmin(1) for block in blocks]
    return ids[0] if len(ids) == 1 else torch.cat(ids)


def squared_distances(rows: Tensor, codebook: Tensor) -> Tensor:
    """Return |z - e|^2 of rows z `(..., n, D)` and all codes e, `(..., V, D)`: `(..., n, V)`."""
    squares = rows.square().sum(-1, keepdim=True) + codebook.square().sum(-1).unsqueeze(-2)
    return squares - 2 * rows @ codebook.mT


def overpay(rows: Tensor, codes: Tensor, tokens: Tensor, prices: Tensor) -> Tensor:
    """Return whether each row `(..., dim)` pays for its code, in distance and price, more than the dearest code costs,
    so that it would choose any code that is moved to it, bool `(...)`."""
    return (rows - codes).square().sum(-1) + prices[tokens] > prices.max()


def kmeans(rows: Tensor, clusters: int, iterations: int) -> Tensor:
    """Run Lloyd's algorithm from the first rows; return the centres (clusters, D). Empty clusters keep theirs."""
    centres = rows[:clusters].clone()
    for _ in range(iterations):
        tokens = nearest_codes(rows, centres)
        counts = uses(tokens, clusters).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, tokens, rows)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def seeded(total: int, count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """Draw `count` distinct integers below `total`, determined by (seed, step)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    return torch.randperm(total, generator=generator)[:count].to(device)


def first_rows(rows: Tensor, most: int, seed: int) -> Tensor:
    """Return up to `most` rows out of the rows `(n, D)` of all ranks, chosen by the seed, to initialize a codebook."""
    total = len(rows) * world_size()
    return gather_rows(rows, seeded(total, min(total, most), seed, 0, rows.device))


def gather_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """Gather rows `(len(indices), D)` from those of all ranks, which hold equally many; the same on all ranks."""
    if world_size() == 1:
        return rows[indices]
    rank, row = indices // len(rows), indices % len(rows)
    return sum_over_ranks(torch.where((rank == dist.get_rank()).unsqueeze(1), rows[row], 0))
