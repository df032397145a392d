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
USER_NAME = "NAME"  # stands for a name that the user chooses, in a key
OPTIONS = {
    "--config FILE": "a YAML file or a preset's name (`smalti presets`); several merge left to right",
    "key=value": "set one key, overriding the files; the value is YAML, as in train.lr=1e-3 or sizes=1,2; a new "
    "model.kind resets the keys below it",
    "--import FILE": "a Python file or module that defines your own models",
    "--dry-run": "print the resulting configuration, which --config can read, and exit",
}


class KeyRow(NamedTuple):
    key: str
    type: str
    default: str
    sentence: str


class Section(NamedTuple):
    """The keys of one node (empty at the top level). kind: the model they belong to, if the node has kinds."""

    node: str = ""
    kind: str = ""
    sentence: str = ""
    rows: tuple[KeyRow, ...] = ()

    @property
    def title(self) -> str:
        """Heading; empty at the top level."""
        return ": ".join(filter(None, [f"{self.node}.kind={self.kind}" if self.kind else self.node, self.sentence]))


def verb_help_page(
    cls: type[Config],
    verb: str,
    description: str | None,
    topic: str = "",
    values: Data | None = None,
    given: Iterable[str] = (),
) -> str:
    """Return the page for a topic: empty, `all`, a section or a key. Raises `UserError` for an unknown topic.

    values: printed instead of the defaults of the class. given: top-level keys that the command line sets.
    """
    values, options = values or {}, dict(OPTIONS)
    if topic == ALL:
        chosen = {name: values[name] for name in given if name in values}
        sections = list(dict.fromkeys(list_sections(cls, chosen)))  # each tokenizer lists the quantizers again
    else:
        found = list(list_sections(cls, values))
        rows = {row.key: row for section in found for row in section.rows}
        nodes = list(dict.fromkeys(section.node for section in found if section.node))
        if topic:
            below = [section for section in found if f"{section.node}.".startswith(f"{topic}.")]
            if not below and topic not in rows:
                hint = did_you_mean(topic, [*nodes, *rows], f"the sections are {', '.join([*nodes, ALL])}")
                raise UserError(f"--help {topic}: no such section or key; {hint}")
            return format_sections(below or [Section(rows=(rows[topic],))]).lstrip("\n")
        often = [rows[key] for key in cls.often.split() if key in rows]
        often = often or [row for section in found if not section.node for row in section.rows]
        sections = [Section(rows=tuple(often))]
        if left := len(set(rows.values()) - set(often)):
            one = f"one section ({', '.join(nodes)}), " if nodes else ""
            options["--help WHAT"] = f"{left} more keys: all, {one}or one key"
    usage = f"usage: smalti {verb} [--config FILE ...] [key=value ...] [--help [WHAT]]"
    about = [line for part in (description or "").split("\n\n") for line in wrap(" ".join(part.split()), width())]
    commands = [wrap(f"smalti {verb} {example}", width() - 8) for example in cls.examples]
    examples = ["examples", *("  " + " \\\n      ".join(lines) for lines in commands)]  # joined by the shell
    more = ["more", *wrap_rows(list(options.items()))]
    return "\n\n".join([usage, "\n".join(about), "\n".join(examples), format_sections(sections), "\n".join(more)])


def format_sections(sections: list[Section]) -> str:
    """Format sections below their headings, each with its own column widths."""
    lines: list[str] = []
    for section in sections:
        head = [] if lines else [("key", "type", "default", "")]
        lines += ["", *wrap(section.title, width())] if section.title else []
        lines += wrap_rows([*head, *section.rows])
    return "\n".join(lines)


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

    values: used instead of the defaults; a node with a value lists only the keys of its kind. node, kind, sentence:
    heading of the first section. owner: model that provides the defaults, such as "pipeline's". families: of the
    enclosing nodes, whose members are not listed again.
    """
    rows: list[KeyRow] = []
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
            row = KeyRow(f"{key}.kind", "kind", str(chosen), f"{about}: {', '.join(models)}")
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
            rows.append(KeyRow(f"{key}.{USER_NAME}", "text", "none", about))
            first_line = (mapped.__doc__ or "").strip().split("\n")[0]
            nested += list_sections(mapped, {}, f"{key}.{USER_NAME}", "", first_line)
        elif models:
            inner = values.get(name, {}) if whose else below
            nested += list_sections(models[""], inner, key, "", about, owner=whose, families=families)
        else:
            text = value if isinstance(value, str) and value else show_value(value)
            text = "required" if value is PydanticUndefined else whose if whose and name not in values else text
            if get_origin(field.annotation) is dict:
                key, text = f"{key}.{USER_NAME}", "null" if value == {} else text
            kinds = format_type(field.annotation, format_range(field.metadata))
            # That a key may be null goes without saying if null is the default.
            rows.append(KeyRow(key, kinds.removesuffix(" or null") if field.default is None else kinds, text, about))
    if rows:
        yield Section(node, kind, sentence, tuple(rows))
    yield from nested


@cache
def list_keys(cls: type[Settings]) -> list[str]:
    """Return the names of all sections and keys of a configuration."""
    found = list(list_sections(cls, {}))
    keys = [row.key for section in found for row in section.rows]
    return list(dict.fromkeys(filter(None, [*(section.node for section in found), *keys])))


def format_type(hint: Any, limits: str = "") -> str:
    """Return a readable form of an annotation, such as `int >= 1 or null`, `[float, float]` or `a | b`."""
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
