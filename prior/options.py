"""How tokens are chosen and decoded: `SamplingOptions` and `DecodingOptions`."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenizer.base import TokenGrid
from tokenizer.precision import in_finest

from .arguments import is_number, to_tensor
from .orders import Partition

S = TypeVar("S", bound="SamplingOptions")

Order = Tensor | str | Partition | None
"""A name; raster indices `(N,)` or `(B, N)`, cut into the model's own blocks; an order with its blocks; or None for the
model's own."""

GREEDY = 1e-6  # at a lower temperature the likeliest id is chosen: logits / temperature would swallow the noise
GUIDANCE_FIELDS = ("guidance_scale", "guidance_end", "guidance_power")
"""The settings of guidance's scale: one that is given, and those after it, are one choice."""


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of sampling, and the choice of tokens by these settings.

    `temperature` 0 (or below `GREEDY`) takes the likeliest id, or the first among ties; `top_k` keeps the k likeliest
    ids and those tied with the k-th; `top_p` keeps the likeliest ids until their mass reaches p (Holtzman et al. 2019);
    `guidance_scale` s gives uncond + s (cond - uncond) (Ho & Salimans 2022).

    With `guidance_end` the scale changes from `guidance_scale` to that value along the order: (1 - w) scale + w end,
    where w = t, or (1 - cos(pi t^power)) / 2 with `guidance_power` (power-cosine: MDT, Gao et al. 2023; RAR, Yu et al.
    2024, arXiv:2411.00776). t is the number of tokens decided before the token's block, including known tokens, divided
    by the number decided before the last block: 0 at the first block, 1 at the last. `guidance_on` names the columns
    (`label` for the class) that the unconditional rows lack; None stands for all.

    A prior with more settings declares a subclass as its `Sampling`. Raises `ValueError` for values out of range."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    guidance_end: float | None = None
    guidance_power: float | None = None
    guidance_on: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, value.item() if getattr(value, "ndim", None) == 0 else value)
        check_finite("temperature", self.temperature)
        check_finite("guidance_scale", self.guidance_scale)
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number >= 1, or None for all (got {self.top_k})")
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1], or None for all (got {self.top_p})")
        if self.guidance_end is not None:
            check_finite("guidance_end", self.guidance_end)
        if self.guidance_power is not None:
            check_finite("guidance_power", self.guidance_power)
            if not self.guidance_power:
                raise ValueError("guidance_power must be > 0 (got 0)")
            if self.guidance_end is None:
                raise ValueError("guidance_power needs guidance_end")
        if self.guidance_on is not None:
            names = [self.guidance_on] if isinstance(self.guidance_on, str) else self.guidance_on
            if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"guidance_on must name one or more columns, or be None for all (got {names})")
            object.__setattr__(self, "guidance_on", tuple(names))

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    def check(self, grid: TokenGrid) -> None:
        """Raise `ValueError` for settings that do not fit the grid."""

    def check_guidance(self, given: Collection[str]) -> None:
        """Raise `ValueError` for guidance without a condition to remove. given: the names of given columns."""
        if self.guides and not self.can_guide(given):
            name = "guidance_scale" if self.guidance_scale != 1 else "guidance_end"
            needs = "labels or a condition" if self.guidance_on is None else f"a value of {', '.join(self.guidance_on)}"
            raise ValueError(f"{name} other than 1 needs {needs}")

    def can_guide(self, given: Collection[str]) -> bool:
        return bool(given if self.guidance_on is None else set(self.guidance_on).intersection(given))

    def for_given_order(self: S) -> S:
        """Return these settings without those that choose an order, for a caller that passes its own."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are not None, as a pipeline's index stores them."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def describe(self, without: Collection[str] = ()) -> str:
        """Format the settings that differ from the defaults, as keys of `generate`, except `without`."""
        changed = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        return ", ".join(f"{name}={getattr(self, name)}" for name in changed if name not in without)

    # Guidance

    @property
    def has_constant_scale(self) -> bool:
        return self.guidance_end is None or self.guidance_end == self.guidance_scale

    @property
    def guides(self) -> bool:
        return self.guidance_scale != 1 or not self.has_constant_scale

    def unguided(self: S) -> S:
        return replace(self, guidance_scale=1.0, guidance_end=None, guidance_power=None, guidance_on=None)

    def scale_at(self, t: Any) -> Any:
        """Return the guidance scale at t in [0, 1], a number or a float tensor `(...)`."""
        if self.guidance_end is None or self.has_constant_scale:
            return self.guidance_scale
        power, cosine = self.guidance_power, torch.cos if isinstance(t, Tensor) else math.cos
        weight = t if power is None else (1 - cosine(math.pi * t**power)) / 2
        return (1 - weight) * self.guidance_scale + weight * self.guidance_end

    def scale_by_block(self, blocks: Sequence[int]) -> list[float]:
        before = [0, *accumulate(blocks[:-1])]
        return [self.scale_at(count / max(1, before[-1])) for count in before]

    def scale_by_rank(self, blocks: Sequence[int], device: torch.device) -> float | Tensor:
        """Return the guidance scale of each rank, `(N,)`, or a number if it is constant."""
        if self.has_constant_scale:
            return self.guidance_scale
        ranks = [scale for scale, size in zip(self.scale_by_block(blocks), blocks, strict=True) for _ in range(size)]
        return torch.tensor(ranks, dtype=torch.float32, device=device)

    @property
    def rows_per_image(self) -> int:
        return 2 if self.guides else 1  # guidance adds an unconditional row

    def with_unconditional(self, rows: Tensor) -> Tensor:
        """With guidance, append unconditional rows to `rows` (B, ...), which are copies."""
        return torch.cat([rows, rows]) if self.guides else rows

    def guide(self, logits: Tensor, scale: float | Tensor) -> Tensor:
        """Return guided logits `(B, n, V)`, given logits of B conditional rows followed by B unconditional rows.

        scale: the guidance scale, a number, `(n,)` or `(B, 1)`. An id that either row rules out by a logit of -inf
        stays ruled out at any scale."""
        if not self.guides:
            return logits
        conditional, unconditional = logits.chunk(2)
        by = scale[..., None] if isinstance(scale, Tensor) else scale
        guided = unconditional + by * (conditional - unconditional)
        ruled_out = (conditional == -torch.inf) | (unconditional == -torch.inf)
        return guided.masked_fill(ruled_out, -torch.inf)  # -inf - -inf is NaN, which argmax treats as the maximum

    # Choosing

    def choose(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Choose tokens `(...)`, given guided logits and Gumbel noise, both `(..., V)`."""
        if self.temperature < GREEDY:
            return logits.argmax(-1)
        tempered = logits if self.temperature == 1 else logits / self.temperature
        scores = tempered + noise
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            lowest = tempered.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(tempered < lowest, -torch.inf)
            tempered = tempered.masked_fill(tempered < lowest, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            scores = scores.masked_fill(~likeliest(tempered, self.top_p), -torch.inf)
        return scores.argmax(-1)


def check_finite(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value`, the setting `name`, is a finite number >= 0."""
    if not (is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"{name} must be a finite number >= 0 (got {value})")


def likeliest(logits: Tensor, mass: float) -> Tensor:
    """Mark the likeliest ids until their probabilities reach `mass`, bool `(..., V)`; among equal ones the first. An
    id is marked if the probabilities before it sum to less: of 0.5, 0.3, 0.2, two are marked for 0.7."""
    ordered, ids = in_finest(logits).sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = (probabilities.cumsum(-1) - probabilities).masked_fill(ordered == -torch.inf, torch.inf)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, before < mass)


def select_order(order: Any, rows: slice | Sequence[int], count: int) -> Any:
    """Select the orders of the images `rows` out of `count`, if `order` is per image. Raises `ValueError` if the number
    of orders is not `count`."""
    if order is None or isinstance(order, str):
        return order
    if isinstance(order, Partition):
        return Partition(select_order(order.order, rows, count), order.blocks)
    indices = to_tensor(order)
    if indices.ndim < 2:
        return indices
    if len(indices) != count:
        raise ValueError(f"order: got {len(indices)} for {count} images; give one, or one per image")
    return indices[rows]


@dataclass(frozen=True)
class DecodingOptions:
    """How tokens are decoded.

    order, num_orders: as for `Prior.log_prob`; each image is drawn in one of the orders, all equally likely. If tokens
    are known and blocks hold one token, an order is chosen in proportion to the probability that it gives to the known
    tokens (at temperature 1, without guidance), at the cost of one pass per order; images are then samples of the
    mixture given the known tokens. cache: False recomputes everything at each step. parallel: draw the same tokens in
    fewer passes over the whole grid (`prior.parallel`)."""

    order: Order = None
    num_orders: int = 1
    cache: bool = True
    parallel: bool = False

    def __post_init__(self) -> None:
        if self.parallel and not self.cache:
            raise ValueError("cache=False cannot be combined with parallel=True, which never uses a cache")

    @property
    def is_default(self) -> bool:
        return self.order is None and self.num_orders == 1 and self.cache and not self.parallel

    def select(self, rows: slice | Sequence[int], count: int) -> DecodingOptions:
        return replace(self, order=select_order(self.order, rows, count))
