"""The noise of an image: a counter hash of its key.

A token is argmax(logits / temperature + Gumbel noise) (Gumbel 1954). The noise is a hash of (key, use, rank, id), so it
does not depend on the device, the batch or the part of an image that is computed. Different ways of computing the same
logits therefore draw the same tokens, unless two candidates tie within rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokenizer.precision import finest

from .compiling import can_compile, compiled

TOKEN_NOISE, ORDER_NOISE, CONFIDENCE_NOISE, MASK_NOISE = range(4)
"""Uses of noise; each use of an image's key has independent noise."""
GOLDEN, MIX_1, MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64, signed
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


def place_noise(keys: Tensor, use: int, places: Tensor, vocab_size: int) -> Tensor:
    """Return the Gumbel variates of tokens with the numbers `places` `(B, n)`, float32 `(B, n, vocab_size)`."""
    on = keys.device if finest(keys.device) == torch.float64 else torch.device("cpu")
    counters = places.to(on)[..., None] * vocab_size + torch.arange(1, vocab_size + 1, device=on)
    hashes = _hash(keys.to(on), use, counters.flatten(1)).view(counters.shape)
    return _to_gumbel(_to_uniform(hashes)).to(keys.device)


def fused_gumbel_noise(keys: Tensor, use: int, first: int, count: int) -> Tensor:
    """Return the same variates from one compiled kernel: the same hashes, and logarithms within an ulp of float64."""
    return _compiled_noise()(keys, use, torch.arange(first + 1, first + count + 1, device=keys.device))


@cache
def _compiled_noise() -> Callable[[Tensor, int, Tensor], Tensor]:
    return compiled(lambda *given: _to_gumbel(_to_uniform(_hash(*given))))


def draw_numbers(keys: Tensor, use: int, count: int) -> Tensor:
    """Draw a uniform integer from 0 to `count` - 1 for each image: int64 `(B,)`."""
    numbers = (uniform_noise(keys, use, 0, 1)[:, 0] * count).long().clamp(max=count - 1)
    return numbers.to(keys.device)


class TokenNoise:
    """The Gumbel noise of a batch's tokens by rank, computed for many ranks at a time. A batch for which one rank fills
    a GPU uses a fused kernel, which takes seconds to compile. places: the number of each rank's noise, `(B, N)`; None:
    the rank itself."""

    def __init__(self, keys: Tensor, num_tokens: int, vocab_size: int, places: Tensor | None = None) -> None:
        self.keys, self.num_tokens, self.vocab_size, self.places = keys, num_tokens, vocab_size, places
        self.at_once = max(1, NUMBERS_AT_ONCE // (max(1, len(keys)) * vocab_size))
        fuses = len(keys) * vocab_size >= NUMBERS_AT_ONCE and can_compile(keys.device)
        self.draw = fused_gumbel_noise if fuses else gumbel_noise
        self.begin = self.end = 0
        self.noise = torch.empty(0)

    def of_ranks(self, begin: int, end: int) -> Tensor:
        """Return noise `(B, end - begin, V)` of the ranks from `begin` to `end` - 1."""
        if begin < self.begin or end > self.end:
            self.begin, self.end = begin, max(end, min(begin + self.at_once, self.num_tokens))
            if self.places is not None:
                self.noise = place_noise(self.keys, TOKEN_NOISE, self.places[:, begin : self.end], self.vocab_size)
            else:
                count = (self.end - begin) * self.vocab_size
                noise = self.draw(self.keys, TOKEN_NOISE, begin * self.vocab_size, count)
                self.noise = noise.view(len(self.keys), -1, self.vocab_size)
        return self.noise[:, begin - self.begin : end - self.begin]
