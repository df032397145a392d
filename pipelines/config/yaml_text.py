"""Untrusted YAML: bounded in size, depth and numbers, and unambiguous, as `json_text` is of JSON.

An alias (`*a`) stands for all that its anchor holds, so that a few hundred bytes can stand for gigabytes, or for
themselves. What a text would be with its aliases written out is counted before any of it is made.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from tokenizer.config import Data

WIDTH = 110  # of YAML that is printed or written, in characters
MAX_BYTES, MAX_DEPTH, MAX_NODES = 1 << 18, 16, 5_000
MAX_DIGITS = 100  # of a number's text
WHOLE = (-(1 << 63), 1 << 64)


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2, and a repeated key is an error."""

    depth = made = 0

    def fetch_flow_collection_start(self, token: Any) -> None:
        """A bracket. Raises `ScannerError` for one that is nested too deep: the scanner reads a thousand ahead."""
        if self.flow_level >= MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} levels deep"
            raise yaml.scanner.ScannerError(problem=problem, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node. Raises `ComposerError` for one that is nested too deep, before Python does, and for too
        many."""
        self.depth, self.made = self.depth + 1, self.made + 1
        if self.depth > MAX_DEPTH or self.made > MAX_NODES:
            much = f"{MAX_DEPTH} levels deep" if self.depth > MAX_DEPTH else f"{MAX_NODES} keys and values"
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem=f"more than {much}", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def get_single_node(self) -> yaml.Node | None:
        """The document. Raises `ComposerError` for one that is too large with its aliases written out."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            written_out(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of `node`; raises `ConstructorError` at a repeated key, and at one that JSON has none of: a date,
        bytes."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = f"{key.value!r} appears twice"
                raise ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        if strange := [key for key in found if not isinstance(key, (str, int, float, type(None)))]:
            problem = f"a key is {type(strange[0]).__name__}, and should be text"
            raise ConstructorError(problem=problem, problem_mark=node.start_mark)
        return found

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """Text. Raises `ConstructorError` for one that no file can be called by."""
        text: str = super().construct_yaml_str(node)
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            problem = "text with a NUL or half of a surrogate pair"
            raise ConstructorError(problem=problem, problem_mark=node.start_mark)
        return text

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number. Raises `ConstructorError` for one of more than 64 bits."""
        require_short(node)
        number: int = super().construct_yaml_int(node)
        if not WHOLE[0] <= number < WHOLE[1]:
            raise ConstructorError(problem="a whole number of more than 64 bits", problem_mark=node.start_mark)
        return number

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A number."""
        require_short(node)
        return super().construct_yaml_float(node)


class Dumper(yaml.SafeDumper):
    """Writes YAML that `Loader` reads back: mappings with one key a line, lists in brackets."""


FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
for _tag in ("str", "int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", getattr(Loader, f"construct_yaml_{_tag}"))
Dumper.add_representer(
    str,  # PyYAML would fold U+0085, which it takes for the end of a line, into a space or another end
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, '"' if "\x85" in text else None),
)
Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))


def require_short(node: yaml.ScalarNode) -> None:
    """Raise `ConstructorError` for a number with too many digits."""
    if len(node.value) > MAX_DIGITS:
        problem = f"a number of {len(node.value)} characters, at most {MAX_DIGITS} allowed"
        raise ConstructorError(problem=problem, problem_mark=node.start_mark)


def written_out(node: yaml.Node, known: dict[int, tuple[int, int]], level: int = 1) -> tuple[int, int]:
    """How many nodes `node` stands for, and how many levels; `known`: of those that were counted. Raises
    `ComposerError` for too many of either, and for a node that holds itself."""
    nodes, depth = known.get(id(node), (0, 1))
    if level + depth - 1 > MAX_DEPTH:
        problem = f"more than {MAX_DEPTH} levels deep, or something that holds itself"
        raise yaml.composer.ComposerError(problem=problem, problem_mark=node.start_mark)
    if nodes:
        return nodes, depth
    below = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in below for part in pair]
    counted = [written_out(part, known, level + 1) for part in below]
    nodes, depth = 1 + sum(n for n, _ in counted), 1 + max((d for _, d in counted), default=0)
    if nodes > MAX_NODES:
        problem = f"more than {MAX_NODES} keys and values, aliases written out"
        raise yaml.composer.ComposerError(problem=problem, problem_mark=node.start_mark)
    known[id(node)] = nodes, depth
    return nodes, depth


def write_yaml(data: Data) -> str:
    """`data` as YAML text, which `read_yaml_text` reads back."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)


def read_yaml_text(text: str) -> Any:
    """The value of the YAML `text`. Raises `ValueError` that names the line, if there are several."""
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark and "\n" in text.strip() else ""
        raise ValueError(f"{line}not readable as YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        # PyYAML raises any of these for a value that is none of its kind, such as the date 2024-13-01
        raise ValueError(f"not readable as YAML: {(str(error) or type(error).__name__).splitlines()[0]}") from error
