"""Settings as a page shows them: each key with its type, range, default and sentence, as `--help` has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from pipelines.config.help import Row, Section, sections


def of_kind(member: type[Any]) -> list[Row]:
    """The settings of one kind of model that a preset may hold; of what is nested in it, its kinds alone."""
    found = [section for section in sections(member.choices(), {}) if not section.kind]
    return [node_of(row) if section.node else row for section in found for row in section.rows]


def node_of(row: Row) -> Row:
    """The kinds of a node as one setting; what has no default may be left out."""
    return row._replace(key=row.key.removesuffix(".kind"), default=row.default.replace("required", "null"))


def listing(rows: Sequence[Row], prefix: str) -> str:
    """A list of keys; each can be linked to as `prefix` and the key."""
    if not rows:
        return "None."
    items = []
    for row in rows:
        link = f' id="{escape(prefix + row.key)}"' if prefix else ""
        default = "" if row.default == "required" else f" = <code>{escape(row.default)}</code>"
        needed = " <em>required</em>" if row.default == "required" else ""
        items.append(
            f"<dt{link}><code>{escape(row.key)}</code> <span>{escape(row.type)}{default}{needed}</span></dt>"
            f"<dd>{coded(row.sentence)}</dd>"
        )
    inside = "\n".join(items)
    return f'<dl class="keys">\n{inside}\n</dl>'


def coded(sentence: str) -> str:
    """A sentence as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(sentence, quote=False))


def of_verb(cls: type[Any]) -> list[Section]:
    """All keys of a verb in their sections, each once."""
    return list(dict.fromkeys(sections(cls, {})))
