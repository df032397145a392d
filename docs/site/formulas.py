"""Formulas between dollars, as GitHub reads them, become MathML, which browsers draw without a script or a font."""

from __future__ import annotations

import re

from latex2mathml.converter import convert
from links import outside_code

SHOWN = re.compile(r"(?<![\\$])\$\$(?!\$)(.+?)\$\$", re.DOTALL)
INLINE = re.compile(r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*[^\s\\$]|[^\s\\$])\$(?![\w$])")


def typeset(text: str) -> str:
    """Markdown with its formulas as MathML."""

    def change(prose: str) -> str:
        prose = SHOWN.sub(lambda found: f"\n\n<div class='formula'>{mathml(found[1], 'block')}</div>\n\n", prose)
        # In a span: a line that begins with <math> would be a paragraph of its own.
        return INLINE.sub(lambda found: f"<span>{mathml(found[1], 'inline')}</span>", prose)

    return outside_code(text, change)


def mathml(formula: str, display: str) -> str:
    """One formula; signs that Markdown would read are written as entities."""
    found = convert(" ".join(formula.split()), display=display)
    return re.sub(r"(?<=>)[^<]+(?=<)", lambda text: re.sub(r"[*_`\[\]\\|]", entity, text[0]), found)


def entity(found: re.Match[str]) -> str:
    """A sign by its number."""
    return f"&#{ord(found[0])};"
