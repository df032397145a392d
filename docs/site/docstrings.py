"""How the code is read for its pages: methods that are functions elsewhere, arguments that are named in prose.

Docstrings say `tokens: (B, N). labels: (B,), or None.` in running text. On a page each of them is an item of a list.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from links import outside_code, refer

MARK = re.compile(r"(?:^|(?<=[.;)] ))(\w+(?:, \w+)*): ")
RAISES = re.compile(r"(?<=[.)] )(?=Raises )")
ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


class Readable(griffe.Extension):
    """Changes each package once it is read, before a page is made of it. names: a JSON file that says where the pages
    of the API have what a docstring may name."""

    def __init__(self, names: str) -> None:
        self.names = json.loads(Path(names).read_text(encoding="utf-8"))

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """First the methods, then the docstrings."""
        objects = list(everything(pkg))
        for each in objects:
            if isinstance(each, griffe.Class):
                adopt(each, loader)
        for each in everything(pkg):
            if each.docstring:
                each.docstring.value = refer(tidy(each.docstring.value, arguments(each)), self.near(each))

    def near(self, of: griffe.Object) -> dict[str, str]:
        """Where what a docstring names is: a bare name is one of its own class, if that has one."""
        inside = of if isinstance(of, griffe.Class) else of.parent
        if not isinstance(inside, griffe.Class) or inside.name not in self.names:
            return self.names
        own = {name.partition(".")[2]: path for name, path in self.names.items() if name.startswith(f"{inside.name}.")}
        return {**self.names, **{name: path for name, path in own.items() if name not in arguments(of)}}


def everything(parent: griffe.Module | griffe.Class) -> Iterator[griffe.Object]:
    """`parent` and all that is defined in it."""
    yield parent
    for child in list(parent.members.values()):
        if isinstance(child, griffe.Alias):
            continue
        if isinstance(child, (griffe.Module, griffe.Class)):
            yield from everything(child)
        else:
            yield child


def adopt(cls: griffe.Class, loader: griffe.GriffeLoader) -> None:
    """`complete = serialized(completion.complete)` in a class is a method with that function's signature and
    docstring."""
    for name, member in list(cls.members.items()):
        value = getattr(member, "value", None)
        value = value.arguments[0] if isinstance(value, griffe.ExprCall) and len(value.arguments) == 1 else value
        if not isinstance(member, griffe.Attribute) or not isinstance(value, (griffe.ExprAttribute, griffe.ExprName)):
            continue
        try:
            function = loader.modules_collection[value.canonical_path]
        except (KeyError, griffe.AliasResolutionError):
            continue
        if isinstance(function, griffe.Function):
            cls.set_member(name, method(name, function, member))


def method(name: str, function: griffe.Function, member: griffe.Attribute) -> griffe.Function:
    """The function as a method, its first argument being `self`."""
    first, *rest = function.parameters
    myself = griffe.Parameter("self", kind=first.kind)
    made = griffe.Function(
        name,
        parameters=griffe.Parameters(myself, *rest),
        returns=function.returns,
        lineno=member.lineno,
        endlineno=member.endlineno,
        parent=member.parent,
    )
    if function.docstring:
        made.docstring = griffe.Docstring(function.docstring.value, parent=made)
    return made


def arguments(of: griffe.Object) -> set[str]:
    """The names that a docstring may explain: parameters, or a class's own and those of `__init__`."""
    if isinstance(of, griffe.Function):
        return {parameter.name.lstrip("*") for parameter in of.parameters}
    if isinstance(of, griffe.Class):
        own = of.members.get("__init__")
        return {*of.members, *(arguments(own) if isinstance(own, griffe.Function) else ())}
    return set()


def tidy(text: str, names: set[str]) -> str:
    """A docstring as Markdown."""
    parts = re.split(r"\n[ ]*\n", text)
    return "\n\n".join(part if part.startswith("    ") else prose(part, names) for part in parts)


def prose(text: str, names: set[str]) -> str:
    """One paragraph: a list of the arguments that it explains, and what it raises, apart."""
    if re.match(r"[-*] ", text):
        return text
    text = outside_code(" ".join(textwrap.dedent(text).split()), plain)
    said, raises = (*RAISES.split(text, maxsplit=1), "")[:2] if RAISES.search(text) else (text, "")
    marks = [mark for mark in MARK.finditer(said) if set(mark[1].split(", ")) <= names]
    if marks:
        ends = [*(mark.start() for mark in marks[1:]), len(said)]
        items = [f"- `{mark[1]}`: {said[mark.end() : end].strip()}" for mark, end in zip(marks, ends, strict=True)]
        said = "\n\n".join(part for part in (said[: marks[0].start()].strip(), "\n".join(items)) if part)
    return f"{said}\n\n{raises}".strip()


def plain(text: str) -> str:
    """Signs that mean something else to Markdown, and links to papers."""
    text = re.sub(r"(?<!\w)\*(?!\w)|(?<=\w)\*(?=\w)|_(?=[\W])|(?<=\W)_", lambda sign: f"\\{sign[0]}", text)
    text = re.sub(r"<(?=[\w/-])", "&lt;", text)
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
