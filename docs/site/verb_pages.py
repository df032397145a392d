"""A page for each verb with all of its keys, from the configuration that `--help` reads, and a page of the presets."""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import keys
from docstrings import tidy

from pipelines.__main__ import module_of, verbs
from pipelines.config import Config


def stage(texts: dict[str, str], root: Path) -> list[Any]:
    """Write the pages; returns their part of the navigation."""
    found = verbs()
    rows = ["| command | description |", "|---|---|"]
    for verb, sentence in found.items():
        rows.append(f"| [`{verb}`]({verb}.md) | {tidy(sentence, set())} |")
        texts[f"commands/{verb}.md"] = page(verb)
    texts["commands/index.md"] = "\n\n".join(["# Commands", BEFORE, "\n".join(rows), GRAMMAR])
    texts["commands/presets_of_models.md"] = presets(root)
    verb_entries = [f"commands/{verb}.md" for verb in found]
    named = [{verb: entry} for verb, entry in zip(found, verb_entries, strict=True)]
    return ["commands/index.md", *named, {"All presets": "commands/presets_of_models.md"}]


BEFORE = "`smalti VERB` on the command line. Each page lists all keys of one command, as `smalti VERB --help all` does."
GRAMMAR = """All commands share one syntax:

- `--config FILE`: a YAML file, or the name of [a preset](presets_of_models.md). Several merge left to right.
- `key.path=value`: sets one key, and overrides the files. The value is YAML, as in `train.lr=1e-3` or `sizes=1,2`.
- `--dry-run`: prints the configuration that would run, which `--config` can read.

`accelerate launch -m pipelines.STEP` runs the five steps on one or several devices:
`train_tokenizer`, `encode`, `train_prior`, `generate`, `evaluate`."""


def page(verb: str) -> str:
    """What a verb does, and all of its keys."""
    module = importlib.import_module(f"pipelines.{module_of(verb)}")
    usage = f"```sh\nsmalti {verb} [--config FILE ...] [key=value ...] [--dry-run] [--help]\n```"
    parts = [f"# {verb}", tidy(inspect.getdoc(module) or "", set()), usage]
    configs = configs_of(module)
    for cls in configs:
        prefix = f"{cls.__name__}-" if len(configs) > 1 else ""
        if prefix:
            parts += [f"## {(cls.__doc__ or cls.__name__).splitlines()[0].rstrip('.')}"]
        for section in keys.of_verb(cls):
            if section.title:
                key, colon, sentence = section.title.partition(": ")
                parts += [f"{'#' * (3 if prefix else 2)} `{key}`", sentence if colon else ""]
            parts.append(keys.listing(section.rows, prefix=prefix))
    return "\n\n".join(part for part in parts if part)


def configs_of(module: Any) -> list[type[Any]]:
    """The configuration of a verb: that of its `main`, or those that its module defines, if it has several."""
    if isinstance(module.main, partial):
        return [module.main.args[0]]
    own = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
    configs = [cls for cls in own if issubclass(cls, Config)]
    return [cls for cls in configs if not any(cls in other.__mro__[1:] for other in configs)]


def presets(root: Path) -> str:
    """Every preset as it is."""
    parts = [
        "# Presets",
        "`--config NAME` takes these presets. Comments explain the values that differ from the defaults.",
    ]
    for path in sorted((root / "configs").glob("*/*.yaml")):
        if path.parent.name in ("tokenizer", "prior"):
            parts += [f"## {path.parent.name}/{path.stem}", f"```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"]
    return "\n\n".join(parts)
