"""Values as files have them: read, and merged."""

from __future__ import annotations

from typing import Any


def parsed_float(text: str) -> float | str:
    """`text` as a number, or unchanged if it is none."""
    try:
        return float(text)
    except ValueError:
        return text


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` merged into `old`, mappings key by key; a node whose `kind` changes is replaced. Text in the place of a
    node is its kind."""
    if "kind" in old and new.get("kind", old["kind"]) != old["kind"]:
        old = {}
    nodes = [key for key, value in old.items() if isinstance(value, dict) and "kind" in value]
    new = {**new, **{key: {"kind": new[key]} for key in nodes if isinstance(new.get(key), str)}}
    both = [key for key in new if isinstance(old.get(key), dict) and isinstance(new[key], dict)]
    return {**old, **new, **{key: merge(old[key], new[key]) for key in both}}
