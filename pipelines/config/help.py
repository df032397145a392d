"""Help pages: the common keys, all keys, or those of one section."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tokenizer.config import (
    Choices,
    Data,
    Node,
    Settings,
    find_mark,
    mapped_model,
    nested_models,
    show_value,
    to_plain,
)

from .errors import UserError, did_you_mean
from .schema import Config, DefaultsFrom
from .table import width, wrap, wrap_rows

ALL = "all"
NAME = "NAME"
"""Stands for a name that the user chooses, in a key."""
OPTIONS = {
    "--config FILE": "a YAML file or a preset's name (`smalti presets`); several merge left to right",
    "key=value": "set one key, overriding the files; the value is YAML, as in train.lr=1e-3 or sizes=1,2; a new "
    "model.kind resets the keys below it",
    "--import FILE": "a Python file or module that defines your own models",
    "--dry-run": "print the resulting configuration, which --config can read, and exit",
}


class Row(NamedTuple):
    """One key of the table."""

    key: str
    type: str
    default: str
    sentence: str


class Section(NamedTuple):
    """The keys of one node (empty at the top level). kind: the model they belong to, if the node has kinds."""

    node: str = ""
    kind: str = ""
    sentence: str = ""
    rows: tuple[Row, ...] = ()

    @property
    def title(self) -> str:
        """Heading; empty at the top level."""
        key = f"{self.node}.kind={self.kind}" if self.kind else self.node
        return f"{key}: {self.sentence}" if self.sentence else key


# Pages --------------------------------------------------------------------------------------------


def help_page(
    cls: type[Config],
    verb: str,
    description: str | None,
    topic: str = "",
    values: Data | None = None,
    given: Iterable[str] = (),
) -> str:
    """Return the page for a topic: empty, `all`, a section or a key. Raises `UserError` for an unknown topic.

    values: current values, shown instead of the class defaults. given: top-level keys that the command line sets.
    """
    values, options = values or {}, dict(OPTIONS)
    if topic == ALL:
        chosen = {name: values[name] for name in given if name in values}
        shown = list(dict.fromkeys(list_sections(cls, chosen)))  # each tokenizer lists the quantizers again
    else:
        found = list(list_sections(cls, values))
        if topic:
            return "\n".join(format_sections(choose_topic(found, topic))).lstrip("\n")
        shown = [Section(rows=tuple(choose_often(cls, found)))]
        if left := len(set(list_rows(found)) - set(list_rows(shown))):
            nodes = ", ".join(dict.fromkeys(section.node for section in found if section.node))
            options["--help WHAT"] = f"{left} more keys: all, {f'one section ({nodes}), ' if nodes else ''}or one key"
    usage = f"usage: smalti {verb} [--config FILE ...] [key=value ...] [--help [WHAT]]"
    about = [line for part in (description or "").split("\n\n") for line in wrap(" ".join(part.split()), width())]
    commands = [wrap(f"smalti {verb} {example}", width() - 8) for example in cls.examples]
    examples = ["  " + " \\\n      ".join(lines) for lines in commands]  # joined by the shell
    parts = [
        [usage],
        about,
        ["examples", *examples],
        format_sections(shown),
        ["more", *wrap_rows(list(options.items()))],
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def list_rows(found: Iterable[Section]) -> list[Row]:
    """Return the rows of all sections."""
    return [row for section in found for row in section.rows]


def choose_often(cls: type[Config], found: list[Section]) -> list[Row]:
    """Return the rows of the common keys, or all top-level rows."""
    rows = {row.key: row for row in list_rows(found)}
    often = [rows[key] for key in cls.often.split() if key in rows]
    return often or list_rows(section for section in found if not section.node)


def choose_topic(found: list[Section], topic: str) -> list[Section]:
    """Return the sections at and below `topic`, or one key. Raises `UserError`, which suggests the nearest name."""
    below = [section for section in found if f"{section.node}.".startswith(f"{topic}.")]
    one = [row for row in list_rows(found) if row.key == topic]
    if not below and not one:
        nodes = list(dict.fromkeys(section.node for section in found if section.node))
        hint = did_you_mean(
            topic, [*nodes, *(row.key for row in list_rows(found))], f"the sections are {', '.join([*nodes, ALL])}"
        )
        raise UserError(f"--help {topic}: no such section or key; {hint}")
    return below or [Section(rows=tuple(one))]


def format_sections(shown: list[Section]) -> list[str]:
    """Return the lines of sections, each with its own column widths."""
    lines: list[str] = []
    for section in shown:
        head = [] if lines else [("key", "type", "default", "")]
        lines += ["", *wrap(section.title, width())] if section.title else []
        lines += wrap_rows([*head, *section.rows])
    return lines


# Keys ---------------------------------------------------------------------------------------------


def list_sections(
    cls: type[Settings],
    values: Data,
    node: str = "",
    kind: str = "",
    sentence: str = "",
    *,
    owner: str = "",
    families: tuple[str, ...] = (),
) -> Iterator[Section]:
    """Yield the keys of a configuration, one section for each nested one.

    values: shown instead of the defaults; a node with a value lists only the keys of its kind. node, kind, sentence:
    heading of the first section. owner: model that provides the defaults, such as "pipeline's". families: families of
    the enclosing nodes, whose members are not listed again.
    """
    rows: list[Row] = []
    nested: list[Section] = []
    for name, field in cls.model_fields.items():
        if name == "kind" and issubclass(cls, Choices):
            continue  # listed with its node
        key, about, models = f"{node}.{name}".lstrip("."), field.description or "", nested_models(field)
        default = to_plain(field.get_default(call_default_factory=True))
        value = values.get(name, default)
        below = value if isinstance(value, dict) else {}
        family, of = find_mark(field, Node), find_mark(field, DefaultsFrom)
        whose = f"{of.name}'s" if of else owner
        if family is not None:
            chosen = below.get("kind", "null" if default is None else "required")
            row = Row(f"{key}.kind", "kind", str(chosen), f"{about}: {', '.join(models)}")
            if families:
                rows.append(row)
            else:
                nested.append(Section(key, "", about, (row,)))
            for member, model in models.items() if family.family not in families else ():
                if name not in values or member == chosen:
                    inner, first_line = below if member == chosen else {}, (model.__doc__ or "").strip().split("\n")[0]
                    around = (*families, family.family)
                    nested += list_sections(model, inner, key, member, first_line, owner=whose, families=around)
        elif mapped := mapped_model(field):
            rows.append(Row(f"{key}.{NAME}", "text", "none", about))
            first_line = (mapped.__doc__ or "").strip().split("\n")[0]
            nested += list_sections(mapped, {}, f"{key}.{NAME}", "", first_line)
        elif models:
            inner = values.get(name, {}) if whose else below
            nested += list_sections(models[""], inner, key, "", about, owner=whose, families=families)
        else:
            default_text = whose if whose and name not in values else describe_default(value)
            if get_origin(field.annotation) is dict:
                key, default_text = f"{key}.NAME", "null" if value == {} else default_text
            rows.append(Row(key, describe_type(field), default_text, about))
    if rows:
        yield Section(node, kind, sentence, tuple(rows))
    yield from nested


@cache
def list_keys(cls: type[Settings]) -> list[str]:
    """Return the names of all sections and keys of a configuration."""
    found = list(list_sections(cls, {}))
    nodes, rows = [section.node for section in found], [row for section in found for row in section.rows]
    return list(dict.fromkeys(filter(None, [*nodes, *(row.key for row in rows)])))


def describe_type(field: FieldInfo) -> str:
    """Return the type and range of a key, such as `int >= 1 or null`, `[float, float]` or `a | b`. A null that is the
    default is not mentioned."""
    text = format_type(field.annotation, format_range(field.metadata))
    return text.removesuffix(" or null") if field.default is None else text


def format_type(hint: Any, limits: str = "") -> str:
    """Return a readable form of an annotation."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        marks = [mark for part in parts[1:] for mark in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return format_type(parts[0], format_range(marks) or limits)
    if origin in (Union, types.UnionType):
        texts = [format_type(part, limits) for part in parts if part is not type(None)]
        return " or ".join(texts + ["null"] * (type(None) in parts))
    if origin is dict:
        return "value"
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (tuple, list):
        inside = [*parts, Ellipsis] if origin is list else parts
        return f"[{', '.join('...' if part is Ellipsis else format_type(part, limits) for part in inside)}]"
    return ("text" if hint is str else getattr(hint, "__name__", str(hint))) + limits


def format_range(marks: Iterable[Any]) -> str:
    """Return the bounds in the metadata of a type, such as ` 1..8` or ` > 0, < 1`; empty without bounds."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = {name: getattr(mark, name) for mark in marks for name in signs if hasattr(mark, name)}
    bounds = {name: int(bound) if float(bound).is_integer() else bound for name, bound in found.items()}
    if set(bounds) == {"ge", "le"}:
        return f" {bounds['ge']}..{bounds['le']}"
    return ",".join(f" {signs[name]} {bound}" for name, bound in bounds.items())


def describe_default(value: Any) -> str:
    """Return a default value as text; strings are not quoted."""
    if value is PydanticUndefined:
        return "required"
    return value if isinstance(value, str) and value else show_value(value)
