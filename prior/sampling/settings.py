"""The settings of sampling, and how they choose a token.

A token is argmax(logits / temperature + Gumbel noise) (Gumbel 1954), so it is a deterministic function of its logits
and its image's own noise at its position.

Logits depend in their last bits on how they are computed: in which batch, by cached steps or by a whole pass. Each
decision therefore says whether that could have turned it; `Prior.sample` leaves those to one computation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenizer.base import TokenGrid

from .filters import Kept, keep_top_k, keep_top_p

GREEDY = 1e-6
"""A temperature below this takes the likeliest id: noise would be lost in the rounding of logits / temperature."""

S = TypeVar("S", bound="Sampler")


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
        if self.filters and self.temperature >= GREEDY:
            ids, lead = self._best_of_some(self._tempered(logits), noise, tolerance)
        else:
            ids, lead = _best(self.scores(logits, noise))
        return ids, lead <= tolerance

    def scores(self, logits: Tensor, noise: Tensor) -> Tensor:
        """What is highest, `(..., V)`, at the token that is chosen, if the filters allow it."""
        return logits if self.temperature < GREEDY else self._tempered(logits) + noise

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1 else logits / self.temperature

    def _best_of_some(self, logits: Tensor, noise: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
        """`_best` among the ids that the filters keep. Ids that are nearly kept count as rivals; the lead is 0 where
        the winner itself is only just kept."""
        kept, near, certain = self._kept(logits, tolerance[..., None])
        scores = logits + noise
        ids = scores.masked_fill(~kept, -torch.inf).argmax(-1, keepdim=True)
        rivals = scores.masked_fill(~near, -torch.inf).scatter(-1, ids, -torch.inf).amax(-1)
        lead = scores.gather(-1, ids)[..., 0] - rivals
        return ids[..., 0], lead.masked_fill(~certain.gather(-1, ids)[..., 0], 0)

    def _kept(self, logits: Tensor, tolerance: Tensor) -> Kept:
        """The ids that both filters keep: `top_p` counts the mass of those that `top_k` has kept."""
        everything = torch.ones_like(logits, dtype=torch.bool)
        kept = Kept(everything, everything, everything)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = keep_top_k(logits, self.top_k, tolerance)
        if self.top_p is not None and self.top_p < 1:
            kept = keep_top_p(logits, self.top_p, tolerance, kept)
        return kept


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Ids `(...)` of the highest of `scores` (..., V), of equal ones the first, and their lead over the second."""
    ids = scores.argmax(-1, keepdim=True)  # topk may take any that are equal, and takes longer
    lead = scores.gather(-1, ids) - scores.scatter(-1, ids, -torch.inf).amax(-1, keepdim=True)
    return ids[..., 0], lead[..., 0]
