"""A generator for each image, so that its noise is its own."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch

MAX_SEED = (1 << 62) - 1
LOW_BITS = (1 << 32) - 1  # what torch's generator on a CPU keeps of a seed

Generators = torch.Generator | Sequence[torch.Generator] | None


def whole_number(name: str, value: Any) -> int:
    """`value`, of the argument `name`, as an int. Raises `ValueError` for what is no whole number."""
    try:
        found = None if isinstance(value, bool) else index(value)
    except TypeError:
        found = None
    if found is None:
        raise ValueError(f"{name} must be a whole number (got {value!r})")
    return found


def check_count(count: Any, name: str = "num_images") -> int:
    """`count`, the argument `name`, as an int. Raises `ValueError` unless it is a whole number, at least 1."""
    found = whole_number(name, count)
    if found < 1:
        raise ValueError(f"{name} must be at least 1 (got {found})")
    return found


def image_generators(generator: Generators, num_images: int) -> list[torch.Generator]:
    """One generator per image. A single generator (or None, torch's global one) seeds them in turn, so image k is the
    same however many follow it. Raises `ValueError` unless a list holds one for each, `TypeError` for what is none."""
    each = generator if isinstance(generator, Sequence) else [] if generator is None else [generator]
    if others := [type(one).__name__ for one in each if not isinstance(one, torch.Generator)]:
        raise TypeError(f"generator should be a torch.Generator, or a list of them (got {others[0]})")
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
