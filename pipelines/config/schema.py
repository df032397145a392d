"""One grammar for every verb: YAML files and key=value become a checked, frozen configuration.

    smalti VERB --config a.yaml --config b.yaml train.lr=1e-3 model.kind=gpt

Files merge left to right, then overrides do; a node whose `kind` changes is replaced rather than mixed.
"""

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
    """Base of every verb's configuration, and what its help shows first."""

    examples: ClassVar[tuple[str, ...]] = ()
    """Command lines, without `smalti` and the verb."""
    often: ClassVar[str] = ""
    """The keys that people change, in this order, between spaces; none: all that the verb has itself."""


class OutputConfig(Config):
    """Base of the verbs that write a file, or files into a folder that may exist."""

    overwrite: bool = Field(False, description="replace existing files of `out`; false: refuse to")


@dataclass(frozen=True)
class Of:
    """Marks settings whose defaults come from the model that the key `name` names: `Of("tokenizer")`."""

    name: str


@dataclass(frozen=True)
class Within:
    """Marks a text that names a folder which holds the file `holds`: `Within("tokenizer", "config.json")`. A folder
    that has such a folder of this `name` inside, as the run that made it, stands for it too, whatever else is there: a
    run has a `config.json` of its own."""

    name: str
    holds: str

    def found(self, value: Any) -> Any:
        """`value`, or the folder inside of it that is meant."""
        if not isinstance(value, str) or not value:
            return value
        inner = Path(value) / self.name
        return str(inner) if (inner / self.holds).is_file() else value


def as_meant(cls: type[Config], data: Data) -> Data:
    """`data`, in which runs that are named stand for what is in them, and the kind of a node for the node."""
    found = dict(data)
    for name, field in cls.model_fields.items():
        if name in data and (within := find_mark(field, Within)):
            found[name] = within.found(data[name])
        elif isinstance(data.get(name), str) and find_mark(field, Node) is not None:
            found[name] = {"kind": data[name]}
    return found


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
            name = f"{prefix}{key}"  # maybe of a file that is damaged
            lines.append(f"{name if name.isprintable() and len(name) < 100 else quote(name)}: {' -> '.join(sides)}")
    return lines
