"""A Markdown extension: formulas between dollars become MathML."""

from __future__ import annotations

from re import Match
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor

BEFORE_ESCAPES = 185  # code spans are found before formulas, backslashes after them


class Formula(InlineProcessor):
    """`$x$` in a line, `$$x$$` apart."""

    def handleMatch(self, m: Match[str], data: str) -> Any:
        """Convert one formula."""
        display = "block" if m[0].startswith("$$") else "inline"
        return self.md.htmlStash.store(convert(" ".join(m[1].split()), display=display)), m.start(0), m.end(0)


class Formulas(Extension):
    """Register the patterns."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Add formulas before backslash escapes."""
        md.inlinePatterns.register(Formula(r"(?<![\\$])\$\$(?!\$)(.+?)\$\$", md), "display", BEFORE_ESCAPES + 1)
        inline = r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*[^\s\\$]|[^\s\\$])\$(?![\w$])"
        md.inlinePatterns.register(Formula(inline, md), "formula", BEFORE_ESCAPES)


def makeExtension(**options: Any) -> Formulas:
    """Create the extension; Markdown looks for this name."""
    return Formulas(**options)
