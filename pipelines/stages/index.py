"""`model_index.json`: what a pipeline folder holds, every field checked."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prior import Prior
from prior.sampling import Sampler
from tokenizer import Tokenizer
from tokenizer.files.errors import ConfigError, FormatError, IntegrityError, LimitError, shown
from tokenizer.files.ownership import Kind
from tokenizer.files.reading import MANIFEST, Folder

from .card import FIGURES

INDEX, PROVENANCE, CARD, GRID = "model_index.json", "provenance.json", "README.md", "samples.png"
BACKGROUND, CALIBRATION = "background", "calibration.json"
FORMAT_VERSION = 1
MAX_PICTURE_BYTES, MAX_GRID_PIXELS = 64 << 20, 32 << 20
MAX_REST_BYTES = 1 << 30  # of listed files that are none of these
LONGEST_LABEL, JOINER = 200, "\u200d"  # a joiner, which is not printable by itself, makes one emoji of two
PARTS = ("tokenizer", "prior", BACKGROUND)
FILES = [INDEX, PROVENANCE, CARD, GRID, CALIBRATION, MANIFEST] + [
    f"{part}/{name}" for part in PARTS for name in ("config.json", "model.safetensors", PROVENANCE)
]


PIPELINE = Kind("a pipeline", INDEX, lambda index: index.get("_class_name") == "ImagePipeline" and "prior" in index)


def read_index(files: Folder) -> dict[str, Any]:
    """`model_index.json`, every field checked. Raises `FormatError` or `ConfigError`."""
    path, index = files.place(INDEX), files.json(INDEX)
    version = index.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format_version: found {shown(version)}, this version of smalti reads {FORMAT_VERSION}; "
            "a newer smalti may read it"
        )
    if index.get("_class_name") != "ImagePipeline":
        raise FormatError(f"{path}: _class_name: found {shown(index.get('_class_name'))}, expected 'ImagePipeline'")
    allowed = {"_class_name", "format_version", "tokenizer", "prior", "labels", "sampler"}
    if set(index) - {BACKGROUND} != allowed:
        raise FormatError(f"{path}: found the fields {shown(sorted(index))}, expected {sorted(allowed)}")
    families: list[tuple[str, type[Tokenizer] | type[Prior]]] = [("tokenizer", Tokenizer), ("prior", Prior)]
    for part, family in families + [(BACKGROUND, Prior)] * (BACKGROUND in index):
        name = index[part]
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
            raise FormatError(f"{path}: {part}: {shown(name)} is not a name (lower case letters, digits, _)")
        if name not in family.available():
            kind, names = family.__name__.lower(), ", ".join(family.available())
            raise ConfigError(f"{path}: {part}: no {kind} is called {name!r}; there are {names}")
    if not isinstance(index["labels"], list) or not all(isinstance(label, str) for label in index["labels"]):
        raise FormatError(f"{path}: labels: expected a list of names")
    check_labels(index["labels"])
    make_sampler(Prior.find(index["prior"]), index["sampler"], path)
    return index


def make_sampler(prior: type[Prior], settings: dict[str, Any], path: str | Path = INDEX) -> Sampler:
    """The default settings of sampling from a prior of this kind. Raises `ConfigError`, naming the file, for one that
    the prior does not have or that is out of range."""
    try:
        return prior.make_sampler(**settings)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: sampler: {error}") from error


def check_listed(files: Folder) -> None:
    """Raise `IntegrityError` for a file of a pipeline that the manifest does not list, even if it is not read."""
    listed = files.manifest["files"] if files.manifest else {}
    unlisted = [name for name in FILES if name != MANIFEST and name not in listed and name in files]
    if unlisted:
        raise IntegrityError(f"{files.place(MANIFEST)}: files: does not list {', '.join(unlisted)}")


def check_labels(labels: Sequence[str]) -> None:
    """Raise `ConfigError` for a name that cannot be printed as it is: a terminal would obey it."""
    for label in labels:
        if len(label) > LONGEST_LABEL or not label.replace(JOINER, "").isprintable():
            raise ConfigError(
                f"{INDEX}: labels: {shown(label)} is no name: at most {LONGEST_LABEL} printable characters"
            )


def read_provenance(files: Folder) -> dict[str, Any]:
    """`provenance.json`: any facts, but numbers or text where the model card shows them. Raises `FormatError`."""
    found = files.json(PROVENANCE)

    def check(holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise FormatError(f"{files.place(PROVENANCE)}: {name}: expected {expected}")

    stages = {name: found.get(name, {}) for name in ("data", "tokenizer", "prior", "evaluation")}
    for name, facts in stages.items():
        check(isinstance(facts, dict), name, "an object")
    check(isinstance(stages["data"].get("source", ""), (str, type(None))), "data.source", "text")
    tables = {"evaluation": stages["evaluation"]}
    for name in ("tokenizer", "prior"):
        tables[f"{name}.evaluation"] = stages[name].get("evaluation", {})
        if "steps" in stages[name]:
            whole = all(type(stages[name].get(key)) in (int, float) for key in ("steps", "minutes"))
            check(whole, f"{name}.steps", "a number, beside one of minutes")
    for name, table in tables.items():
        check(isinstance(table, dict), name, "an object")
        for figure in FIGURES:
            shows = isinstance(table.get(figure), (int, float, str, type(None)))
            check(shows, f"{name}.{figure}", "a number or text")
    return found


def parse_picture(data: bytes, path: Path) -> np.ndarray:
    """The PNG file `data`, read from `path`, as uint8 (H, W, 3). Raises `LimitError` for one of too many
    pixels, `FormatError` for one that cannot be read."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.width * image.height > MAX_GRID_PIXELS:
            raise LimitError(f"{path}: {image.width} x {image.height} pixels, at most {MAX_GRID_PIXELS} allowed")
        return np.asarray(image.convert("RGB"))
    except LimitError:
        raise
    except Image.UnidentifiedImageError:  # its own message names a memory address
        raise FormatError(f"{path}: not a PNG file") from None
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise FormatError(f"{path}: not a readable PNG file ({error})") from error
