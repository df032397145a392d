"""A page for each model: its paper, a figure drawn by the model itself, its settings, its presets and its code.

A family is found as the code finds it (`Named.available`), so a new model has a page the moment it exists.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from html import escape
from pathlib import Path
from typing import Any

import figures
import keys
import yaml
from docstrings import tidy

from tokenizer.model import Registered

# Where the pages of a family lie, its title, and what its page says before the table.
TITLES = {
    "tokenizer": ("tokenizers", "Tokenizers", "Stage one: from an image to a grid of ids and back."),
    "tokenizer.quantizers": ("quantizers", "Quantizers", "From vectors to ids, inside a tokenizer."),
    "tokenizer.likelihoods": (
        "likelihoods",
        "Likelihoods",
        "Distributions over the 256 values of a pixel, for decoders that are trained with a likelihood.",
    ),
    "prior": ("priors", "Priors", "Stage two: a distribution over grids of ids, given a class."),
    "prior.heads": ("heads", "Heads", "Output distributions of a prior at one position."),
}
CONTRACTS = {"tokenizer": "../../api/tokenizer.md", "prior": "../../api/prior.md"}


def families() -> list[Any]:
    """The families, those with a page that says more first."""
    importlib.import_module("prior")
    opened: list[Any] = [cls for cls in subclasses(Registered) if "_members" in vars(cls)]
    found = [
        cls for cls in opened if f"{cls.__module__}.".startswith(f"{cls._packages[0]}.")
    ]  # none of somebody's tests
    order = list(TITLES)
    return sorted(found, key=lambda cls: order.index(cls._packages[0]) if cls._packages[0] in order else len(order))


def subclasses(cls: type) -> list[type]:
    """All classes below `cls`."""
    children: list[type] = cls.__subclasses__()
    return [each for child in children for each in (child, *subclasses(child))]


def title_of(family: Any) -> tuple[str, str, str]:
    """Folder, title and sentence; a family that `TITLES` lacks speaks for itself."""
    said = (family.__doc__ or "").partition("\n")[0]
    return TITLES.get(family._packages[0], (family.__name__.lower(), family.__name__, said))


def stage(texts: dict[str, str], root: Path) -> list[Any]:
    """Write the pages of all families; returns their part of the navigation."""
    presets = presets_by_kind(root)
    entries = []
    for family in families():
        folder, title, sentence = title_of(family)
        names = family.available()
        texts[f"models/{folder}/index.md"] = index(family, title, sentence)
        for name in names:
            texts[f"models/{folder}/{name}.md"] = page(family, name, presets.get((family._packages[0], name), []))
        entries.append(
            {title: [f"models/{folder}/index.md", *({name: f"models/{folder}/{name}.md"} for name in names)]}
        )
    return entries


def index(family: Any, title: str, sentence: str) -> str:
    """The table of a family, and its contract if no other page has it."""
    rows = ["| kind | description |", "|---|---|"]
    rows += [f"| [`{name}`]({name}.md) | {first_sentence(family.find(name))} |" for name in family.available()]
    if contract := CONTRACTS.get(family._packages[0]):
        after = f"Each implements [this interface]({contract})."
    else:
        after = f"::: {family.__module__}.{family.__qualname__}"
    return "\n\n".join([f"# {title}", sentence, "\n".join(rows), after])


def first_sentence(member: type) -> str:
    """What the file of a model begins with, up to the first full stop that ends a sentence."""
    text = " ".join((inspect.getdoc(described(member)) or "").split("\n\n")[0].split())
    return tidy(text, set()).replace("|", "\\|")


def described(member: Any) -> Any:
    """Return the file of a model; the class where the family has all its models in one file."""
    module = sys.modules[member.__module__]
    shared = any(each.__module__ == member.__module__ for each in member.__mro__[1:] if issubclass(each, Registered))
    return member if shared else module


def page(family: Any, name: str, presets: list[str]) -> str:
    """All there is to say of one model."""
    member = family.find(name)
    parts = [f"# {name}", tidy(inspect.getdoc(described(member)) or "", set())]
    if figure := figures.of(family, name):
        parts.append(figure)
    if presets:
        parts.append(f"Presets: {', '.join(f'`{preset}`' for preset in presets)}.")
    parts.append("## Settings")
    parts.append(keys.listing(keys.of_kind(member), prefix=""))
    parts.append("## Code")
    parts.append(f"::: {member.__module__}.{member.__qualname__}\n    options:\n      heading_level: 3")
    parts.append(source(described(member)))
    return "\n\n".join(parts)


def source(model: Any) -> str:
    """The code of a model, to be unfolded: one idea, from top to bottom."""
    code = textwrap.indent(inspect.getsource(model).strip(), "    ")
    module = inspect.getmodule(model)
    assert module is not None
    return f'??? quote "{module.__name__.replace(".", "/")}.py"\n\n    ````python\n{code}\n    ````'


def presets_by_kind(root: Path) -> dict[tuple[str, str], list[str]]:
    """The presets that name a kind of model or quantizer, by family and kind."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted((root / "configs").glob("*/*.yaml")):
        model = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("model")
        if not isinstance(model, dict):
            continue
        package = path.parent.name
        nodes = {package: model, "tokenizer.quantizers": model.get("quantizer"), "prior.heads": model.get("head")}
        for family, node in nodes.items():
            if isinstance(node, dict) and "kind" in node:
                found.setdefault((family, node["kind"]), []).append(escape(path.stem))
    return found
