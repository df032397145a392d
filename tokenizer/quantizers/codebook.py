"""What quantizers with a codebook share: nearest-code search, a first codebook from k-means over all ranks, and the
revival of codes that are hardly used (Dhariwal et al. 2020, Jukebox)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..config import ModelConfig
from .base import Quantized, Quantizer
from .gradients import Gradient, pass_gradient
from .steps import Stepped, Taken

# Distances held at a time on a CPU, which re-uses small blocks of memory; on a GPU 64 times as many.
SEARCH_ELEMENTS = 1 << 20


class CodebookConfig(ModelConfig):
    """What every codebook is told."""

    codes: int = Field(512, ge=2, le=1 << 18, description="size of the codebook")
    dim: int = Field(64, ge=1, le=4096, description="width of a code")
    beta: float = Field(0.25, ge=0, description="weight of the commitment loss, which pulls the encoder to its codes")
    kmeans_iterations: int = Field(
        10, ge=0, description="k-means steps over the first batch, from which the codebook starts"
    )
    seed: int = Field(0, ge=0, description="chooses the first codes and the candidates for revival")
    normalize: bool = Field(
        False,
        description="compare directions: vectors and codes are scaled to length 1, which suits large "
        "codebooks of few dimensions (LlamaGen: 16384 x 8)",
    )
    gradient: Gradient = Field("straight_through", description="how gradients pass a code")

    def check(self) -> Iterator[str]:
        """There are two directions of one dimension."""
        if self.normalize and self.dim < 2:
            yield f"normalize: needs a dim of 2 or more (got {self.dim})"


class Codebook(Stepped, Quantizer):
    """Nearest of `codes` vectors (van den Oord et al. 2017). Subclasses own `codebook` (codes, dim) and its losses.

    With `normalize` it is the codes' direction that is compared and looked up (Yu et al. 2021, ViT-VQGAN).
    """

    Config: ClassVar[type[ModelConfig]] = CodebookConfig
    codebook: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        self.vocab_size, self.dim = config.codes, config.dim
        self.micro_batches = 0  # of this step so far

    def table(self) -> Tensor:
        """The codes as they are looked up, (codes, dim)."""
        return F.normalize(self.codebook, dim=1) if self.config.normalize else self.codebook

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        """The codes `(B, dim, *spatial)` of `tokens` `(B, *spatial)`."""
        return F.embedding(tokens, self.table()).movedim(-1, 1)

    def _quantize(self, z: Tensor) -> Quantized:
        rows = self.comparable(rows_of(z))
        if self.training:
            self.begin(rows.detach())
        table = self.table()
        tokens = nearest(rows.detach(), table.detach())
        codes = F.embedding(tokens, table)
        losses = self.losses(rows, codes)
        z_q = pass_gradient(self.config.gradient, rows, codes)
        if self.training:
            self.collect(rows.detach(), tokens)
        return Quantized(map_of(z_q, z), tokens.reshape(z.shape[0], *z.shape[2:]), losses)

    def comparable(self, rows: Tensor) -> Tensor:
        """Rows `(n, dim)` as they are compared to the table."""
        return F.normalize(rows, dim=1) if self.config.normalize else rows

    def losses(self, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Unweighted scalars from rows `(n, dim)` and their codes `(n, dim)`."""
        raise NotImplementedError

    def begin(self, rows: Tensor) -> None:
        """At the first micro-batch of a step, learn which step it is; at that of training, start from its rows."""
        if self.micro_batches:
            return
        self.find_step()
        if self.step == 0:
            self.start(rows)

    def collect(self, rows: Tensor, tokens: Tensor) -> None:
        """Keep what `move` needs of a micro-batch: rows `(n, dim)` and the ids `(n,)` of their codes."""
        self.micro_batches += 1

    def move(self, taken: Taken) -> None:
        """Change the codebook by what was collected, if the step was `taken`."""

    def forget(self) -> None:
        """Drop what was collected."""
        self.micro_batches = 0

    @torch.no_grad()
    def finish_step(self, taken: Taken = True) -> None:
        """Move once, and count the step."""
        taken = self.find_taken(taken)
        if self.micro_batches and taken is not False:
            self.move(taken)
            self.count_step(taken)
        self.forget()

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Set the codebook by k-means over rows of all ranks: run on rank 0, then broadcast. Fewer rows than codes are
        repeated, slightly apart, and are the codes as they are: each would be a cluster of its own."""
        sample = first_rows(rows, 32 * self.vocab_size, self.config.seed)
        few = len(sample) < self.vocab_size
        if few:
            repeats = -(-self.vocab_size // len(sample))
            generator = torch.Generator().manual_seed(self.config.seed % (1 << 63))
            noise = torch.randn(len(sample) * repeats, self.dim, generator=generator)
            sample = sample.repeat(repeats, 1) + 0.01 * sample.std().clamp(min=1e-3) * noise.to(sample)
        if not bool(torch.isfinite(sample).all()):  # alike on all ranks; a codebook of NaN would not recover
            return
        iterations = 0 if few else self.config.kmeans_iterations
        self.codebook.copy_(kmeans(sample, self.vocab_size, iterations))
        if world_size() > 1:
            dist.broadcast(self.codebook.data, 0)


class CountedCodebook(Codebook):
    """Counts how often each code is used, and revives those that are hardly used at vectors of the step.

    `config` has `decay`, `revive_below` and `revive_every`.
    """

    counts: Tensor
    """Running mean of each code's use per step, (codes,)."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        self.used: Tensor | None = None
        self.candidates: list[Tensor] = []

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """k-means, after which every code counts as used equally often."""
        super().start(rows)
        self.counts.fill_(len(rows) * world_size() / self.vocab_size)

    def collect(self, rows: Tensor, tokens: Tensor) -> None:
        """Count the codes used; keep the rows if codes may be revived after this step."""
        super().collect(rows, tokens)
        use = uses(tokens, self.vocab_size).float()
        self.used = use if self.used is None else self.used + use
        if self.revives(self.step):
            self.candidates.append(rows)

    def revives(self, step: int) -> bool:
        """Whether codes are revived after this step."""
        return (step + 1) % self.config.revive_every == 0

    def matters(self, step: int) -> bool:
        """Also whether codes are revived after it."""
        return super().matters(step) or self.revives(step)

    def forget(self) -> None:
        """Drop counts and rows."""
        super().forget()
        self.used, self.candidates = None, []

    def dead_codes(self) -> tuple[Tensor, Tensor]:
        """Ids `(k,)` of codes to revive after this step, and for each a vector `(k, dim)` of the step's on all ranks,
        chosen by (seed, step) alone. None while the step has vectors that are not finite. A GPU is waited for."""
        rows = torch.cat(self.candidates)
        total = len(rows) * world_size()
        dead = (self.counts < self.config.revive_below * self.counts.mean()).nonzero().squeeze(1)[:total]
        chosen = seeded(total, len(dead), self.config.seed, self.step + 1, rows.device)
        vectors = gather_rows(rows, chosen, len(self.candidates)) if len(dead) else rows[:0]
        finite = torch.isfinite(vectors).all(1)
        return dead[finite], vectors[finite]


def rows_of(z: Tensor) -> Tensor:
    """`(B, D, *spatial)` to `(B * positions, D)`; a view when `z` is channels-last."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def map_of(rows: Tensor, z: Tensor) -> Tensor:
    """`(B * positions, D)` as a map `(B, D, *spatial)` of the size of `z`: the inverse of `rows_of`."""
    return rows.reshape(z.shape[0], *z.shape[2:], rows.shape[1]).movedim(-1, 1)


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code, `(n,)`, for rows `(n, D)` and codes `(V, D)`: argmin |e|^2 - 2 z.e, as |z|^2 does not
    matter. Only so many distances are held at a time."""
    squares, transposed = codebook.square().sum(1), codebook.t()
    held = SEARCH_ELEMENTS if rows.device.type == "cpu" else 64 * SEARCH_ELEMENTS
    parts = rows.split(max(1, held // len(codebook)))
    found = [torch.addmm(squares, part, transposed, alpha=-2).argmin(1) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


def uses(tokens: Tensor, size: int) -> Tensor:
    """How often each id occurs in `tokens` `(n,)`, int64 `(size,)`. For `torch.bincount` a GPU would be waited for."""
    return tokens.new_zeros(size).index_add_(0, tokens, torch.ones_like(tokens))


def kmeans(rows: Tensor, clusters: int, iterations: int) -> Tensor:
    """Lloyd's algorithm from the first `clusters` rows; an empty cluster stays where it was. Returns (clusters, D)."""
    centres = rows[:clusters].clone()
    for _ in range(iterations):
        tokens = nearest(rows, centres)
        counts = uses(tokens, clusters).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, tokens, rows)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average(values: Tensor) -> Tensor:
    """The mean of `values` over all ranks, which hold equally many images."""
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return values


def seeded(total: int, count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """`count` different whole numbers below `total`, a function of (seed, step) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    return torch.randperm(total, generator=generator)[:count].to(device)


def first_rows(rows: Tensor, most: int, seed: int) -> Tensor:
    """At most so many of the rows `(n, D)` of all ranks, chosen by the seed, for a codebook to start from."""
    total = len(rows) * world_size()
    return gather_rows(rows, seeded(total, min(total, most), seed, 0, rows.device))


def gather_rows(rows: Tensor, indices: Tensor, micro_batches: int = 1) -> Tensor:
    """Rows `(len(indices), D)` of the rows of all ranks, the same on every rank: each rank fills in its own, and their
    sum has them all. Indices count the ranks' rows laid end to end, one micro-batch after the other, so that they mean
    the same for any number of either. Every rank holds equally many rows, every micro-batch too."""
    if world_size() == 1:
        return rows[indices]
    size = len(rows) // micro_batches
    batch, rank, row = indices // size // world_size(), indices // size % world_size(), indices % size
    filled = torch.where((rank == dist.get_rank()).unsqueeze(1), rows[batch * size + row], 0)
    dist.all_reduce(filled)
    return filled
