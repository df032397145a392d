"""The keys of a configuration as people read them: type, range, default and sentence of each, by section."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tokenizer.config import (
    SIGNS,
    Choices,
    Data,
    Node,
    Settings,
    find_mark,
    nested_models,
    show_number,
    show_value,
    to_plain,
)

from .schema import Of

FEW_KINDS = 40  # characters of names, above which they stand in the sentence


class Row(NamedTuple):
    """One key; `values` are those that can be listed, of which there may be others."""

    key: str
    type: str
    default: str
    sentence: str
    values: tuple[str, ...] = ()

    @property
    def cells(self) -> tuple[str, ...]:
        """What a table shows."""
        return self[:4]


class Section(NamedTuple):
    """Keys that belong together, and the node that they are in, empty at the top."""

    title: str
    rows: list[Row]
    node: str = ""


class Place(NamedTuple):
    """Where in a configuration a section is: the prefix of its keys, its title, the families that it is in, and how its
    defaults are called where only running tells them."""

    prefix: str = ""
    title: str = ""
    outer: tuple[Node | None, ...] = ()
    later: str = ""


TOP = Place()


def every_kind(node: str) -> bool:
    """No node is narrowed to its kind."""
    return False


def sections(
    cls: type[Settings],
    values: Data,
    narrowed: Callable[[str], bool] = every_kind,
    later: frozenset[str] = frozenset(),
    place: Place = TOP,
) -> Iterator[Section]:
    """The keys of a configuration, each nested node a section of its own. `values` win over the defaults of the class.

    narrowed: whether only the keys of its present kind are listed for a node. later: the keys marked `Of` whose
    defaults are not known yet. Members within members of the same family are not listed again.
    """
    rows: list[Row] = []
    nested: list[Section] = []
    for name, field in cls.model_fields.items():
        key, sentence, models = place.prefix + name, field.description or "", nested_models(field)
        default = values.get(name, to_plain(field.get_default(call_default_factory=True)))
        below = default if isinstance(default, dict) else {}
        origin = find_mark(field, Of)
        words = f"{origin.name}'s" if origin and key in later else place.later
        if "" in models:
            inside = Place(f"{key}.", heading(key, sentence), place.outer, words)
            nested += sections(models[""], below, narrowed, later, inside)
        elif models:
            kinds = kinds_row(key, list(models), below.get("kind", "null" if default is None else "required"), sentence)
            if place.outer:
                rows.append(kinds)
            else:
                nested.append(Section(heading(key, sentence), [kinds], key))
            nested += members(field, key, models, below, narrowed, later, place)
        elif name != "kind" or not issubclass(cls, Choices):  # whose kinds are listed outside
            shown = words if words and default == field.get_default() else default_text(default)
            choices = tuple(listed_values(field.annotation))
            rows.append(Row(key, type_text(field.annotation, range_of(field)), shown, sentence, choices))
    yield Section(place.title, rows, place.prefix.rstrip("."))
    yield from nested


def members(
    field: FieldInfo,
    key: str,
    models: dict[str, type[Settings]],
    value: Data,
    narrowed: Callable[[str], bool],
    later: frozenset[str],
    place: Place,
) -> Iterator[Section]:
    """The sections of a node's kinds, or of the one that it has."""
    node = find_mark(field, Node)
    for kind, model in models.items() if node not in place.outer else ():
        if narrowed(key) and kind != value.get("kind"):
            continue
        about = (model.__doc__ or "").strip().split("\n")[0]
        inside = Place(f"{key}.", heading(f"{key}.kind={kind}", about), (*place.outer, node))
        yield from sections(model, value if value.get("kind") == kind else {}, narrowed, later, inside)


def kinds_row(key: str, kinds: list[str], kind: str, sentence: str) -> Row:
    """The row of a node's kind. Where there are many, their names follow the sentence."""
    text = " | ".join(kinds)
    if len(text) <= FEW_KINDS:
        return Row(f"{key}.kind", text, kind, sentence, tuple(kinds))
    return Row(f"{key}.kind", "kind", kind, f"{sentence}: {', '.join(kinds)}", tuple(kinds))


def heading(key: str, sentence: str) -> str:
    """The title of a section."""
    return f"{key}: {sentence}" if sentence else key


# Types, ranges, defaults --------------------------------------------------------------------------


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


def listed_values(hint: Any) -> Iterator[str]:
    """The values of a type that can be listed: choices, true and false, and null where there are such."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from listed_values(parts[0])
    elif origin in (Union, types.UnionType):
        found = [value for part in parts for value in listed_values(part)]
        yield from [*found, "null"] if found and type(None) in parts else found
    elif origin is Literal:
        yield from map(str, parts)
    elif hint is bool:
        yield from ("true", "false")


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
    return value if isinstance(value, str) and value else show_value(to_plain(value))
