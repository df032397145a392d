"""What `smalti VERB --help` prints: the grammar, and every key with type, range, default and sentence."""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator
from itertools import zip_longest
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tokenizer.settings import Choices, Data, Node, Settings, models_in, plain
from tokenizer.settings.marks import mark_of
from tokenizer.settings.mistakes import SIGNS, show, show_number

from .arguments import WIDTH
from .schema import Config

OPTIONS = (
    ("--config FILE", "a YAML file, or the name of a preset (`smalti presets`); several merge left to right"),
    (
        "key=value",
        "set one key, whatever the files say; the value is YAML, as in train.lr=1e-3 or sizes=[1,2]; "
        "another kind replaces its node with all that was set below it",
    ),
    ("--dry-run", "print the resulting configuration, itself a file for --config, and stop"),
)


class Row(NamedTuple):
    """One key on the help page."""

    key: str
    type: str
    default: str
    sentence: str


class Section(NamedTuple):
    """Keys that belong together."""

    title: str
    rows: list[Row]


def help_page(cls: type[Config], verb: str, description: str | None) -> str:
    """What `smalti VERB --help` prints: the grammar, and every key with type, range, default and sentence."""
    unique: list[Section] = []
    for section in sections(cls, {}):  # quantizers come back with every tokenizer that takes them
        if section.rows and section not in unique:
            unique.append(section)
    rows = [row for section in unique for row in section.rows]
    key, kind, default = (max(len(row[column]) for row in rows) for column in range(3))
    widths = [key, min(22, kind), max(8, min(14, default))]
    widths.append(WIDTH - 2 - sum(widths) - 2 * len(widths))
    page = [f"usage: smalti {verb} [--config FILE ...] [key=value ...] [--dry-run] [--help]", ""]
    page += [*textwrap.wrap(" ".join((description or "").split()), WIDTH), ""]
    page += [line for option in OPTIONS for line in table_row(list(option), [13, WIDTH - 17])]
    page += ["", *table_row(["key", "type", "default", ""], widths)]
    for section in unique:
        page += ["", *textwrap.wrap(section.title, WIDTH)] if section.title else []
        page += [line for row in section.rows for line in table_row(list(row), widths)]
    return "\n".join(page)


def table_row(cells: list[str], widths: list[int]) -> list[str]:
    """The lines of one row, every cell wrapped to its column."""
    columns = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    lines = zip_longest(*columns, fillvalue="")
    return ["  " + "  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def sections(
    cls: type[Settings], defaults: Data, prefix: str = "", title: str = "", outer: tuple[Node | None, ...] = ()
) -> Iterator[Section]:
    """The keys of a configuration, each nested node a section of its own. `defaults` win over those of the class.

    `outer`: the nodes that this one is in. Members within members of the same family are not listed again.
    """
    rows: list[Row] = []
    nested: list[Section] = []
    for name, field in cls.model_fields.items():
        key, sentence, models = prefix + name, field.description or "", models_in(field)
        default = defaults.get(name, plain(field.get_default(call_default_factory=True)))
        below = default if isinstance(default, dict) else {}
        if "" in models:
            nested += sections(models[""], below, f"{key}.", heading(key, sentence))
        elif models:
            kinds = Row(f"{key}.kind", " | ".join(models), below.get("kind", "required"), sentence)
            if not outer:
                nested.append(Section(heading(key, sentence), [kinds._replace(sentence="")]))
            else:
                rows.append(kinds)
            node = mark_of(field, Node)
            for kind, model in models.items() if node not in outer else ():
                matching = below if below.get("kind") == kind else {}
                about = (model.__doc__ or "").strip().split("\n")[0]
                nested += sections(model, matching, f"{key}.", heading(f"{key}.kind={kind}", about), (*outer, node))
        elif name != "kind" or not issubclass(cls, Choices):  # whose kinds are listed outside
            rows.append(Row(key, type_text(field.annotation, range_of(field)), default_text(default), sentence))
    yield Section(title, rows)
    yield from nested


def heading(key: str, sentence: str) -> str:
    """The title of a section."""
    return f"{key}: {sentence}" if sentence else key


def type_text(hint: Any, limits: str = "") -> str:
    """An annotation as the help page shows it: `int >= 1 or null`, `[float, float]`, `a | b`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_text(parts[0], "".join(map(range_of, parts[1:])) or limits)
    if origin in (Union, types.UnionType):
        texts = [type_text(part, limits) for part in parts if part is not type(None)]
        return " or ".join(texts + ["null"] * (type(None) in parts))
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (tuple, list):
        inside = [*parts, Ellipsis] if origin is list else parts
        return f"[{', '.join('...' if part is Ellipsis else type_text(part, limits) for part in inside)}]"
    return ("text" if hint is str else getattr(hint, "__name__", str(hint))) + limits


def range_of(mark: Any) -> str:
    """The bounds in a pydantic field, or in one of an annotation's marks."""
    marks = mark.metadata if isinstance(mark, FieldInfo) else [mark]
    return bounds_text({name: getattr(mark, name) for mark in marks for name in SIGNS if hasattr(mark, name)})


def bounds_text(bounds: dict[str, float]) -> str:
    """` 1..8`, ` > 0, < 1` or nothing."""
    if set(bounds) == {"ge", "le"}:
        return f" {show_number(bounds['ge'])}..{show_number(bounds['le'])}"
    return ",".join(f" {SIGNS[name]} {show_number(bound)}" for name, bound in bounds.items())


def default_text(value: Any) -> str:
    """A default on the help page, where text needs no quotes."""
    if value is PydanticUndefined:
        return "required"
    return value if isinstance(value, str) and value else show(plain(value))
