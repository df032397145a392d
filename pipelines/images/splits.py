"""Chooses the splits of a source: finds the one to evaluate on by its name, and prints a line about unused ones.

Choices (figures while training, the best weights) use `validation` images, which are carved from the split to train on;
reported results use the held-out images.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tokenizer.files import one_line

from ..config import UserError, is_first_process
from ..config.terminal import tell
from .base import DataConfig
from .folders import files_below

STAND_INS = ("validation", "val", "valid", "dev")
"""Names of a split to evaluate on if there is no `test`."""
SHARE, LEAST, MOST = 0.05, 10, 2000
"""The share of the split to train on that is kept for validation, and its limits: fewer than 10 images would choose by
chance, and figures while training use at most 2,000."""


def held_out_split(names: Collection[str], config: DataConfig) -> str | None:
    """The split among `names` to evaluate on; None if part of `config.split` is to be held out.

    Raises `UserError` if `config.held_out` names a split that does not exist. `test` is allowed, and asks for part of
    `config.split`.
    """
    others, wanted = [name for name in names if name != config.split], config.held_out
    if wanted is None:
        found = ["test"] if "test" in others else [name for name in STAND_INS if name in others]
        return found[0] if len(found) == 1 else None
    if wanted in others:
        return wanted
    if wanted != "test":
        near = nearest_name(wanted, others)
        hint = f"; did you mean {near!r}?" if near else ""
        part = "" if "test" in others else f" (data.held_out=test holds out part of {config.split!r})"
        raise UserError(
            f"data.held_out: {config.source} has no split {wanted!r}; it has {', '.join(names)}{hint}{part}"
        )
    return None


def nearest_name(wanted: str, names: list[str]) -> str | None:
    """The split that was probably meant, if one has a similar name; the stand-ins for `test` count as the same name."""
    known = {name: name for name in names}
    there = [name for name in STAND_INS if name in names]
    if len(there) == 1:
        known |= dict.fromkeys(STAND_INS, there[0])
    near = difflib.get_close_matches(wanted, known, 1)
    return known[near[0]] if near else None


def tell_splits(names: Collection[str], config: DataConfig, found: str | None, part: str, how: str) -> None:
    """Print one line about what replaces `test` and which splits are not used; nothing if this is as expected or as
    configured. part: what is used if no split was `found`; how: what it is used for."""
    left = [name for name in names if name not in (config.split, found)]
    usual = found == "test" or (found is None and not left)
    if not is_first_process() or (config.held_out is not None and found is not None) or (usual and not left):
        return
    why = "" if found == "test" else f"there is no {config.held_out or 'test'!r}, so "
    rest = f"; not used: {', '.join(left)}" if left else ""
    remedy = " (data.held_out=NAME takes another)" if left else ""
    taken = part if found is None else repr(found)
    tell(one_line(f"data.held_out: {config.source}: {why}{taken} is {how}{rest}{remedy}"))


def tell_unused(root: Path, suffix: str, used: dict[Any, Any]) -> None:
    """Print one line about files with this suffix below `root` that are in none of the splits `used`, by whose names
    `datasets` found them."""
    inside = {os.path.abspath(str(file)) for files in used.values() for file in files}
    left = sorted(str(path.relative_to(root)) for path in files_below(root) if path.suffix == suffix)
    left = [name for name in left if os.path.abspath(root / name) not in inside]
    if left and is_first_process():
        more = f" and {len(left) - 1:,} more" if len(left) > 1 else ""
        splits = ", ".join(map(str, used))
        tell(one_line(f"data.source: {root}: not used: {left[0]}{more}, of no split by name (splits: {splits})"))


def validation_count(size: int, fraction: float | None) -> int:
    """The number of validation images among the `size` images of the split to train on; see `DataConfig`."""
    if fraction is None:
        count = min(round(SHARE * size), MOST)
        return count if count >= LEAST else 0
    return max(1, round(fraction * size)) if fraction else 0
