"""What a data set may reach: its own files. Its card, and its tables, may name any others, here or on a server, and
`datasets` would read them."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

import yaml

from tokenizer.files import PipelineLoadError, quote, read_bytes

from ..config import UserError

CARDS = ("README.md", ".huggingface.yaml")
MAX_CARD = 4 << 20  # bytes
METADATA = re.compile(r"\s*---[\r\n]+([\S\s]*?)[\r\n]+---(\r\n|\n|$)")
"""The YAML at the beginning of a card, as `huggingface_hub` finds it."""


def check_folder(folder: Path) -> None:
    """Raise `UserError` for a folder that `datasets` would read as others: by a pattern in its name, or by its card."""
    if glob.has_magic(place := os.path.abspath(folder)):
        raise UserError(f"data.source: {place}: a folder of tables cannot have *, ? or [ in its name; rename it")
    check_card(folder)


def check_card(folder: Path) -> None:
    """Raise `UserError` if a card of the data set in `folder` says that its files are elsewhere."""
    for name in CARDS:
        if not os.path.lexists(folder / name):
            continue
        try:
            text = read_bytes(folder / name, MAX_CARD).decode("utf-8", "replace")
        except PipelineLoadError as error:
            raise UserError(f"data.source: {error}") from error
        found = METADATA.match(text) if name.endswith(".md") else None
        text = text if name.endswith(".yaml") else found[1] if found else ""
        for value in values_below(text, "configs"):
            if leads_out(value):
                raise UserError(f"data.source: {folder / name}: configs: {quote(value)} leads out of the folder")


def values_below(text: str, key: str) -> list[str]:
    """The scalars below a top-level key of YAML; where there is an alias, all of the text's. What is no YAML is left to
    `datasets`."""
    depth, inside, is_key = 0, False, True
    below, everywhere, follows_alias = [], [], False
    try:
        for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.ScalarEvent):
                everywhere.append(event.value)
                if depth == 1 and is_key:
                    inside = event.value == key
                elif inside:
                    below.append(event.value)
            follows_alias |= inside and isinstance(event, yaml.AliasEvent)
            if isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            is_key = depth == 1 and not is_key
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                is_key = depth == 1
    except yaml.YAMLError:
        return []
    return everywhere if follows_alias else below


def leads_out(value: str) -> bool:
    """Whether a path or pattern of a card is not one below its folder."""
    return "://" in value or value.startswith(("/", "~")) or ".." in re.split(r"[/\\]", value)


def check_files(builder: Any, source: str) -> None:
    """Raise `UserError` for a builder of `datasets` that was led to files that are not those of `source`, a path or a
    Hub id."""
    given = getattr(builder.config, "data_files", None) or {}
    for file in (str(file) for files in given.values() for file in files):
        own = is_below(file, places(source)) if os.path.exists(source) else file.startswith(f"hf://datasets/{source}@")
        if not own:
            raise UserError(f"data.source: {source}: it names a file that is not its own, {quote(file)}")


def places(source: str) -> tuple[str, ...]:
    """Where the images of `source` may be: in its folder; of a Hub id in the caches."""
    import datasets
    from huggingface_hub import constants

    found: tuple[str, ...]
    if not os.path.exists(source):
        found = (constants.HF_HOME, constants.HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE))
    else:
        found = (source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source)),)
    return tuple({path for place in found for path in (os.path.abspath(place), os.path.realpath(place))})


def is_below(path: str, folders: tuple[str, ...]) -> bool:
    """Whether a path is below one of the folders, by its name; a link in them may lead anywhere."""
    return os.path.abspath(path).startswith(tuple(os.path.join(folder, "") for folder in folders))
