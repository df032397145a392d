"""Sampling: settings, noise, and the loop that draws one block of tokens after another.

A token is argmax(logits / temperature + Gumbel noise) (Gumbel 1954), a function of its logits and of its image's noise.
The noise is a hash of (key, use, rank, id), so it does not depend on the device, the batch or the part of an image that
is computed. Different ways of computing the same logits therefore draw the same tokens, unless two candidates tie
within rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import accumulate
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenizer.base import TokenGrid
from tokenizer.precision import at_least_float32, finest, in_finest

from .compiling import can_compile, compiled
from .conditions import LABEL, Condition, Given, join_rows, make_condition, select_rows
from .cuda_graph import Graph, compute_by_graph
from .orders import Partition, blocks_after_known, known_first

if TYPE_CHECKING:
    from .base import Prior

T = TypeVar("T")
S = TypeVar("S", bound="SamplingOptions")

Order = Tensor | str | Partition | None
"""A name; raster indices `(N,)` or `(B, N)`, cut into the model's own blocks; an order with its blocks; or None for the
model's own."""

# Noise

TOKENS, ORDERS, CONFIDENCE, MASKS = range(4)
"""Uses of noise; each use of an image's key has independent noise."""
GOLDEN, MIX_1, MIX_2 = (
    -0x61C8864680B583EB,
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
)  # constants of splitmix64, as signed integers
NUMBERS_AT_ONCE = 1 << 20

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_keys(generator: Generators, num_images: int) -> Tensor:
    """Draw the key of each image, int64 `(num_images,)` on the CPU, from its own generator or all from a single one
    (None means torch's global generator). Generators advance, so a second call gives other images. Raises `ValueError`
    unless a list has one generator per image, and `TypeError` for other types."""
    listed = isinstance(generator, Sequence)
    each: list[Any] = list(generator) if isinstance(generator, Sequence) else [generator] * num_images
    allowed = (torch.Generator,) if listed else (torch.Generator, type(None))
    if others := [type(one).__name__ for one in each if not isinstance(one, allowed)]:
        raise TypeError(f"generator should be a torch.Generator, or a list of them (got {others[0]})")
    if len(each) != num_images:
        raise ValueError(f"got {len(each)} generators for {num_images} images; give one, or one per image")
    keys = [
        torch.randint((1 << 63) - 1, (), generator=one, device="cpu" if one is None else one.device).cpu()
        for one in each
    ]
    return torch.stack(keys)


def hash_counters(keys: Tensor, use: int, first: int, count: int) -> Tensor:
    """Hash (key, use, first), ..., (key, use, first + count - 1) to int64 `(B, count)`: the outputs of a splitmix64
    generator (Steele et al. 2014) seeded by key and use, computed independently of one another."""
    return _hash(keys, use, torch.arange(first + 1, first + count + 1, device=keys.device))


def _hash(keys: Tensor, use: int, counters: Tensor) -> Tensor:
    seeds = _mix(_mix(keys.clone()) + use)
    return _mix(seeds[:, None] + counters * GOLDEN)


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers in place. (torch's shifts are arithmetic; the masks clear the sign bits.)"""
    x ^= (x >> 30) & ((1 << 34) - 1)
    x *= MIX_1
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= MIX_2
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def uniform_noise(keys: Tensor, use: int, first: int, count: int) -> Tensor:
    """Return uniform variates in (0, 1), float64 `(B, count)`; on the CPU if the device of `keys` has no float64."""
    if finest(keys.device) != torch.float64:
        keys = keys.cpu()
    return _to_uniform(hash_counters(keys, use, first, count))


def _to_uniform(hashes: Tensor) -> Tensor:
    bits = (hashes >> 12) & ((1 << 52) - 1)
    return bits.double().add_(0.5).mul_(2.0**-52)


def gumbel_noise(keys: Tensor, use: int, first: int, count: int) -> Tensor:
    """Return Gumbel variates, float32 `(B, count)`, on the device of `keys`."""
    return _to_gumbel(uniform_noise(keys, use, first, count)).to(keys.device)


def _to_gumbel(uniform: Tensor) -> Tensor:
    return uniform.log_().neg_().log_().neg_().float()


def fused_gumbel_noise(keys: Tensor, use: int, first: int, count: int) -> Tensor:
    """Return the same variates from one compiled kernel: the same hashes, and logarithms within an ulp of float64."""
    return _compiled_noise()(keys, use, torch.arange(first + 1, first + count + 1, device=keys.device))


@cache
def _compiled_noise() -> Callable[[Tensor, int, Tensor], Tensor]:
    return compiled(lambda *given: _to_gumbel(_to_uniform(_hash(*given))))


def draw_numbers(keys: Tensor, use: int, count: int) -> Tensor:
    """Draw a uniform integer from 0 to `count` - 1 for each image: int64 `(B,)`."""
    drawn = (uniform_noise(keys, use, 0, 1)[:, 0] * count).long().clamp(max=count - 1)
    return drawn.to(keys.device)


class TokenNoise:
    """The Gumbel noise of a batch's tokens by rank, computed for many ranks at a time. A batch for which one rank fills
    a GPU uses a fused kernel, which takes seconds to compile."""

    def __init__(self, keys: Tensor, num_tokens: int, vocab_size: int) -> None:
        self.keys, self.num_tokens, self.vocab_size = keys, num_tokens, vocab_size
        self.at_once = max(1, NUMBERS_AT_ONCE // (max(1, len(keys)) * vocab_size))
        fuses = len(keys) * vocab_size >= NUMBERS_AT_ONCE and can_compile(keys.device)
        self.draw = fused_gumbel_noise if fuses else gumbel_noise
        self.begin = self.end = 0
        self.noise = torch.empty(0)

    def of_ranks(self, begin: int, end: int) -> Tensor:
        """Return noise `(B, end - begin, V)` of the ranks from `begin` to `end` - 1."""
        if begin < self.begin or end > self.end:
            self.begin, self.end = begin, max(end, min(begin + self.at_once, self.num_tokens))
            count = (self.end - begin) * self.vocab_size
            noise = self.draw(self.keys, TOKENS, begin * self.vocab_size, count)
            self.noise = noise.view(len(self.keys), -1, self.vocab_size)
        return self.noise[:, begin - self.begin : end - self.begin]


# Settings

GREEDY = 1e-6
"""Below this temperature the likeliest id is chosen, because rounding of logits / temperature would swallow the
noise."""
GUIDANCE = ("guidance_scale", "guidance_end", "guidance_power")
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

    A prior with more settings declares a subclass as its `Sampling`. Raises `ValueError` for values out of range.
    """

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
        if self.guidance_on is not None:
            names = [self.guidance_on] if isinstance(self.guidance_on, str) else self.guidance_on
            if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"guidance_on must name one or more columns, or be None for all (got {names})")
            object.__setattr__(self, "guidance_on", tuple(names))
        if self.guidance_power is not None and self.guidance_end is None:
            raise ValueError("guidance_power needs guidance_end, the final scale")

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the settings."""
        return [field.name for field in fields(cls)]

    def check(self, grid: TokenGrid) -> None:
        """Raise `ValueError` for settings that do not suit the grid."""

    def check_guidance(self, given: Collection[str]) -> None:
        """Raise `ValueError` for guidance without a condition to remove. given: the names of given columns, and
        `label` for labels."""
        if self.guides and not self.can_guide(given):
            name = "guidance_scale" if self.guidance_scale != 1 else "guidance_end"
            needs = "labels or a condition" if self.guidance_on is None else f"a value of {', '.join(self.guidance_on)}"
            raise ValueError(f"{name} other than 1 needs {needs}")

    def can_guide(self, given: Collection[str]) -> bool:
        """Return whether guidance removes one of the `given` columns."""
        return bool(given if self.guidance_on is None else set(self.guidance_on).intersection(given))

    def for_given_order(self: S) -> S:
        """Return these settings without those that choose an order, for a caller that passes its own."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are not None, as a pipeline's index stores them."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def describe(self, without: Collection[str] = ()) -> str:
        """Format the settings that differ from the defaults, as keys of `generate`, except those named `without`."""
        changed = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        return ", ".join(f"{name}={getattr(self, name)}" for name in changed if name not in without)

    # Guidance

    @property
    def has_constant_scale(self) -> bool:
        """Whether all tokens have the same guidance scale."""
        return self.guidance_end is None or self.guidance_end == self.guidance_scale

    @property
    def guides(self) -> bool:
        """Whether any token is guided."""
        return self.guidance_scale != 1 or not self.has_constant_scale

    def unguided(self: S) -> S:
        """Return these settings without guidance."""
        return replace(self, guidance_scale=1.0, guidance_end=None, guidance_power=None, guidance_on=None)

    def scale_at(self, t: Any) -> Any:
        """Return the guidance scale at t in [0, 1], a number or a float tensor `(...)`."""
        if self.guidance_end is None or self.has_constant_scale:
            return self.guidance_scale
        power, cosine = self.guidance_power, torch.cos if isinstance(t, Tensor) else math.cos
        weight = t if power is None else (1 - cosine(math.pi * t**power)) / 2
        return (1 - weight) * self.guidance_scale + weight * self.guidance_end

    def scale_by_block(self, blocks: Sequence[int]) -> list[float]:
        """Return the guidance scale of each block."""
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
        """Number of rows per image: guidance adds an unconditional row."""
        return 2 if self.guides else 1

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


def likeliest(logits: Tensor, mass: float) -> Tensor:
    """Mark the likeliest ids until their probabilities reach `mass`, bool `(..., V)`; ties keep the first. An id is
    kept if the probabilities before it sum to less: of 0.5, 0.3, 0.2, two ids are kept for 0.7."""
    ordered, ids = in_finest(logits).sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = (probabilities.cumsum(-1) - probabilities).masked_fill(ordered == -torch.inf, torch.inf)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, before < mass)


def as_tensor(values: Any, device: torch.device | None = None) -> Tensor:
    """Convert numbers, arrays, or lists of tensors to a tensor."""
    listed = isinstance(values, (list, tuple)) and any(isinstance(one, (Tensor, np.ndarray)) for one in values)
    if listed or isinstance(values, np.ndarray):
        values = np.asarray(
            values, order="C"
        )  # torch accepts neither lists of tensors nor arrays with negative strides
    return torch.as_tensor(values, device=device)


def is_integer(dtype: torch.dtype) -> bool:
    """Return whether a type is an integer type."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def is_number(value: Any) -> bool:
    """Return whether `value` is an int or a float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole_number(name: str, value: Any) -> int:
    """Return `value`, the argument `name`, as an int. Raises `ValueError` unless it is a whole number."""
    try:
        found = None if isinstance(value, bool) else index(value)
    except TypeError:
        found = None
    if found is None:
        raise ValueError(f"{name} must be a whole number (got {value!r})")
    return found


def check_count(count: Any, name: str = "num_images") -> int:
    """Return `count`, the argument `name`, as an int. Raises `ValueError` unless it is a positive whole number."""
    found = whole_number(name, count)
    if found < 1:
        raise ValueError(f"{name} must be at least 1 (got {found})")
    return found


def select_order(order: Any, rows: slice | Sequence[int], count: int) -> Any:
    """Select the orders of the images `rows` out of `count`, if `order` is per image. order: a name, a tensor, a
    `Partition` or None. Raises `ValueError` if the number of orders is not `count`."""
    if order is None or isinstance(order, str):
        return order
    if isinstance(order, Partition):
        return Partition(select_order(order.order, rows, count), order.blocks)
    indices = as_tensor(order)
    if indices.ndim < 2:
        return indices
    if len(indices) != count:
        raise ValueError(f"order: got {len(indices)} for {count} images; give one, or one per image")
    return indices[rows]


@dataclass(frozen=True)
class DecodingOptions:
    """How tokens are decoded: in a given `order`, or in one of `num_orders` orders per image; step by step, with or
    without a `cache`, or in `parallel` passes over the whole grid. See `Prior.sample`."""

    order: Order = None
    num_orders: int = 1
    cache: bool = True
    parallel: bool = False

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the options."""
        return [field.name for field in fields(cls)]

    @property
    def is_default(self) -> bool:
        """Whether all options have their defaults."""
        return self.order is None and self.num_orders == 1 and self.cache and not self.parallel

    def select(self, rows: slice | Sequence[int], count: int) -> DecodingOptions:
        """Return the options of the images `rows` out of `count`. Raises `ValueError` as `select_order` does."""
        return replace(self, order=select_order(self.order, rows, count))

    def check(self) -> None:
        """Raise `ValueError` for mutually exclusive options."""
        if self.parallel and not self.cache:
            raise ValueError("cache=False cannot be combined with parallel=True, which never uses a cache")


# A batch


@dataclass
class SampleBatch:
    """Images to draw, one per row: labels `(B,)`, noise keys `(B,)`, and tokens to keep where bool `known` is True.
    `tokens` and `known` are `(B, N)` in the sequence of `order`, `(N,)` or `(B, N)`, which `blocks` cut. rows: indices
    of these images in the request; condition: raw columns; own_order: whether order and blocks are the model's."""

    labels: Tensor
    keys: Tensor
    tokens: Tensor
    known: Tensor
    order: Tensor
    blocks: tuple[int, ...]
    rows: Tensor
    condition: Condition
    own_order: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: slice | Tensor) -> SampleBatch:
        return replace(
            self,
            labels=self.labels[at],
            keys=self.keys[at],
            tokens=self.tokens[at],
            known=self.known[at],
            order=self.order if self.order.ndim == 1 else self.order[at],
            rows=self.rows[at],
            condition=select_rows(self.condition, at),
        )

    def in_order(self, partition: Partition | None, prior: Prior) -> SampleBatch:
        """Rearrange a batch from raster order to the order and blocks of `partition`; None selects the model's own."""
        order, blocks = (prior.order, prior.blocks) if partition is None else partition
        wide = order.expand(self.tokens.shape)
        tokens, known = self.tokens.gather(1, wide), self.known.gather(1, wide)
        own = partition is None
        return replace(self, tokens=tokens, known=known, order=order, blocks=blocks, own_order=own)

    def to_raster(self, values: Tensor) -> Tensor:
        """Rearrange `values` `(B, N)` from decoding order to raster order."""
        return torch.empty_like(values).scatter_(1, self.order.expand(values.shape), values)

    def partition(self) -> Partition | None:
        """Return order and blocks; None for the model's own."""
        return None if self.own_order else Partition(self.order, self.blocks)

    def group_by_blocks(self) -> Iterator[SampleBatch]:
        """Yield groups of images with equal blocks. If known tokens come first, they form a single block, so images
        with equally many known tokens form a group; otherwise there is one group."""
        if max(self.blocks) == 1 or self.own_order or not bool(self.known.any()):
            yield self
            return
        counts = self.known.sum(1)
        for count in counts.unique().tolist():
            group = self[torch.nonzero(counts == count)[:, 0]]
            yield replace(group, blocks=blocks_after_known(self.blocks, count))

    def split(self, size: int) -> Iterator[SampleBatch]:
        """Yield parts of at most `size` images."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


def make_batch(
    prior: Prior,
    num_images: int,
    labels: Tensor | None,
    condition: Mapping[str, Any] | None,
    options: SamplingOptions,
    generator: Generators,
    tokens: Tensor | None,
    known: Tensor | None,
) -> SampleBatch:
    """Check a request and return its images in raster order. Raises `ValueError` for arguments out of range."""
    num_images = check_count(num_images)
    labels = check_labels(prior, labels, num_images)
    columns = make_condition(prior.conditions, condition, num_images, prior.device)
    given = [name for name, value in (condition or {}).items() if value is not None]
    options.check_guidance(given if labels is None else [LABEL, *given])
    tokens, known = check_known(prior, tokens, known, num_images)
    raster, rows = torch.arange(len(prior.grid), device=prior.device), torch.arange(num_images, device=prior.device)
    keys = draw_keys(generator, num_images).to(prior.device)
    if labels is None:
        labels = torch.full((num_images,), prior.num_classes, device=prior.device)
    return SampleBatch(labels, keys, tokens, known, raster, prior.blocks, rows, columns)


def encode_rows(prior: Prior, batch: SampleBatch, options: SamplingOptions) -> Given:
    """Encode the condition of each image and, with guidance, of as many rows without what guidance removes."""
    labels, removed = batch.labels, options.guidance_on
    given = prior.encode_condition(labels, len(batch), batch.condition)
    if not options.guides:
        return given
    if removed is None:  # all unconditional rows are equal, so one is encoded
        return join_rows(given, prior.encode_condition(None, 1)[torch.zeros_like(labels)])
    labels = torch.full_like(labels, prior.num_classes) if LABEL in removed else labels
    rest = {name: values for name, values in batch.condition.items() if name not in removed}
    return join_rows(given, prior.encode_condition(labels, len(batch), rest))


def check_labels(prior: Prior, labels: Tensor | None, count: int) -> Tensor | None:
    """Convert `labels` to int64 `(count,)` on the model's device. Raises `ValueError` outside `[0, num_classes]`."""
    if labels is None:
        return None
    if isinstance(labels, (list, tuple)):
        labels = [prior.num_classes if one is None else whole_number("labels", one) for one in labels]
        labels = torch.tensor(labels, dtype=torch.long)
    labels = as_tensor(labels, prior.device)
    if labels.shape != (count,) or not is_integer(labels.dtype):
        raise ValueError(f"labels should be {count} whole numbers, got {labels.dtype} of {tuple(labels.shape)}")
    labels = labels.long()  # torch has no `min` for uint16
    if count and (int(labels.min()) < 0 or int(labels.max()) > prior.num_classes):
        raise ValueError(
            f"labels should lie in [0, {prior.num_classes}) (and {prior.num_classes} is the null class), "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    return labels


def check_known(prior: Prior, tokens: Tensor | None, known: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Return the known tokens (0 elsewhere) and bool `known`, both `(count, N)`. Raises `ValueError` if only one is
    given, and for a wrong shape or type or ids out of range."""
    if (tokens is None) != (known is None):
        raise ValueError("give `tokens` and `known` together: `known` marks the tokens to keep")
    if tokens is None or known is None:
        empty = torch.zeros(count, len(prior.grid), dtype=torch.long, device=prior.device)
        return empty, empty.bool()
    shape, tokens, known = (count, *prior.grid.shape), as_tensor(tokens), as_tensor(known)
    if known.dtype != torch.bool or tuple(known.shape) not in (shape, prior.grid.shape):
        raise ValueError(
            f"known should be bool of shape {prior.grid.shape} or {shape}, got {known.dtype} of {tuple(known.shape)}"
        )
    if not is_integer(tokens.dtype) or tuple(tokens.shape) not in (shape, prior.grid.shape):
        found = f"{tokens.dtype} of {tuple(tokens.shape)}"
        raise ValueError(f"tokens should be whole numbers of shape {prior.grid.shape} or {shape}, got {found}")
    known = known.to(prior.device).expand(shape).flatten(1)
    tokens = torch.where(known, tokens.to(prior.device).expand(shape).flatten(1).long(), 0)
    prior.grid.check(tokens.reshape(shape))
    return tokens, known


def choose_orders(prior: Prior, options: DecodingOptions, batch: SampleBatch) -> Partition | None:
    """Choose the order and blocks of each image; None means the model's own. batch: in raster order.

    A model with `any_order` decodes known tokens first. With several orders, each image's key selects one. With blocks
    of one token, the choice is in proportion to the probability that the order gives to the known tokens, which come
    first. Otherwise it is uniform, because known tokens form one block, whose probability is the same in all orders.
    """
    orders = [prior.check_order(one, len(batch)) for one in prior.orders(options.num_orders, options.order)]
    order, blocks = orders[0] or (prior.order, prior.blocks)
    if len(orders) > 1:
        each = [prior.order if one is None else one.order for one in orders]
        candidates = torch.stack([known_first(one, batch.known) for one in each])  # (orders, B, N)
        chosen = choose_by_known(prior, batch, candidates, blocks)
        order = candidates[chosen, torch.arange(len(batch), device=chosen.device)]
    elif prior.any_order and bool(batch.known.any()):
        order = known_first(order, batch.known)
    elif orders[0] is None:
        return None
    if order.ndim == 2 and bool((order == order[:1]).all()):
        order = order[0]
    return Partition(order, blocks)


def choose_by_known(prior: Prior, batch: SampleBatch, candidates: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Draw an order `(B,)` for each image from its `candidates` (orders, B, N), in which known tokens come first: in
    proportion to the probability of the known tokens, or uniformly if blocks hold several tokens."""
    scores = torch.zeros(len(batch), len(candidates), device=batch.keys.device)
    if max(blocks) == 1 and bool(batch.known.any()):
        tokens = batch.tokens.unflatten(1, prior.grid.shape)
        given = prior.encode_condition(batch.labels, len(batch), batch.condition)
        for number, order in enumerate(candidates):
            each = prior.chain_log_probs(tokens, given, Partition(order, blocks)).flatten(1)
            scores[:, number] = in_finest(each).masked_fill(~batch.known, 0).sum(1).float()
    return (scores + gumbel_noise(batch.keys, ORDERS, 0, len(candidates))).argmax(1)


# Progress


class Step:
    """A decoding step, as passed to `on_step`. Nothing is copied, and no GPU sync happens, until a property is read.

    number: step index from 0, over all parts of a request.
    """

    def __init__(self, number: int, decided: int | Tensor, read: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.number, self._decided, self._read = number, decided, read

    @property
    def rank(self) -> int:
        """How many tokens of each image being drawn are decided or known, along its order."""
        return self._decided if isinstance(self._decided, int) else int(self._decided.sum(1).min())

    @cached_property
    def _state(self) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # the caller may train on copies
            return self._read()

    @property
    def tokens(self) -> Tensor:
        """A copy of all images' tokens so far, `(B, *grid.shape)`; 0 where undecided."""
        return self._state[0]

    @property
    def known(self) -> Tensor:
        """Whether each token is decided or was given, bool `(B, *grid.shape)`."""
        return self._state[1]


OnStep = Callable[[Step], Any]


class Monitor:
    """Reports the progress of one request: a bar (bar: True, or arguments of `tqdm`), and `on_step` after each step.
    batch: all images, in raster order."""

    def __init__(
        self, bar: bool | Mapping[str, Any], on_step: OnStep | None, batch: SampleBatch, grid: TokenGrid
    ) -> None:
        self.bar, self.on_step, self.shape = bar, on_step, grid.shape
        self.tokens, self.known = batch.tokens.clone(), batch.known.clone()
        self.num_steps = 0

    def iterate(self, steps: Sequence[T]) -> Iterable[T]:
        """Iterate over `steps` with the bar."""
        return progress_bar(steps, self.bar, unit="pass")

    def report(self, batch: SampleBatch, drawn: Tensor, decided: int | Tensor) -> None:
        """Report a step. drawn: `(b, N)`, in the sequence of `batch`; decided: how many of the first tokens are
        decided, or which, bool `(b, N)`. An exception in `on_step` ends sampling."""
        if self.on_step is None:
            return

        def read() -> tuple[Tensor, Tensor]:
            ranks = torch.arange(drawn.shape[1], device=drawn.device)
            known = batch.known | (decided if isinstance(decided, Tensor) else ranks < decided)
            tokens, every = self.tokens.clone(), self.known.clone()
            tokens[batch.rows] = batch.to_raster(torch.where(known, drawn, 0))
            every[batch.rows] = batch.to_raster(known)
            return tokens.unflatten(1, self.shape), every.unflatten(1, self.shape)

        step = Step(self.num_steps, decided, read)
        self.num_steps += 1
        with torch.inference_mode(False), torch.no_grad():
            self.on_step(step)

    def finish(self, batch: SampleBatch, drawn: Tensor) -> None:
        """Store the tokens of finished images."""
        self.tokens[batch.rows] = batch.to_raster(drawn)
        self.known[batch.rows] = True


def progress_bar(steps: Sequence[T], bar: bool | Mapping[str, Any], unit: str = "token") -> Iterable[T]:
    """Iterate over `steps`, with a bar on a terminal if `bar` is True or holds arguments of `tqdm`."""
    if not bar and not isinstance(bar, Mapping):
        return steps
    from tqdm import tqdm

    own = {"desc": "sampling", "unit": unit, "leave": False, "disable": None}
    return tqdm(steps, **{**own, **(bar if isinstance(bar, Mapping) else {})})


# The loop


@dataclass
class UncachedState:
    """The state of decoding without a cache: tokens so far `(B, N)`, raster order. inputs: further arguments of
    `forward`."""

    tokens: Tensor
    labels: Given
    order: Tensor
    blocks: tuple[int, ...]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    block: int = 0
    rank: int = 0

    def advance(self, tokens: Tensor | None) -> Tensor:
        """Write the last block's `tokens` `(B, m)`; return the next block's raster indices `(B, n)`."""
        order = self.order.expand(self.tokens.shape)
        if tokens is not None:
            self.tokens.scatter_(1, order[:, self.rank - tokens.shape[1] : self.rank], tokens)
        begin, self.rank = self.rank, self.rank + self.blocks[self.block]
        self.block += 1
        return order[:, begin : self.rank]


def sample_blocks(prior: Prior, batch: SampleBatch, options: SamplingOptions, cache: bool, monitor: Monitor) -> None:
    """Draw the tokens of a batch, one block per step."""
    drawn = None
    if cache and monitor.on_step is None and prior.supports_cuda_graphs and can_capture(prior.device):
        inputs = {name: getattr(batch, name) for name in ("labels", "keys", "tokens", "known", "order")}
        columns = list(batch.condition)
        inputs |= {f"condition.{name}": batch.condition[name] for name in columns}
        key = (options, batch.blocks, batch.own_order, *(tensor.shape[1:] for tensor in inputs.values()))

        def draw(inputs: dict[str, Any]) -> Tensor:
            condition = {name: inputs[f"condition.{name}"] for name in columns}
            there = {name: tensor for name, tensor in inputs.items() if "." not in name}
            return draw_blocks(prior, replace(batch, **there, condition=condition), options, cache)

        drawn = compute_by_graph(prior, key, len(batch), inputs, draw)
    if drawn is None:
        drawn = draw_blocks(prior, batch, options, cache, monitor)
    monitor.finish(batch, drawn)


def can_capture(device: torch.device) -> bool:
    """Return whether a CUDA graph can be captured on this device now. Before torch 2.12, a failed capture could abort
    the process later (pytorch#180395)."""
    if not Graph.allowed or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    return torch.__version__ >= "2.12" and not torch.cuda.is_current_stream_capturing()


def draw_blocks(
    prior: Prior, batch: SampleBatch, options: SamplingOptions, cache: bool, monitor: Monitor | None = None
) -> Tensor:
    """Draw tokens `(B, N)` eagerly. Without a monitor no control flow depends on the contents of a tensor, so a CUDA
    graph can capture all of it."""
    ends = list(accumulate(batch.blocks))
    cuts = list(zip([0, *ends], ends, strict=False))
    skipped, some_known = set[int](), True  # starts of blocks that are known in all images
    if monitor is not None:
        some_known = bool(batch.known.any())
        unknown = (~batch.known).any(0).tolist()
        last = max((rank for rank, drawn in enumerate(unknown) if drawn), default=-1)
        cuts = [(begin, end) for begin, end in cuts if begin <= last]
        skipped = {begin for begin, end in cuts if not any(unknown[begin:end])}
    given, partition = encode_rows(prior, batch, options), batch.partition()
    if partition is not None and partition.order.ndim == 2:
        partition = Partition(options.with_unconditional(partition.order), partition.blocks)
    start, next_logits = (
        (prior.start, prior.next_logits) if cache else (prior.start_uncached, prior.next_logits_uncached)
    )
    state: Any = start(len(given), given, partition)
    noise = TokenNoise(batch.keys, len(prior.grid), prior.grid.vocab_size)
    drawn, tokens = batch.tokens.clone(), None
    steps = cuts if monitor is None else monitor.iterate(cuts)
    for (begin, end), scale in zip(steps, options.scale_by_block(batch.blocks), strict=False):
        if begin in skipped and isinstance(state, UncachedState):  # a cache would need the block's keys and values
            state.advance(tokens)
        else:
            logits = options.guide(at_least_float32(next_logits(state, tokens)), scale)
            chosen = options.choose(logits, noise.of_ranks(begin, end))
            if some_known:
                chosen = torch.where(batch.known[:, begin:end], drawn[:, begin:end], chosen)
            drawn[:, begin:end] = chosen
        tokens = options.with_unconditional(drawn[:, begin:end])
        if monitor is not None:
            monitor.report(batch, drawn, end)
    return drawn
