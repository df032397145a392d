"""The settings of sampling, and how they choose a token.

A token is argmax(logits / temperature + Gumbel noise) (Gumbel 1954), so it is a deterministic function of its logits
and its image's own noise at its position.

Logits depend in their last bits on how they are computed: in which batch, by cached steps or by a whole pass. Each
decision therefore says whether that could have turned it; `Prior.sample` leaves those to one computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenizer.base import TokenGrid

from .filters import Kept, keep_top_k, keep_top_p

GREEDY = 1e-6
"""A temperature below this takes the likeliest id: noise would be lost in the rounding of logits / temperature."""

ADDED = ("guidance_end", "guidance_power")
"""Settings that older files do not know: written only where they are given."""
GUIDANCE = ("guidance_scale", *ADDED)
"""The settings of guidance: one that is given, and those after it, are one choice."""

S = TypeVar("S", bound="Sampler")


@dataclass(frozen=True)
class Sampler:
    """The settings of sampling, and how they choose a token. `temperature` 0 (or less than `GREEDY`) takes the
    likeliest, of equal ones the first; `top_k` keeps the k likeliest; `top_p` keeps the likeliest until their mass
    reaches p (Holtzman et al. 2019); `guidance_scale` s gives uncond + s (cond - uncond) (Ho & Salimans 2022).

    With `guidance_end` the scale s goes from `guidance_scale` to that, along the walk: (1 - w) scale + w end, where
    w = t, or (1 - cos(pi t^power)) / 2 with a `guidance_power` (power-cosine: MDT, Gao et al. 2023; RAR, Yu et al.
    2024, arXiv:2411.00776). t is the number of tokens decided before the token's block, known ones included, as a share
    of those decided before the last block: 0 at the first block (if nothing is known), 1 at the last, and r / (N - 1)
    at rank r of a chain of single tokens. It belongs to the token's place in the walk, not to how or when it is
    computed.

    A prior with more settings declares a subclass of this as its `Sampling`. Raises `ValueError` out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    guidance_end: float | None = None
    guidance_power: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))
        if not (is_number(self.temperature) and 0 <= self.temperature < float("inf")):
            raise ValueError(f"temperature must be a finite number >= 0 (got {self.temperature})")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number >= 1, or None for all (got {self.top_k})")
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1], or None for all (got {self.top_p})")
        if not (is_number(self.guidance_scale) and 0 <= self.guidance_scale < float("inf")):
            raise ValueError(f"guidance_scale must be a finite number >= 0 (got {self.guidance_scale})")
        end, power = self.guidance_end, self.guidance_power
        if end is not None and not (is_number(end) and 0 <= end < float("inf")):
            raise ValueError(f"guidance_end must be a finite number >= 0, or None (got {end})")
        if power is not None and not (is_number(power) and 0 < power < float("inf")):
            raise ValueError(f"guidance_power must be a finite number > 0, or None (got {power})")
        if self.guidance_power is not None and self.guidance_end is None:
            raise ValueError("guidance_power needs a guidance_end for the scale to go to")

    @classmethod
    def names(cls) -> list[str]:
        """The settings that there are."""
        return [field.name for field in fields(cls)]

    def check(self, grid: TokenGrid) -> None:
        """Raise `ValueError` for a setting that does not fit the grid."""

    def check_guidance(self, labelled: bool) -> None:
        """Raise `ValueError` for guidance that has nothing to guide towards."""
        if self.guides and not labelled:
            name = "guidance_scale" if self.guidance_scale != 1 else "guidance_end"
            raise ValueError(f"{name} other than 1 needs labels to guide towards")

    def for_a_walk(self: S) -> S:
        """These settings for a caller who says how the grid is walked: without those that decide it themselves."""
        return self

    def saved(self) -> dict[str, Any]:
        """As a pipeline's index holds them: those of every prior, and this prior's own where they are not the
        default."""
        values = {field: getattr(self, field.name) for field in fields(self)}
        always = set(Sampler.names()) - set(ADDED)
        return {field.name: value for field, value in values.items() if field.name in always or value != field.default}

    def told(self) -> dict[str, Any]:
        """Every setting, but for those `ADDED` that are not given: two requests of before compare as they did."""
        return {name: value for name, value in vars(self).items() if value is not None or name not in ADDED}

    @property
    def filters(self) -> bool:
        """Whether some ids may be ruled out."""
        return self.top_k is not None or self.top_p is not None

    @property
    def constant(self) -> bool:
        """Whether the scale of guidance is the same for all tokens."""
        return self.guidance_end is None or self.guidance_end == self.guidance_scale

    @property
    def guides(self) -> bool:
        """Whether some token is guided."""
        return self.guidance_scale != 1 or not self.constant

    def unguided(self: S) -> S:
        """These settings without guidance."""
        return replace(self, guidance_scale=1.0, guidance_end=None, guidance_power=None)

    def scale_at(self, t: Any) -> Any:
        """The scale of guidance at t in [0, 1], a number or a float tensor `(...)`."""
        if self.guidance_end is None or self.constant:
            return self.guidance_scale
        power, cosine = self.guidance_power, torch.cos if isinstance(t, Tensor) else math.cos
        weight = t if power is None else (1 - cosine(math.pi * t**power)) / 2
        return (1 - weight) * self.guidance_scale + weight * self.guidance_end

    def scales(self, blocks: Sequence[int]) -> list[float]:
        """The scale of guidance of each of the `blocks` of a walk."""
        before = [0, *accumulate(blocks[:-1])]
        return [self.scale_at(count / max(1, before[-1])) for count in before]

    def scales_by_rank(self, blocks: Sequence[int], device: torch.device) -> float | Tensor:
        """The scale of guidance at each rank of a walk in `blocks`, `(N,)`; a number where it is the same at all."""
        if self.constant:
            return self.guidance_scale
        ranks = [scale for scale, size in zip(self.scales(blocks), blocks, strict=True) for _ in range(size)]
        return torch.tensor(ranks, dtype=torch.float32, device=device)

    @property
    def copies(self) -> int:
        """Rows per image: guidance needs a second one, without the label, wherever in the walk it guides."""
        return 2 if self.guides else 1

    def doubled(self, rows: Tensor | None, null: int | None = None) -> Any:
        """`rows` (B, ...), a second time below if guidance needs it, filled with `null` if given. What all rows share
        (an order `(N,)`, None) stays as it is."""
        if self.copies == 1 or rows is None or (null is None and rows.ndim == 1):
            return rows
        return torch.cat([rows, rows if null is None else torch.full_like(rows, null)])

    def guide(self, logits: Tensor, scale: float | Tensor) -> Tensor:
        """Logits `(B, n, V)` from those of B conditional and then B unconditional rows; as they are without guidance.
        scale: of guidance, for all, or `(n,)` or `(B, 1)` for each position or image (`scales`, `scales_by_rank`). An
        id that either row rules out by a logit of -inf stays ruled out, at any scale."""
        if self.copies == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        by = scale[..., None] if isinstance(scale, Tensor) else scale
        guided = unconditional + by * (conditional - unconditional)
        ruled_out = (conditional == -torch.inf) | (unconditional == -torch.inf)
        return guided.masked_fill(ruled_out, -torch.inf)  # -inf - -inf is NaN, which argmax takes for the highest

    def largest(self, logits: Tensor) -> Tensor:
        """The largest |logit| but -inf of each of `logits` (..., V), `(...)`; guided: of both rows that make one."""
        sizes = logits.abs().masked_fill(logits == -torch.inf, 0).amax(-1)
        return sizes if self.copies == 1 else torch.maximum(*sizes.chunk(2))

    def widths(self, tolerance: Any, steepness: Tensor | None) -> Tensor | None:
        """By how much more than others rounding may move each logit of a steep head, `(B, n, V)`, where it moves leads
        of a logit of 1 by `tolerance`; guided: of both rows."""
        if steepness is None:
            return None
        steepest = steepness if self.copies == 1 else torch.maximum(*steepness.chunk(2))
        return steepest * (tolerance[..., None] if isinstance(tolerance, Tensor) else tolerance) / 2

    def tolerance(self, off: float, scale: Any) -> Any:
        """By how much rounding may move a lead if it moves logits by `off` before guidance with this `scale`, a number
        or `(n,)`: two logits are compared, and guidance multiplies their errors by s + |s - 1|."""
        heat = 1.0 if self.temperature < GREEDY else min(1.0, self.temperature)
        return 2 * (scale + abs(scale - 1)) * off / heat

    def choose(self, logits: Tensor, noise: Tensor) -> Tensor:
        """The tokens `(...)` that follow from logits, after guidance, and Gumbel noise, both `(..., V)`."""
        return self.decide(logits, noise, logits.new_zeros(()))[0]

    def decide(
        self, logits: Tensor, noise: Tensor, tolerance: Tensor, widths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The tokens of `choose`, and bool `(...)`: whether a token's lead is within `tolerance` (...), and what both
        logits may move by themselves (`widths`), so that rounding could turn the decision."""
        if self.filters and self.temperature >= GREEDY:
            if widths is not None:  # whoever is the rival
                tolerance = tolerance + 2 * widths.amax(-1)
            ids, lead = self._best_of_some(self._tempered(logits), noise, tolerance)
        else:
            ids, lead = _best(self.scores(logits, noise), widths)
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


def is_number(value: Any) -> bool:
    """Whether a setting is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A setting that is a single number of numpy or torch as one of Python, as files hold it; another one as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _best(scores: Tensor, widths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ids `(...)` of the highest of `scores` (..., V), of equal ones the first, and their lead over the second, should
    each be off by its width to the worse."""
    ids = scores.argmax(-1, keepdim=True)  # topk may take any that are equal, and takes longer
    lowest, highest = (scores, scores) if widths is None else (scores - widths, scores + widths)
    lead = lowest.gather(-1, ids) - highest.scatter(-1, ids, -torch.inf).amax(-1, keepdim=True)
    return ids[..., 0], lead[..., 0]
