"""A bar of what is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress_over(steps: Sequence[T], shown: bool, unit: str = "token") -> Iterable[T]:
    """`steps`, with a bar on a terminal if it is to be shown."""
    if not shown:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc="sampling", unit=unit, leave=False, disable=None)
