"""A griffe extension: methods that are functions of another module, and docstrings as Markdown.

Docstrings explain arguments in running text: `tokens: (B, N). labels: (B,), or None.` A page lists them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import griffe

ARGUMENT = re.compile(r"(?:^|(?<=[.;)] ))(\w+(?:, \w+)*): ")
RAISES = re.compile(r"(?<=[.)] )(?=Raises )")


class Readable(griffe.Extension):
    """Changes each package after it is read and before its pages are written."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Resolve the methods first, then rewrite the docstrings."""
        for each in list(defined_in(pkg)):
            if isinstance(each, griffe.Class):
                resolve_methods(each, loader)
        for each in defined_in(pkg):
            if each.docstring:
                parameters = each.parameters if isinstance(each, griffe.Function | griffe.Class) else ()
                each.docstring.value = to_markdown(each.docstring.value, {one.name.lstrip("*") for one in parameters})


def defined_in(parent: griffe.Module | griffe.Class) -> Iterator[griffe.Object]:
    """`parent` and everything defined in it."""
    yield parent
    for child in list(parent.members.values()):
        if isinstance(child, griffe.Module | griffe.Class):
            yield from defined_in(child)
        elif not isinstance(child, griffe.Alias):
            yield child


def resolve_methods(cls: griffe.Class, loader: griffe.GriffeLoader) -> None:
    """Replace `complete = serialized(completion.complete)` in a class by a method with that function's signature."""
    for name, member in list(cls.members.items()):
        call = getattr(member, "value", None)
        argument = call.arguments[0] if isinstance(call, griffe.ExprCall) and len(call.arguments) == 1 else None
        if not isinstance(argument, griffe.Expr):
            continue
        try:
            function = loader.modules_collection[argument.canonical_path]
        except (KeyError, griffe.AliasResolutionError):
            continue
        if isinstance(function, griffe.Function):
            first, *rest = function.parameters
            parameters = griffe.Parameters(griffe.Parameter("self", kind=first.kind), *rest)
            method = griffe.Function(name, parameters=parameters, returns=function.returns, parent=cls)
            method.lineno = member.lineno
            if function.docstring:
                method.docstring = griffe.Docstring(function.docstring.value, parent=method)
            cls.set_member(name, method)


def to_markdown(text: str, arguments: Collection[str] = ()) -> str:
    """A docstring as Markdown: code blocks as they are, paragraphs with their arguments as a list."""
    parts = re.split(r"\n[ ]*\n", text)
    return "\n\n".join(part if part.startswith("    ") else paragraph(part, arguments) for part in parts)


def paragraph(text: str, arguments: Collection[str]) -> str:
    """One paragraph: a list of the arguments that it explains, and what it raises, apart."""
    if re.match(r"[-*] ", text):
        return text
    text = re.sub(r"<(?=[\w/-])", "&lt;", " ".join(textwrap.dedent(text).split()))
    text = re.sub(r"arXiv[: ](\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    text, *raises = RAISES.split(text, maxsplit=1)
    starts = [found for found in ARGUMENT.finditer(text) if set(found[1].split(", ")) <= set(arguments)]
    if not starts:
        return "\n\n".join([text, *raises])
    ends = [*(found.start() for found in starts[1:]), len(text)]
    items = [f"- `{found[1]}`: {text[found.end() : end].strip()}" for found, end in zip(starts, ends, strict=True)]
    return "\n\n".join([text[: starts[0].start()].strip(), "\n".join(items), *raises])
