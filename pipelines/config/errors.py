"""Which key of a verb was meant by one that it does not have."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

from tokenizer.config import MAX_PROBLEMS
from tokenizer.files import MAX_QUOTED

from .keys import sections
from .schema import Config


def search(cls: type[Config], key: str, value: Any) -> list[str]:
    """A line for each unknown key at or below `key`, up to 20, with the one that was probably meant."""
    return [one_key(cls, name) for name in islice(keys_below(key, value), MAX_PROBLEMS)]


def keys_below(key: str, value: Any) -> Iterator[str]:
    """`key`, or in its place those of the mapping that it holds."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from keys_below(f"{key}.{name}", part)
    else:
        yield key


@cache
def keys_of(cls: type[Config]) -> list[str]:
    """Every key of a verb."""
    return [row.key for section in sections(cls, {}) for row in section.rows]


def one_key(cls: type[Config], key: str) -> str:
    """The line for one unknown key."""
    rows = keys_of(cls)
    key = key if len(key) <= 2 * MAX_QUOTED else f"{key[: 2 * MAX_QUOTED - 4]} ..."
    known = {".".join(row.split(".")[:depth]): None for row in rows for depth in range(1, row.count(".") + 2)}
    if key in known:
        return f"{key}: not a key of this kind, or dots where YAML wants nested keys"
    same_name = [row for row in rows if row.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, known, 1, 0.75) or same_name or difflib.get_close_matches(key, known, 1, 0.6)
    return f"{key}: unknown key; " + (f"did you mean {near[0]!r}?" if near else "--help lists what there is")


def told_of(given: Any, line: str) -> bool:
    """Whether the line of an error is about something that was given."""
    for part in line.partition(":")[0].split("."):
        if not isinstance(given, dict) or part not in given:
            return isinstance(given, dict) is False and given is not None
        given = given[part]
    return True
