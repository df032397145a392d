"""A page for each command with examples and all of its keys, from the configuration that `--help` reads."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from functools import partial
from html import escape
from typing import Any

from docstrings import to_markdown

from pipelines.__main__ import GROUPS, find_module, verbs
from pipelines.config import Config
from pipelines.config.help import KeyRow, list_sections

GRAMMAR = """All commands share one syntax:

- `--config FILE`: a YAML file, or the name of [a preset](../models/presets.md). Several merge left to right.
- `key.path=value`: sets one key, and overrides the files. The value is YAML, as in `train.lr=1e-3` or `sizes=1,2`.
- `--dry-run`: prints the configuration that would run, which `--config` can read.

`accelerate launch -m pipelines.STEP` runs one of the first five on one or several devices."""


def stage(texts: dict[str, str]) -> list[Any]:
    """Write the pages. Returns their part of the navigation."""
    sentences, parts, entries = verbs(), ["# Commands", GRAMMAR], []
    for title, group in GROUPS.items():
        rows = [f"| [`{verb}`]({verb}.md) | {to_markdown(sentences[verb])} |" for verb in group]
        parts += [f"## {title.capitalize()}", "\n".join(["| command | description |", "|---|---|", *rows])]
        entries.append({title.capitalize(): [{verb: f"commands/{verb}.md"} for verb in group]})
        for verb in group:
            texts[f"commands/{verb}.md"] = page(verb)
    texts["commands/index.md"] = "\n\n".join(parts)
    return ["commands/index.md", *entries]


def page(verb: str) -> str:
    """What a command does, its examples, and all of its keys."""
    module = importlib.import_module(f"pipelines.{find_module(verb)}")
    configs = configs_of(module)
    examples = "\n".join(f"smalti {verb} {example}".rstrip() for cls in configs for example in cls.examples)
    parts = [f"# {verb}", to_markdown(inspect.getdoc(module) or ""), f"```sh\n{examples}\n```"]
    for cls in configs:
        if len(configs) > 1:
            parts.append(f"## {(cls.__doc__ or cls.__name__).splitlines()[0].rstrip('.')}")
        for section in dict.fromkeys(list_sections(cls, {})):
            if section.title:
                key, _, sentence = section.title.partition(": ")
                parts += [f"## `{key}`", sentence]
            parts.append(list_keys(sorted(section.rows, key=lambda row: row.default != "required")))
    return "\n\n".join(part for part in parts if part)


def configs_of(module: Any) -> list[type[Config]]:
    """The configuration of a verb's `main`; of a verb with several, all that its module defines."""
    if isinstance(module.main, partial):
        return [module.main.args[0]]
    own = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
    configs = [cls for cls in own if issubclass(cls, Config)]
    return [cls for cls in configs if not any(cls in other.__mro__[1:] for other in configs)]


def list_keys(rows: Iterable[KeyRow]) -> str:
    """A list of keys, each with its type, its default and its sentence."""
    items = []
    for row in rows:
        default = " <em>required</em>" if row.default == "required" else f" = <code>{escape(row.default)}</code>"
        sentence = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(row.sentence, quote=False))
        items.append(f"<dt><code>{escape(row.key)}</code> <span>{escape(row.type)}{default}</span></dt>")
        items.append(f"<dd>{sentence}</dd>")
    return "\n".join(['<dl class="keys">', *items, "</dl>"]) if items else "None."
