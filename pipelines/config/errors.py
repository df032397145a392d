"""What pydantic found wrong with a configuration, said in one line for each key."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .arguments import show
from .help import SIGNS, sections, show_number, tag_of
from .nodes import ModelNode
from .schema import Config, Masked, models_in

WHOLE, NUMBER, TEXT, MAPPING = "a whole number", "a number", "text", "a mapping of keys"
EXPECTED = {
    "int_type": WHOLE,
    "int_parsing": WHOLE,
    "int_from_float": WHOLE,
    "float_type": NUMBER,
    "float_parsing": NUMBER,
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": TEXT,
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": MAPPING,
    "model_type": MAPPING,
    "model_attributes_type": MAPPING,
}


def explain(cls: type[Config], error: ValidationError) -> list[str]:
    """What pydantic found, a line for each key."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        if isinstance(detail["input"], Masked):
            detail["input"] = detail["input"].value
        tag = ".kind" if detail["type"].startswith("union_tag") else ""
        found.setdefault(dotted(cls, detail["loc"]) + tag, []).append(detail)
    return [line for key, details in found.items() for line in key_problems(cls, key, details)]


def dotted(cls: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """The key of pydantic's location, which also names branches of unions and positions in lists."""
    keys, models = [], [cls]
    for position, part in enumerate(location):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [model for field in fields for model in models_in(field.annotation)]
        if fields or (models and position == len(location) - 1 and str(part) not in map(tag_of, models)):
            keys.append(str(part))
    return ".".join(keys)


def key_problems(cls: type[Config], key: str, details: list[ErrorDetails]) -> list[str]:
    """The lines for one key. Where every branch of a union complains, those that only want another type are silent."""
    kind, value = details[0]["type"], details[0]["input"]
    if kind == "extra_forbidden":
        return unknown(cls, key, value)
    if kind == "model_node":
        return ModelNode(details[0]["ctx"]["family"]).problems(value, f"{key}.")
    complaints = [complaint(detail) for detail in details if not expected(detail)]
    if complaints:
        return [f"{key}: {text}".removeprefix(": ") for text in dict.fromkeys(complaints)]
    wish = " or ".join(dict.fromkeys(map(expected, details)))
    if isinstance(value, dict) and value and MAPPING not in wish:
        return [f"{key}.{next(iter(value))}: {key} has no keys of its own, it is {wish}"]
    quoting = "; text that looks like something else needs quotes" if TEXT in wish and value is not None else ""
    return [f"{key}: expected {wish} (got {show(value)}{quoting})"]


def expected(detail: ErrorDetails) -> str:
    """The type that pydantic wanted, in words; empty if it complains about something else."""
    return EXPECTED.get(detail["type"], "")


def complaint(detail: ErrorDetails) -> str:
    """What is wrong with a value of the right type."""
    kind, context, got = detail["type"], detail.get("ctx", {}), f" (got {show(detail['input'])})"
    for name, sign in SIGNS.items():
        if name in context:
            return f"must be {sign} {show_number(context[name])}{got}"
    if kind == "union_tag_not_found" or (kind == "missing" and isinstance(detail["loc"][-1], str)):
        return "missing"
    if kind == "missing":  # from a list
        return f"too few values{got}"
    if kind == "too_long":
        return f"expected at most {context['max_length']} values{got}"
    if kind == "literal_error":
        return f"must be one of {context['expected'].replace(' or ', ', ')}{got}"
    if kind == "union_tag_invalid":
        return f"must be one of {context['expected_tags']} (got {context['tag']!r})"
    if kind == "value_error":
        return str(context["error"])
    return "must be finite" + got if kind == "finite_number" else detail["msg"][:1].lower() + detail["msg"][1:] + got


def unknown(cls: type[Config], key: str, value: Any) -> list[str]:
    """A line for each unknown key at or below `key`, with the one that was probably meant."""
    if isinstance(value, dict) and value:
        return [line for name, part in value.items() for line in unknown(cls, f"{key}.{name}", part)]
    rows = [row.key for section in sections(cls, {}) for row in section.rows]
    known = {".".join(row.split(".")[:depth]): None for row in rows for depth in range(1, row.count(".") + 2)}
    if key in known:
        return [f"{key}: not a key of this kind, or dots where YAML wants nested keys"]
    same_name = [row for row in rows if row.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, known, 1, 0.75) or same_name or difflib.get_close_matches(key, known, 1, 0.6)
    return [f"{key}: unknown key; " + (f"did you mean {near[0]!r}?" if near else "--help lists what there is")]
