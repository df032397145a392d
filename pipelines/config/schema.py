"""What a configuration is: a frozen model with a description of each key, and the marks that say what a type cannot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, Field

from tokenizer.config import Data, Node, Settings, find_mark, show_value, to_plain
from tokenizer.files import quote

from .yaml_text import write_yaml

C = TypeVar("C", bound="Config")


class Config(Settings):
    """Base of every verb's configuration, and what its help page begins with."""

    examples: ClassVar[tuple[str, ...]] = ()
    """Command lines, without `smalti` and the verb."""
    often: ClassVar[str] = ""
    """The keys that people change, in this order, between spaces; none: all that the verb has itself."""


class OutputConfig(Config):
    """Base of the verbs that write a file, or files into a folder that may exist."""

    overwrite: bool = Field(False, description="replace existing files of `out`; false: refuse to")


@dataclass(frozen=True)
class Of:
    """Mark settings whose defaults come from the model that the key `name` names: `Of("tokenizer")`."""

    name: str


@dataclass(frozen=True)
class Within:
    """Mark a text that names a folder with the file `holds`: `Within("tokenizer", "config.json")`. A folder with such a
    folder of this `name` inside, as the run that made it, stands for it, even if it has a file `holds` of its own."""

    name: str
    holds: str

    def resolve(self, value: Any) -> Any:
        """`value`, or the folder inside of it that is meant."""
        if not isinstance(value, str) or not value:
            return value
        inner = Path(value) / self.name
        return str(inner) if (inner / self.holds).is_file() else value


def resolve_short_forms(cls: type[Config], data: Data) -> Data:
    """Replace a run by the folder in it that is meant, and the kind of a node by the node."""
    resolved = dict(data)
    for name, field in cls.model_fields.items():
        if name in data and (within := find_mark(field, Within)):
            resolved[name] = within.resolve(data[name])
        elif isinstance(data.get(name), str) and find_mark(field, Node) is not None:
            resolved[name] = {"kind": data[name]}
    return resolved


def to_yaml(config: BaseModel) -> str:
    """The configuration as a file for `--config`."""
    return write_yaml(config.model_dump(mode="json"))


def difference(old: Data, new: Data, prefix: str = "") -> list[str]:
    """The dotted keys in which two configurations differ, as `train.lr: 0.001 -> 0.002`."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif key not in old or key not in new or to_plain(before) != to_plain(after):  # a tuple equals a list
            sides = (show_value(side[key]) if key in side else "(absent)" for side in (old, new))
            name = f"{prefix}{key}"  # perhaps from a damaged file
            lines.append(f"{name if name.isprintable() and len(name) < 100 else quote(name)}: {' -> '.join(sides)}")
    return lines
