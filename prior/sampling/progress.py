"""A bar of what is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def progress_over(steps: Sequence[T], shown: bool | Mapping[str, Any], unit: str = "token") -> Iterable[T]:
    """`steps`, with a bar on a terminal if it is to be shown: True, or arguments of `tqdm` other than its own here."""
    if shown is False:
        return steps
    from tqdm import tqdm

    own = {"desc": "sampling", "unit": unit, "leave": False, "disable": None}
    return tqdm(steps, **{**own, **({} if shown is True else shown)})
