"""One grammar for every verb: YAML files and key=value become a checked, frozen configuration.

    smalti VERB --config a.yaml --config b.yaml train.lr=1e-3 model.kind=gpt

Files merge left to right, then overrides do; a node whose `kind` changes is replaced rather than mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from pydantic import BaseModel

from tokenizer.settings import Data, Settings, plain
from tokenizer.settings.mistakes import show

from .arguments import write_yaml

C = TypeVar("C", bound="Config")


class Config(Settings):
    """Base of every verb's configuration, and what its help shows first."""

    examples: ClassVar[tuple[str, ...]] = ()
    """Command lines, without `smalti` and the verb."""
    often: ClassVar[tuple[str, ...]] = ()
    """The keys that people change, in this order; none: all that the verb has itself."""


@dataclass(frozen=True)
class Of:
    """Marks settings whose defaults come from the model that the key `name` names: `Of("tokenizer")`."""

    name: str


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
        elif key not in old or key not in new or plain(before) != plain(after):  # a tuple equals a list
            sides = (show(side[key]) if key in side else "(absent)" for side in (old, new))
            lines.append(f"{prefix}{key}: {' -> '.join(sides)}")
    return lines
