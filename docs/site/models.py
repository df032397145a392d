"""A page for each model: its paper, a figure drawn by the model itself, its settings, its presets and its code."""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

import figures
import yaml
from commands import list_keys
from docstrings import to_markdown

from pipelines.config.help import list_sections
from prior import Prior
from prior.heads import Head
from tokenizer import Tokenizer
from tokenizer.likelihoods import Likelihood
from tokenizer.model import Registered
from tokenizer.quantizers import Quantizer

FAMILIES: dict[str, tuple[Any, str]] = {
    "tokenizers": (Tokenizer, "Stage one: from an image to a grid of ids and back."),
    "quantizers": (Quantizer, "From vectors to ids, inside a tokenizer."),
    "likelihoods": (
        Likelihood,
        "Distributions over the 256 values of a pixel, for decoders with a likelihood.",
    ),
    "priors": (Prior, "Stage two: a distribution over grids of ids, given a class."),
    "heads": (Head, "Output distributions of a prior at one position."),
}


def stage(texts: dict[str, str], root: Path) -> list[Any]:
    """Write a page for each model and a table for each family. Returns their part of the navigation."""
    presets = find_presets(root)
    entries = []
    for folder, (family, sentence) in FAMILIES.items():
        rows = ["| kind | description |", "|---|---|"]
        for name in family.available():
            model = family.find(name)
            description = " ".join((inspect.getdoc(described(model)) or "").split("\n\n")[0].split())
            rows.append(f"| [`{name}`]({name}.md) | {to_markdown(description).replace('|', chr(92) + '|')} |")
            texts[f"models/{folder}/{name}.md"] = page(folder, name, model, presets.get((folder, name), []))
        interface = f"::: {family.__module__}.{family.__qualname__}"
        if folder in ("tokenizers", "priors"):
            interface = f"Each implements [this interface](../../api/{folder.removesuffix('s')}.md)."
        texts[f"models/{folder}/index.md"] = "\n\n".join(
            [f"# {folder.capitalize()}", sentence, "\n".join(rows), interface]
        )
        pages = [f"models/{folder}/index.md", *({name: f"models/{folder}/{name}.md"} for name in family.available())]
        entries.append({folder.capitalize(): pages})
    texts["models/presets.md"] = "# Presets\n\n`--config NAME` takes these. Comments explain changed defaults."
    for path in preset_files(root):
        texts["models/presets.md"] += f"\n\n## {path.stem}\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"
    return [*entries, {"Presets": "models/presets.md"}]


def preset_files(root: Path) -> list[Path]:
    """The presets of tokenizers, then those of priors."""
    return [path for folder in ("tokenizer", "prior") for path in sorted(root.glob(f"configs/{folder}/*.yaml"))]


def page(folder: str, name: str, model: Any, presets: list[str]) -> str:
    """The page of one model."""
    code = textwrap.indent(inspect.getsource(described(model)).strip(), "    ")
    parts = [f"# {name}", to_markdown(inspect.getdoc(described(model)) or ""), figures.draw(folder, model)]
    if presets:
        links = [f"[`{preset}`](../presets.md#{preset})" for preset in presets]
        parts.append(f"Presets: {', '.join(links)}.")
    rows = [row for section in list_sections(model.choices(), {}) if not section.kind for row in section.rows]
    parts += ["## Settings", list_keys(rows)]
    parts += ["## Code", f"::: {model.__module__}.{model.__qualname__}\n    options:\n      heading_level: 3"]
    parts.append(f'??? quote "{model.__module__.replace(".", "/")}.py"\n\n    ````python\n{code}\n    ````')
    return "\n\n".join(part for part in parts if part)


def described(model: Any) -> Any:
    """What describes a model: its module, or the class if the module defines several models."""
    module = sys.modules[model.__module__]
    shared = any(base.__module__ == model.__module__ for base in model.__mro__[1:] if issubclass(base, Registered))
    return model if shared else module


def find_presets(root: Path) -> dict[tuple[str, str], list[str]]:
    """The presets that use each kind of tokenizer, quantizer, prior and head."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in preset_files(root):
        model = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("model")
        if isinstance(model, dict):
            nodes = {f"{path.parent.name}s": model, "quantizers": model.get("quantizer"), "heads": model.get("head")}
            for folder, node in nodes.items():
                if isinstance(node, dict) and "kind" in node:
                    found.setdefault((folder, node["kind"]), []).append(path.stem)
    return found
