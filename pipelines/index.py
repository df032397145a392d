"""`model_index.json`: what a pipeline folder holds, every field checked."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prior import Prior
from prior.sampling import Sampler
from tokenizer import Tokenizer
from tokenizer.storage import MANIFEST, ConfigError, FormatError, read_json

INDEX, PROVENANCE, CARD, GRID = "model_index.json", "provenance.json", "README.md", "samples.png"
BACKGROUND, CALIBRATION = "background", "calibration.json"
FORMAT_VERSION = 1
FILES = [INDEX, PROVENANCE, CARD, GRID, CALIBRATION, MANIFEST] + [
    f"{part}/{name}"
    for part in ("tokenizer", "prior", BACKGROUND)
    for name in ("config.json", "model.safetensors", PROVENANCE)
]


@dataclass(frozen=True)
class SamplerDefaults(Sampler):
    """A pipeline's default settings. `steps`: in how many passes a masked-token prior decodes; None is a token a pass,
    which alone is exact. Raises `ValueError` out of range."""

    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise ValueError(f"steps must be a whole number >= 1, or None for a token a pass (got {self.steps})")

    def given(self) -> dict[str, Any]:
        """As `model_index.json` holds them; steps only where there are some."""
        return {name: value for name, value in asdict(self).items() if name != "steps" or value is not None}


def read_index(path: Path) -> dict[str, Any]:
    """`model_index.json`, every field checked. Raises `FormatError` or `ConfigError`."""
    index = read_json(path)
    if index.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format_version: found {index.get('format_version')!r}, this version of smalti reads "
            f"{FORMAT_VERSION}; a newer smalti may read it"
        )
    if index.get("_class_name") != "ImagePipeline":
        raise FormatError(f"{path}: _class_name: found {index.get('_class_name')!r}, expected 'ImagePipeline'")
    allowed = {"_class_name", "format_version", "tokenizer", "prior", "labels", "sampler"}
    if set(index) - {BACKGROUND} != allowed:
        raise FormatError(f"{path}: found the fields {sorted(index)}, expected {sorted(allowed)}")
    families: list[tuple[str, type[Tokenizer] | type[Prior]]] = [("tokenizer", Tokenizer), ("prior", Prior)]
    for part, family in families + [(BACKGROUND, Prior)] * (BACKGROUND in index):
        name = index[part]
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
            raise FormatError(f"{path}: {part}: {str(name)[:80]!r} is not a name (lower case letters, digits, _)")
        if name not in family.available():
            kind, names = family.__name__.lower(), ", ".join(family.available())
            raise ConfigError(f"{path}: {part}: no {kind} is called {name!r}; there are {names}")
    if not isinstance(index["labels"], list) or not all(isinstance(label, str) for label in index["labels"]):
        raise FormatError(f"{path}: labels: expected a list of names")
    try:
        SamplerDefaults(**index["sampler"])
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: sampler: {error}") from error
    return index
