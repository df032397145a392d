"""What may be published about the source of images: nothing that is shared names a folder of this machine."""

from __future__ import annotations

import os
import re
from typing import Any

LOCAL = "(a folder of whoever trained this: give data.source)"
"""Replaces a folder in what is uploaded. Loading images from it fails with a message that no such folder exists."""
FOLDER = "a local folder of images"
HUB_NAME = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
TOKENS = "tokens"
"""In provenance, where the token dataset is that a prior was trained on: of no use elsewhere."""
REMARK = "("  # begins a text in place of a source, which says why there is none


def is_local(source: str) -> bool:
    """Whether a source of images is a path: one that exists, or one that can be nothing else."""
    if source == "digits" or "://" in source:
        return False
    there = os.path.lexists(os.path.expanduser(source))
    return there or not (source.startswith(REMARK) or re.fullmatch(HUB_NAME, source))


def place_of(source: str) -> str:
    """A source by its full path, if it is one here; another as it is."""
    return os.path.realpath(os.path.expanduser(source)) if is_local(source) else source


def public_source(source: str, local: bool = False) -> str:
    """The source as it may be published: `LOCAL` for a path (`local`: it was a path where it was used), and a URL
    without user, password and query, which may hold keys."""
    if local or is_local(source):
        return LOCAL
    if "://" not in source:
        return source
    place = re.sub("://[^/]*@", "://", source, count=1)
    return place.partition("?")[0] if place.startswith("http") else place  # elsewhere it is part of a pattern


def describe_source(source: str) -> str:
    """Return a source in words for a reader."""
    public = public_source(source)
    return FOLDER if public == LOCAL else public


def shareable(facts: dict[str, Any]) -> dict[str, Any]:
    """A copy of a pipeline's provenance, or of a token dataset's `source` and `parts`, which may be uploaded."""
    private = {source for source in sources_in(facts) if is_local(source)}
    private |= sources_in(facts.get("data")) if facts.get("local") else set()

    def shared(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: shared(inner, name) for name, inner in value.items() if name != TOKENS}
        if isinstance(value, list):
            return [shared(inner) for inner in value]
        if key == "source" and isinstance(value, str):
            return public_source(value, value in private)
        if key == "feature_origin" and isinstance(value, str):
            for source in private:
                value = value.replace(f" on {source},", f" on {FOLDER},")
        return value

    return shared(facts)


def sources_in(facts: Any) -> set[str]:
    """All sources of images that provenance names."""
    if isinstance(facts, list):
        return set().union(*map(sources_in, facts))
    if not isinstance(facts, dict):
        return set()
    own = {facts["source"]} if isinstance(facts.get("source"), str) else set()
    return own.union(*map(sources_in, facts.values()))


def describe_for_card(facts: dict[str, Any]) -> str | None:
    """The training images of a pipeline with this `shareable` provenance, in the words of its card; None if they are
    not known."""
    source = facts.get("data", {}).get("source")
    if source == LOCAL:
        return FOLDER
    return f"`{source}`" if source and not source.startswith(REMARK) else None
