"""What an annotation says beside a type: marks on the fields of a configuration, and how they are found.

    channels: Fact[Literal[1, 3]] = Field(description="1 for grey, 3 for RGB")
    normalize: Annotated[bool, Before(False)] = Field(False, description="compare directions")

`Node`, which has to know configurations, is a mark as well (`base`).
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

T = TypeVar("T")

FACT = "a fact of the data"
Fact = Annotated[T, FACT]
"""A setting that comes from the data (grid, classes, image size); a preset may not set it."""


@dataclass(frozen=True)
class Before:
    """Marks a setting that was added later: a saved configuration without it means `value`. Fingerprints leave it out
    when it has this value, so that they do not change."""

    value: Any


@dataclass(frozen=True)
class Was:
    """Marks a setting that had another name, `Was("head", int)`: what is of this type, or of one of several, under that
    name is read as its value. Fingerprints keep the name."""

    name: str
    type: type | tuple[type, ...]

    def means(self, value: Any) -> bool:
        """Whether this value under the name that was is one of the setting."""
        types = self.type if isinstance(self.type, tuple) else (self.type,)
        return type(value) in types or (str in types and isinstance(value, str))


def mark_of(field: FieldInfo, mark: type[T]) -> T | None:
    """The mark of this class on the field, if there is one."""
    return next((found for found in field.metadata if isinstance(found, mark)), None)


def options(hint: Any) -> list[Any]:
    """The types that an annotation allows."""
    if get_origin(hint) is Annotated:
        return options(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in options(part)]
    return [hint]


def renamed(fields: Mapping[str, FieldInfo], data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `data`, values of these fields, in which they have the names of today."""
    found = dict(data)
    for name, field in fields.items():
        was = mark_of(field, Was)
        if was and was.means(found.get(was.name)):  # which nothing else under that name is
            found[name] = found.pop(was.name)
    return found
