"""From logits to a token: temperature, top-k, top-p, guidance, and Gumbel noise that belongs to the image.

A token is argmax(logits / temperature + Gumbel noise) (Gumbel 1954), so it is a deterministic function of its logits
and its image's own noise at its position. The noise is drawn from the image's generator alone.

Logits depend in their last bits on how they are computed: in which batch, by cached steps or by a whole pass. Each
decision therefore says whether that could have turned it; `Prior.sample` leaves those to one computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tokenizer.base import TokenGrid

NOISE_BLOCK = 1 << 16  # numbers drawn at a time for one image; a function of nothing else, so that batches agree
MAX_SEED = (1 << 62) - 1
LOW_BITS = (1 << 32) - 1  # what torch's generator on a CPU keeps of a seed
GREEDY = 1e-6
"""A temperature below this takes the likeliest id: noise would be lost in the rounding of logits / temperature."""

Generators = torch.Generator | Sequence[torch.Generator] | None
S = TypeVar("S", bound="Sampler")
T = TypeVar("T")


@dataclass(frozen=True)
class Sampler:
    """The settings of sampling, and how they choose a token. `temperature` 0 (or less than `GREEDY`) takes the
    likeliest, of equal ones the first; `top_k` keeps the k likeliest; `top_p` keeps the likeliest until their mass
    reaches p (Holtzman et al. 2019); `guidance_scale` s gives uncond + s (cond - uncond) (Ho & Salimans 2022).

    A prior with more settings declares a subclass of this as its `Sampling`. Raises `ValueError` out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number >= 0 (got {self.temperature})")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number >= 1, or None for all (got {self.top_k})")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], or None for all (got {self.top_p})")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a finite number >= 0 (got {self.guidance_scale})")

    @classmethod
    def names(cls) -> list[str]:
        """The settings that there are."""
        return [field.name for field in fields(cls)]

    def check(self, grid: TokenGrid) -> None:
        """Raise `ValueError` for a setting that does not fit the grid."""

    def for_a_walk(self: S) -> S:
        """These settings for a caller who says how the grid is walked: without those that decide it themselves."""
        return self

    def saved(self) -> dict[str, Any]:
        """As a pipeline's index holds them: those of every prior, and this prior's own where they are not the
        default."""
        values = {field: getattr(self, field.name) for field in fields(self)}
        shared = Sampler.names()
        return {field.name: value for field, value in values.items() if field.name in shared or value != field.default}

    @property
    def filters(self) -> bool:
        """Whether some ids may be ruled out."""
        return self.top_k is not None or self.top_p is not None

    @property
    def copies(self) -> int:
        """Rows per image: guidance needs a second one, without the label."""
        return 1 if self.guidance_scale == 1 else 2

    def doubled(self, rows: Tensor | None, null: int | None = None) -> Any:
        """`rows` (B, ...), a second time below if guidance needs it, filled with `null` if given. What all rows share
        (an order `(N,)`, None) stays as it is."""
        if self.copies == 1 or rows is None or (null is None and rows.ndim == 1):
            return rows
        return torch.cat([rows, rows if null is None else torch.full_like(rows, null)])

    def guide(self, logits: Tensor) -> Tensor:
        """Logits `(B, V)` from those of B conditional and then B unconditional rows; as they are when scale is 1."""
        if self.guidance_scale == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def largest(self, logits: Tensor) -> Tensor:
        """The largest |logit| of each of `logits` (..., V), `(...)`; guided: of both rows that make one."""
        sizes = logits.abs().amax(-1)
        return sizes if self.guidance_scale == 1 else torch.maximum(*sizes.chunk(2))

    def tolerance(self, off: float) -> float:
        """By how much rounding may move a lead if it moves logits by `off` before guidance: two logits are compared,
        and guidance multiplies their errors by s + |s - 1|."""
        heat = 1.0 if self.temperature < GREEDY else min(1.0, self.temperature)
        return 2 * (self.guidance_scale + abs(self.guidance_scale - 1)) * off / heat

    def choose(self, logits: Tensor, noise: Tensor) -> Tensor:
        """The tokens `(...)` that follow from logits, after guidance, and Gumbel noise, both `(..., V)`."""
        return self.decide(logits, noise, logits.new_zeros(()))[0]

    def decide(self, logits: Tensor, noise: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of `choose`, and bool `(...)`: whether a token's lead is within `tolerance` (...), so that
        rounding could turn the decision."""
        if self.temperature < GREEDY:
            ids, lead = _best(logits)
        else:
            logits = logits if self.temperature == 1 else logits / self.temperature
            ids, lead = self._best_of_some(logits, noise, tolerance) if self.filters else _best(logits + noise)
        return ids, lead <= tolerance

    def _best_of_some(self, logits: Tensor, noise: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
        """`_best` among the ids that the filters keep. Ids that are nearly kept count as rivals; the lead is 0 where
        the winner itself is only just kept."""
        kept, near, certain = self._kept(logits, tolerance[..., None])
        scores = logits + noise
        ids = scores.masked_fill(~kept, -torch.inf).argmax(-1, keepdim=True)
        rivals = scores.masked_fill(~near, -torch.inf).scatter(-1, ids, -torch.inf).amax(-1)
        lead = scores.gather(-1, ids)[..., 0] - rivals
        return ids[..., 0], lead.where(certain.gather(-1, ids)[..., 0], 0)

    def _kept(self, logits: Tensor, tolerance: Tensor) -> Kept:
        """The ids that both filters keep: `top_p` counts the mass of those that `top_k` has kept."""
        everything = torch.ones_like(logits, dtype=torch.bool)
        kept = Kept(everything, everything, everything)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = keep_top_k(logits, self.top_k, tolerance)
        if self.top_p is not None and self.top_p < 1:
            kept = keep_top_p(logits, self.top_p, tolerance, kept)
        return kept


class Kept(NamedTuple):
    """bool `(..., V)`: the ids that a filter keeps; those that it keeps or might keep if rounding moved logits within
    a tolerance; and those that it keeps in any case."""

    kept: Tensor
    near: Tensor
    certain: Tensor


def keep_top_k(logits: Tensor, k: int, tolerance: Tensor) -> Kept:
    """The `k` likeliest of V > k ids, and all that are equal to the last of them. tolerance: `(..., 1)`.

        logits   5.0   3.0 | 2.9   1.0      k = 2: the boundary is between 3.0, the last, and 2.9, the first out

    With a tolerance of 0.2 the third is near, as 2.9 >= 3.0 - 0.2. Only the first is certain, as 5.0 > 2.9 + 0.2: the
    second could fall behind the third.
    """
    last, first_out = logits.topk(k + 1).values[..., -2:].split(1, -1)
    return Kept(logits >= last, logits >= last - tolerance, logits > first_out + tolerance)


def keep_top_p(logits: Tensor, p: float, tolerance: Tensor, among: Kept) -> Kept:
    """The likeliest ids `among` those kept so far until their mass reaches `p`, of equal ones the first.

        probabilities   0.5   0.3 | 0.2      p = 0.7
        mass before     0.0   0.5 | 0.8      an id is kept where the mass before it is below p

    A mass moves by no more than the tolerance, `(..., 1)`, and by the share of the ids that `top_k` itself might keep
    or not. With 0.25 of both together the third is near, as 0.8 < 0.7 + 0.25, and only the first is certain, as
    0.5 > 0.7 - 0.25. Besides, ids whose logits are within the tolerance may change places at either boundary.
    """
    ordered, ids = logits.masked_fill(~among.kept, -torch.inf).sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().softmax(-1)
    mass_before = (probabilities.cumsum(-1) - probabilities).masked_fill(ordered == -torch.inf, torch.inf)

    def below(limit: float | Tensor) -> Tensor:
        return torch.zeros_like(among.kept).scatter(-1, ids, mass_before < limit)

    shares = (logits.double() - ordered.double().logsumexp(-1, keepdim=True)).exp()
    slack = tolerance + (shares * (among.near & ~among.certain)).sum(-1, keepdim=True)
    likely = below(p + slack)
    sure = below(p - slack)
    lowest_likely = logits.masked_fill(~likely, torch.inf).amin(-1, keepdim=True)
    highest_unsure = logits.masked_fill(sure, -torch.inf).amax(-1, keepdim=True)
    near = logits >= lowest_likely - tolerance
    return Kept(below(p), near, sure & (logits > highest_unsure + tolerance))


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Ids `(...)` of the highest of `scores` (..., V), of equal ones the first, and their lead over the second."""
    ids = scores.argmax(-1, keepdim=True)  # topk may take any that are equal, and takes longer
    lead = scores.gather(-1, ids) - scores.scatter(-1, ids, -torch.inf).amax(-1, keepdim=True)
    return ids[..., 0], lead[..., 0]


def image_generators(generator: Generators, num_images: int) -> list[torch.Generator]:
    """One generator per image. A single generator (or None, torch's global one) seeds them in turn, so image k is the
    same however many follow it. Raises `ValueError` unless a list holds one for each."""
    if isinstance(generator, Sequence):
        different = len(set(map(id, generator)))
        if different != num_images or len(generator) != num_images:
            raise ValueError(f"got {different} generators for {num_images} images; each needs its own")
        return list(generator)
    device = generator.device if generator is not None else "cpu"
    return [torch.Generator(device).manual_seed(seed) for seed in image_seeds(generator, num_images)]


def image_seeds(generator: torch.Generator | None, num_images: int) -> list[int]:
    """A seed for each image, drawn in turn; one whose low 32 bits another image has is drawn again."""
    device, seeds = generator.device if generator is not None else "cpu", dict[int, int]()
    while len(seeds) < num_images:
        seed = int(torch.randint(MAX_SEED, (), generator=generator, device=device))
        seeds.setdefault(seed & LOW_BITS, seed)
    return list(seeds.values())


def progress_over(steps: Sequence[T], shown: bool, unit: str = "token") -> Iterable[T]:
    """`steps`, with a bar on a terminal if it is to be shown."""
    if not shown:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc="sampling", unit=unit, leave=False, disable=None)


class GumbelNoise:
    """The Gumbel noise of a batch of images, drawn block by block as positions are asked for in ascending order.

    Each image's block is `(positions, V)` from its own generator, so it does not depend on the rest of the batch.
    Drawn as -log(-log(u)), u uniform with 53 bits: torch's own exponential variates take seven times as long on CPU.
    """

    def __init__(self, generators: list[torch.Generator], num_tokens: int, vocab_size: int, device: torch.device):
        self.generators, self.num_tokens, self.device = generators, num_tokens, device
        self.positions = max(1, min(num_tokens, NOISE_BLOCK // vocab_size))
        self.shape = (self.positions, vocab_size)
        self.block: Tensor = torch.empty(0)
        self.drawn = 0

    def of(self, begin: int, end: int) -> Tensor:
        """Noise `(B, n, V)` of the n tokens ranked `begin` to `end` - 1; ranks are asked for in ascending order."""
        parts = []
        while begin < end:
            while begin >= self.drawn:
                self.block = self._next_block()
            first, stop = self.drawn - self.positions, min(end, self.drawn)
            parts.append(self.block[begin - first : stop - first])
            begin = stop
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)

    def _next_block(self) -> Tensor:  # (positions, B, V)
        rows = [gumbel(self.shape, generator) for generator in self.generators]
        self.drawn += self.positions
        return torch.stack(rows, 1).to(self.device)


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel variates, float32, on the generator's device (which may have no float64)."""
    kind = torch.float32 if generator.device.type == "mps" else torch.float64
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=kind)
    return uniform.log_().neg_().float().log_().neg_()
