"""Which splits of a source are used: the one to evaluate on is found by its name, and a line says what is left over.

What chooses (figures while training, the best weights) looks at `validation` images, which are carved from the split to
train on; what is reported looks at those held out.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection
from typing import Any

from tokenizer import settings

from ..config import UserError, is_first_process
from .base import DataConfig

STAND_INS = ("validation", "val", "valid", "dev")
"""What a split to evaluate on is called where there is no `test`."""
SHARE, LEAST, MOST = 0.05, 10, 2000
"""Of the split to train on, for validation: fewer than 10 images would choose by chance, and figures while training
look at 2,000 at most."""


def held_out_split(names: Collection[str], config: DataConfig, *, begun: bool = False) -> str | None:
    """The split to evaluate on, of those called `names`; None where part of `config.split` is to be held out.

    Raises `UserError` for a name that was given and is not there, though other splits are. Two are no mistakes: `test`,
    which is how to ask for that part, and any name with which a run was `begun`, when that part was held out silently.
    """
    others, wanted = [name for name in names if name != config.split], config.held_out
    if wanted is None:
        found = ["test"] if "test" in others else [name for name in STAND_INS if name in others]
        return found[0] if len(found) == 1 else None
    if wanted in others:
        return wanted
    if others and wanted != "test" and not begun:
        near = nearest_name(wanted, others)
        hint = f"; did you mean {near!r}?" if near else ""
        part = "" if "test" in others else f" (data.held_out=test holds out part of {config.split!r})"
        raise UserError(
            f"data.held_out: {config.source} has no split {wanted!r}; it has {', '.join(names)}{hint}{part}"
        )
    return None


def nearest_name(wanted: str, names: list[str]) -> str | None:
    """The split that was meant, if one is called much like it; the stand-ins for `test` are names of each other."""
    known = {name: name for name in names}
    there = [name for name in STAND_INS if name in names]
    if len(there) == 1:
        known |= dict.fromkeys(STAND_INS, there[0])
    near = difflib.get_close_matches(wanted, known, 1)
    return known[near[0]] if near else None


def tell_splits(names: Collection[str], config: DataConfig, found: str | None, part: str, how: str) -> None:
    """Say in one line what stands in for `test`, and which splits are not used; nothing where that is as one expects,
    or as one asked. part: what is taken where no split was `found`; how: what it is taken for."""
    left = [name for name in names if name not in (config.split, found)]
    usual = found == "test" or (found is None and not left)
    if not is_first_process() or (config.held_out is not None and found is not None) or (usual and not left):
        return
    why = "" if found == "test" else f"there is no {config.held_out or 'test'!r}, so "
    rest = f"; not used: {', '.join(left)}" if left else ""
    remedy = " (data.held_out=NAME takes another)" if left else ""
    taken = part if found is None else repr(found)
    print(f"data.held_out: {config.source}: {why}{taken} is {how}{rest}{remedy}", file=sys.stderr, flush=True)


def validation_count(size: int, fraction: float | None) -> int:
    """How many of the `size` images of the split to train on are for validation; see `DataConfig`."""
    if fraction is None:
        count = min(round(SHARE * size), MOST)
        return count if count >= LEAST else 0
    return max(1, round(fraction * size)) if fraction else 0


def as_begun(data: DataConfig, before: dict[str, Any] | None) -> DataConfig:
    """`data` for going on with what was begun with the configuration `before`, if anything was: the same images are
    trained on and held out."""
    return data if before is None else data.model_copy(update=settings.as_begun(DataConfig, dict(data), before))
