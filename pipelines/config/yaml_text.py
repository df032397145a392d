"""YAML in which 1e-3 is a number, as in YAML 1.2, and a repeated key is an error."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from tokenizer.config import Data


class Loader(yaml.SafeLoader):
    """Reads plain values; keys are text, and each appears once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of `node`. Raises `ConstructorError` at a repeated key and at one that is not text."""
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
    """Writes what `Loader` reads back: mappings with one key a line, lists in brackets."""


FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))


def write_yaml(data: Data) -> str:
    """`data` as YAML text, which `read_yaml` reads back."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_yaml(text: str) -> Any:
    """The value of the YAML `text`. Raises `ValueError` that names the line, if there are several."""
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark and "\n" in text.strip() else ""
        raise ValueError(f"{line}not readable as YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that no calendar has is a ValueError
        raise ValueError(f"not readable as YAML: {str(error).splitlines()[0]}") from error
    except (AttributeError, LookupError, TypeError) as error:  # PyYAML's own slips, as at `!!bool maybe`
        raise ValueError("not readable as YAML: a value is not of the type that its tag names") from error
