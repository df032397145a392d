"""Sources of images in a form that may be published: shared files never contain a local path."""

from __future__ import annotations

import os
import re
from typing import Any

from .splits import SPLITS_KEY, publish_splits

LOCAL = "(a folder of whoever trained this: give data.source)"
"""Replaces a folder in uploads. Loading images from it fails, because no such folder exists."""
FOLDER = "a local folder of images"
HUB_NAME = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
TOKENS_KEY = "tokens"  # key of the token dataset's path in a prior's provenance; useless on other machines
REMARK = "("  # starts a remark in place of a source, such as `LOCAL`


def is_local(source: str) -> bool:
    """Whether a source of images is a path: it exists, or cannot be anything else."""
    if source == "digits" or "://" in source:
        return False
    there = os.path.lexists(os.path.expanduser(source))
    return there or not (source.startswith(REMARK) or re.fullmatch(HUB_NAME, source))


def resolve_source(source: str) -> str:
    """Return the full path of a local source, and any other source unchanged."""
    return os.path.realpath(os.path.expanduser(source)) if is_local(source) else source


def public_source(source: str, local: bool = False) -> str:
    """Return the form of a source that may be published: `LOCAL` for a path, and a URL without user, password and
    query, which may contain keys. local: the source was a path on the machine that used it."""
    if local or is_local(source):
        return LOCAL
    if "://" not in source:
        return source
    place = re.sub("://[^/]*@", "://", source, count=1)
    return place.partition("?")[0] if place.startswith("http") else place  # in other URLs, ? is part of a pattern


def describe_source(source: str) -> str:
    public = public_source(source)
    return FOLDER if public == LOCAL else public


def shareable(facts: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a pipeline's provenance, or of a token dataset's `source`, that may be uploaded."""
    private = {source for source in find_sources(facts) if is_local(source)}
    private |= find_sources(facts.get("data")) if facts.get("local") else set()

    def shared(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            value = publish_splits(value) if key == SPLITS_KEY else value
            return {name: shared(inner, name) for name, inner in value.items() if name != TOKENS_KEY}
        if isinstance(value, list):
            return [shared(inner) for inner in value]
        if key == "source" and isinstance(value, str):
            return public_source(value, value in private)
        if key == "feature_origin" and isinstance(value, str):
            for source in private:
                value = value.replace(f" on {source},", f" on {FOLDER},")
        return value

    return shared(facts)


def find_sources(facts: Any) -> set[str]:
    """Return all sources of images in the provenance."""
    if isinstance(facts, list):
        return set().union(*map(find_sources, facts))
    if not isinstance(facts, dict):
        return set()
    own = {facts["source"]} if isinstance(facts.get("source"), str) else set()
    return own.union(*map(find_sources, facts.values()))


def describe_for_card(facts: dict[str, Any]) -> str | None:
    """Describe the training images for a model card, from `shareable` provenance; None if they are not known."""
    source = facts.get("data", {}).get("source")
    if source == LOCAL:
        return FOLDER
    return f"`{source}`" if source and not source.startswith(REMARK) else None
