"""Turns pydantic's errors about a configuration into one line for each key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from ..files.errors import shown

MAX_PROBLEMS = 20  # of a configuration that are reported
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
WHOLE, NUMBER, TEXT, MAPPING = "a whole number", "a number", "text", "a mapping of keys"
EXPECTED = {
    "int_type": WHOLE,
    "float_type": NUMBER,
    "bool_type": "true or false",
    "string_type": TEXT,
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": MAPPING,
    "model_type": MAPPING,
    "model_attributes_type": MAPPING,
}


def explain(
    cls: type[Any],
    data: Any,
    error: ValidationError,
    search: Callable[[str, Any], list[str]] | None = None,
) -> list[str]:
    """The errors that pydantic found in `data`, one line for each key, of the first 20. `search` returns the lines for
    an unknown key outside of models."""
    found: dict[str, list[ErrorDetails]] = {}
    owners: dict[str, type[Any]] = {}
    for detail in error.errors(include_url=False):
        key, owner = place(cls, data, detail["loc"])
        found.setdefault(key, []).append(detail)
        owners[key] = owner
    lines = []
    for key, details in found.items():
        unknown = details[0]["type"] in ("extra_forbidden", "invalid_key")
        if unknown and (search is None or hasattr(owners[key], "facts")):  # of a model
            lines.append(unknown_setting(owners[key], key))
        elif unknown and search is not None:
            lines += search(key, details[0]["input"])
        else:
            lines += key_problems(key, details)
        if len(lines) > MAX_PROBLEMS:
            return [*lines[:MAX_PROBLEMS], "and more"]
    return lines


def place(cls: type[Any], data: Any, location: tuple[int | str, ...]) -> tuple[str, type[Any]]:
    """The dotted key of pydantic's `location`, which also names branches of unions and positions in lists, and the
    model that the key belongs to."""
    keys: list[str] = []
    owner: type[Any] = cls
    model: type[Any] | None = cls
    for position, part in enumerate(location):
        if model is not None and part in model.model_fields:
            keys.append(str(part))
            data = data.get(part) if isinstance(data, dict) else None
            owner, model = model, model.below(str(part), data) if isinstance(data, dict) else None
        elif position == len(location) - 1 and (model is not None or part == "kind"):
            keys.append(str(part))
            owner = model or owner
    return ".".join(keys), owner


def unknown_setting(model: type[Any], key: str) -> str:
    """The line for a setting that the model does not have, with the setting that was probably meant."""
    parent, _, name = key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    if name in getattr(model, "facts", ()):
        return f"{key}: a fact of the data, it cannot be set here"
    known = [known for known in model.model_fields if known != "kind"]
    near = difflib.get_close_matches(name[:80], known, 1, 0.6)
    hint = f"did you mean {prefix + near[0]!r}?" if near else f"there are {', '.join(known)}"
    name = name if re.fullmatch(r"[\w.-]{1,64}", name) else shown(name)
    return f"{prefix}{name}: unknown key; {hint}"


def key_problems(key: str, details: list[ErrorDetails]) -> list[str]:
    """The lines for one key. If every branch of a union failed, those that only want another type are left out. A
    list of wrong values is also too short to pydantic, which counts those that are right."""
    details = [detail for detail in details if detail["type"] != "too_short"] or details
    value = details[0]["input"]
    complaints = [complaint(detail) for detail in details if not expected(detail)]
    if complaints:
        return [f"{key}: {text}".removeprefix(": ") for text in dict.fromkeys(complaints)]
    wish = " or ".join(dict.fromkeys(map(expected, details)))
    if isinstance(value, dict) and value and MAPPING not in wish:
        return [f"{key}.{next(iter(value))}: {key} has no keys of its own, it is {wish}"]
    quoting = "; text that looks like something else needs quotes" if TEXT in wish and value is not None else ""
    return [f"{key}: expected {wish} (got {show(value)}{quoting})"]


def expected(detail: ErrorDetails) -> str:
    """The type that pydantic expected, in words; empty if the error is about something else."""
    return EXPECTED.get(detail["type"], "")


def complaint(detail: ErrorDetails) -> str:
    """What is wrong with a value of the right type."""
    kind, context, got = detail["type"], detail.get("ctx", {}), f" (got {show(detail['input'])})"
    for name, sign in SIGNS.items():
        if name in context:
            return f"must be {sign} {show_number(context[name])}{got}"
    if kind == "missing" and isinstance(detail["loc"][-1], str):
        return "missing"
    if kind in ("missing", "too_short"):  # from a list
        return f"too few values{got}"
    if kind == "too_long":
        return f"expected at most {context['max_length']} values{got}"
    if kind == "literal_error":
        return f"must be one of {context['expected'].replace(' or ', ', ')}{got}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "problem":
        return detail["msg"]
    return "must be finite" + got if kind == "finite_number" else detail["msg"][:1].lower() + detail["msg"][1:] + got


def located(*problems: Sequence[str]) -> ValidationError:
    """An error of several problems, each a pair of a dotted key and a sentence."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError("problem", "{problem}", {"problem": problem}),
            loc=tuple(key.split(".")),
            input=None,
        )
        for key, problem in problems
    ]
    return ValidationError.from_exception_data("", details)


def show_number(value: float) -> str:
    """A bound, without `.0`."""
    return str(int(value)) if float(value).is_integer() else str(value)


def show(value: Any) -> str:
    """A value as YAML would write it, on one line of at most 200 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
