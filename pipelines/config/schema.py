"""Base classes of configurations, and marks for what a type cannot express."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, Field

from tokenizer.config import Data, Node, Settings, find_mark, show_value, to_plain
from tokenizer.files import quote

from .yaml_text import write_yaml

C = TypeVar("C", bound="Config")


class Config(Settings):
    examples: ClassVar[tuple[str, ...]] = ()
    """Command lines for the help page, without `smalti` and the verb."""
    often: ClassVar[str] = ""
    """The keys on the short help page, separated by spaces; empty: all top-level keys."""
    unavailable: ClassVar[dict[str, str]] = {}
    """Keys that users may expect, and what to do instead."""
    renamed: ClassVar[dict[str, str]] = {}
    """Top-level keys in files of release 0.3, and their names now."""
    presets: ClassVar[str] = ""
    """The folder of the presets that `--config` accepts by name; empty: those of all folders."""


class OutputConfig(Config):
    """Base of verbs that write a file, or files into a folder that may exist."""

    overwrite: bool = Field(False, description="replace existing output files")


@dataclass(frozen=True)
class DefaultsFrom:
    """Mark settings whose defaults come from the model given by the key `name`: `DefaultsFrom("tokenizer")`."""

    name: str


@dataclass(frozen=True)
class RunSubfolder:
    """Mark a path to a folder that contains the file `holds`: `RunSubfolder("tokenizer", "config.json")`. The path of a
    run with that folder as its subfolder `name` is accepted too, even if the run itself contains a file `holds`."""

    name: str
    holds: str

    def resolve(self, value: Any) -> Any:
        """Return the subfolder `name` of `value` if it contains `holds`, else `value`."""
        if not isinstance(value, str) or not value:
            return value
        inner = str(Path(value) / self.name)
        return inner if os.path.isfile(os.path.join(inner, self.holds)) else value


def resolve_short_forms(cls: type[Config], data: Data) -> Data:
    """Replace a run folder by the subfolder it stands for, and `node=kind` by `{"kind": kind}`."""
    resolved = dict(data)
    for name, field in cls.model_fields.items():
        if name in data and (within := find_mark(field, RunSubfolder)):
            resolved[name] = within.resolve(data[name])
        elif isinstance(data.get(name), str) and find_mark(field, Node) is not None:
            resolved[name] = {"kind": data[name]}
    return resolved


def to_yaml(config: BaseModel) -> str:
    """Return YAML text that `--config` reads."""
    return write_yaml(config.model_dump(mode="json"))


def rename_keys(data: Data, renamed: Mapping[str, str]) -> Data:
    """Return what a file holds with the present names of its top-level keys. renamed: see `Config`."""
    return {renamed.get(key, key): value for key, value in data.items()}


def difference(old: Data, new: Data, prefix: str = "") -> list[str]:
    """List the dotted keys in which two configurations differ, such as `train.lr: 0.001 -> 0.002`."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif key not in old or key not in new or to_plain(before) != to_plain(after):  # a tuple equals a list
            sides = (show_value(side[key]) if key in side else "(absent)" for side in (old, new))
            name = f"{prefix}{key}"  # may come from a damaged file
            lines.append(f"{name if name.isprintable() and len(name) < 100 else quote(name)}: {' -> '.join(sides)}")
    return lines
