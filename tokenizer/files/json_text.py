"""Untrusted JSON: bounded in size and depth, and unambiguous."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from .errors import FormatError, LimitError, shown

MAX_JSON_BYTES, MAX_DEPTH, MAX_KEYS = 1 << 20, 16, 10_000


def parse_json(data: bytes, path: Path, *, keys: int = MAX_KEYS) -> dict[str, Any]:
    """The JSON object in `data`, the content of the file `path`: at most 16 levels deep, with at most `keys` keys.

    Raises `FormatError`, also for a repeated key, NaN, Infinity, and whole numbers of more than 64 bits; and
    `LimitError`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{path}: the key {shown(twice)} appears twice")
        return found

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"{path}: {shown(constant)} is not a JSON number")

    def finite(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text)  # 1e999 would be infinite

    def whole(text: str) -> int:
        if len(text) > 21 or abs(int(text)) >= 1 << 64:
            raise FormatError(f"{path}: {text[:40]}{'...' * (len(text) > 40)} has more than 64 bits")
        return int(text)

    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite, parse_int=whole
        )
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    _check_size(value, path, keys)
    return value


def _check_size(value: Any, path: Path, keys: int) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        keys -= sum(len(item) for item in level if isinstance(item, dict))
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
    if level:
        raise LimitError(f"{path}: nested more than {MAX_DEPTH} levels deep")
    if keys < 0:
        raise LimitError(f"{path}: more keys than it may have")
