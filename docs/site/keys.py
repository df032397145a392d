"""Settings as a page shows them: each key with its type, range, default and sentence, as `--help` has them."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from pipelines.config.help import Row, Section, sections


def of_kind(member: type[Any]) -> list[Row]:
    """The settings of one kind of model that a preset may hold; of what is nested in it, its kinds alone."""
    own, *nested = sections(member.choices(), {})
    return [*own.rows, *(node_of(section) for section in nested if is_node(section))]


def is_node(section: Section) -> bool:
    """Whether it is the list of the kinds that a model's own node may have."""
    return [row.key.partition(".")[2] for row in section.rows] == ["kind"]


def node_of(section: Section) -> Row:
    """That list as one setting; what has no default may be left out."""
    (row,) = section.rows
    default = "null" if row.default == "required" else row.default
    return Row(row.key.partition(".")[0], row.type, default, section.title.partition(": ")[2])


def listing(rows: list[Row], prefix: str) -> str:
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
    unique: list[Section] = []
    for section in sections(cls, {}):
        if section.rows and section not in unique:
            unique.append(section)
    return unique
