"""The counters of the loop in a resume state: each of its kind, or the state is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizer.files import FormatError, quote

DUE = ("evaluate", "log", "preview", "save")

PRECISIONS = ("no", "bf16")


def is_number(value: Any) -> bool:
    """Whether it is a finite number from 0."""
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0."""
    return type(value) is int and value >= 0


def is_window(value: Any) -> bool:
    """Whether it holds the sum and the count of each logged term."""
    return isinstance(value, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (int, float) and is_count(pair[1])
        for pair in value.values()
    )


def is_evaluation(value: Any) -> bool:
    """Whether it holds numbers by name."""
    return isinstance(value, dict) and all(type(number) in (int, float) for number in value.values())


def is_pending(value: Any) -> bool:
    """Whether it lists what was due and not done."""
    return isinstance(value, list) and all(name in DUE for name in value)


def is_best(value: Any) -> bool:
    """Whether it says of which step weights are the best, how good they are, and what their figures are; or nothing."""
    return isinstance(value, dict) and (
        not value
        or set(value) == {"step", "score", "evaluation"}
        and is_count(value["step"])
        and type(value["score"]) in (int, float)
        and math.isfinite(value["score"])
        and is_evaluation(value["evaluation"])
    )


def is_precision(value: Any) -> bool:
    """Whether it is what a run may compute in."""
    return value in PRECISIONS


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "minutes": (is_number, "a number from 0"),
    "skipped": (is_count, "a whole number from 0"),
    "skipped_in_a_row": (is_count, "a whole number from 0"),
    "window": (is_window, "the sum and the count of each term"),
    "evaluation": (is_evaluation, "numbers by name"),
    "reported": (is_evaluation, "numbers by name"),
    "best": (is_best, "step, score and evaluation"),
    "precision": (is_precision, " or ".join(PRECISIONS)),
    "pending": (is_pending, f"names out of {', '.join(DUE)}"),
}


def check_counters(counters: dict[str, Any], path: Path) -> None:
    """Raise `FormatError` for a counter of the state file `path` that is unknown or of another kind."""
    for name, value in counters.items():
        if name not in KINDS:
            raise FormatError(
                f"{path}: counters: {quote(name)} is not known to this version; there are {', '.join(KINDS)}"
            )
        fits, expected = KINDS[name]
        if not fits(value):
            raise FormatError(f"{path}: counters: {name}: expected {expected}, found {quote(value)}")
