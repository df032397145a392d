"""Untrusted JSON, checked by pydantic against a class; errors are one line.

The types of this file are strict: true is not a number, 1.0 is not a whole number, and "1" is neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Strict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from tokenizer.files import FormatError, quote

T = TypeVar("T")
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
"""A whole number too, which becomes a float."""
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]

EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "none_required": "null",
    "string_type": "text",
}


class FieldError(ValueError):
    """One field of an object is wrong; raised by checks that look at several fields."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


def checked(cls: type[T], data: Any, path: Path) -> T:
    """`data`, the content of the file `path`, as a `cls` (a pydantic model or a dataclass). Raises `FormatError` that
    names the file, the first wrong field, what was found and what is allowed."""
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise FormatError(f"{path}: {_problem(first)}") from error
    except UnicodeEncodeError as error:  # a `FieldError` that quotes half of a character, which pydantic cannot tell
        raise FormatError(f"{path}: {error.object}") from error


def _problem(detail: ErrorDetails) -> str:
    """The field, and what is wrong with it."""
    kind, context = detail["type"], detail.get("ctx", {})
    names = [str(part) for part in detail["loc"]]
    problem = f"{detail['msg']} (found {quote(detail['input'])})"
    if kind == "missing":
        problem = "missing"
    elif kind in ("extra_forbidden", "unexpected_keyword_argument"):
        problem = "no such field"
    elif kind in EXPECTED:
        problem = f"should be {EXPECTED[kind]} (found {quote(detail['input'])})"
    elif kind == "greater_than_equal":
        problem = f"should be at least {context['ge']} (found {quote(detail['input'])})"
    elif isinstance(error := context.get("error"), FieldError):
        names, problem = [*names, error.field], error.problem
    elif error is not None:
        problem = str(error)
    return f"{'.'.join(names)}: {problem}" if names else problem
