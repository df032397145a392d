"""YAML where 1e-3 is a number, as in YAML 1.2, and a duplicate key is an error."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from tokenizer.config import Data


class Loader(yaml.SafeLoader):
    """Loads plain values; keys must be text and unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise ConstructorError(problem="a key should be text", problem_mark=key.start_mark)
            if key.value in seen:
                raise ConstructorError(problem=f"{key.value!r} appears twice", problem_mark=key.start_mark)
            seen.add(key.value)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


class Dumper(yaml.SafeDumper):
    """Writes mappings with one key per line and lists in brackets, for `Loader` to read back."""


FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))


def write_yaml(data: Data) -> str:
    """Return `data` as YAML text that `read_yaml` reads back."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_yaml(text: str) -> Any:
    """Parse YAML. Raises `ValueError`, with the line number if there are several lines."""
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark and "\n" in text.strip() else ""
        raise ValueError(f"{line}not readable as YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        # An impossible date is a ValueError; a wrong tag, as in `!!bool maybe`, may be anything.
        raise ValueError(f"not readable as YAML: {str(error).splitlines()[0]}") from error
