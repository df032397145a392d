"""A bar of what is drawn, and of what else takes long."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
LONG = 2.0  # seconds


def progress_over(steps: Sequence[T], shown: bool | Mapping[str, Any], unit: str = "token") -> Iterable[T]:
    """`steps`, with a bar on a terminal if it is to be shown: True, or arguments of `tqdm` other than its own here."""
    if shown is False:
        return steps
    from tqdm import tqdm

    own = {"desc": "sampling", "unit": unit, "leave": False, "disable": None}
    return tqdm(steps, **{**own, **({} if shown is True else shown)})


def progress_of_long(parts: Sequence[T], shown: bool | Mapping[str, Any], what: str) -> Iterable[T]:
    """`parts`, with a bar as by `progress_over` if they take longer than two seconds, unless another bar is there."""
    from tqdm import tqdm

    if shown is False or len(parts) < 2 or len(getattr(tqdm, "_instances", ())):
        return parts
    return progress_over(parts, {"desc": what, "delay": LONG, **({} if shown is True else shown)}, unit="part")
