"""A second implementation of the sampling noise, in Python integers and floats: splitmix64 of key, use and counter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """The output function of splitmix64."""
    x &= WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def splitmix64(seed: int, first: int, count: int) -> list[int]:
    """Unsigned numbers `first`, ..., `first + count - 1` of the generator seeded with `seed`."""
    return [mix(seed + (number + 1) * GOLDEN) for number in range(first, first + count)]


def hashes(key: int, use: int, first: int, count: int) -> list[int]:
    """Unsigned hashes of (key, use, counter)."""
    return splitmix64(mix(mix(key) + use), first, count)


def uniforms(key: int, use: int, first: int, count: int) -> list[float]:
    """Variates from the upper 52 bits, each in the middle of its interval."""
    return [((number >> 12) + 0.5) / (1 << 52) for number in hashes(key, use, first, count)]


def gumbel(key: int, use: int, shape: tuple[int, ...]) -> Tensor:
    """Gumbel variates of the first counters, float32 in this shape."""
    each = [-math.log(-math.log(u)) for u in uniforms(key, use, 0, math.prod(shape))]
    return torch.tensor(each, dtype=torch.float64).float().view(shape)


def next_key(generator: torch.Generator) -> int:
    """The key that an image draws from its generator."""
    return int(torch.randint((1 << 63) - 1, (), generator=generator))
