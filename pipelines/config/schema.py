"""One grammar for every verb: YAML files and key=value become a checked, frozen configuration.

    smalti VERB --config a.yaml --config b.yaml train.lr=1e-3 model.kind=gpt

Files merge left to right, then overrides do; a node whose `kind` changes is replaced rather than mixed.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

from .arguments import Data, show, write_yaml
from .nodes import node_of, plain

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every verb's configuration: frozen; no unknown keys, no infinities, no value taken for another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _is_what_it_seems(cls, data: Any) -> Any:
        # Pydantic would take true for 1, 1 for true and "5" for 5; its strict mode would refuse a list for a tuple.
        if not isinstance(data, dict):
            return data
        kinds = {name: scalar_types(field.annotation) for name, field in cls.model_fields.items() if name in data}
        return {key: mask(value, kinds[key]) if key in kinds else value for key, value in data.items()}


def to_yaml(config: BaseModel) -> str:
    """The configuration as a file for `--config`."""
    return write_yaml(config.model_dump(mode="json"))


def difference(old: Data, new: Data, prefix: str = "") -> list[str]:
    """The dotted keys in which two configurations differ, as `train.lr: 0.001 -> 0.002`."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif key not in old or key not in new or plain(before) != plain(after):  # a tuple equals a list
            sides = (show(side[key]) if key in side else "(absent)" for side in (old, new))
            lines.append(f"{prefix}{key}: {' -> '.join(sides)}")
    return lines


# defaults -----------------------------------------------------------------------------------------


def default_nodes(cls: type[BaseModel]) -> Data:
    """The defaults that are mappings, for overrides of single keys to fall on."""
    optional = {name: field for name, field in cls.model_fields.items() if not field.is_required()}
    data = {name: plain(field.get_default(call_default_factory=True)) for name, field in optional.items()}
    return complete(cls, {name: value for name, value in data.items() if isinstance(value, dict)})


def complete(cls: type[BaseModel], data: Data) -> Data:
    """`data` with every model node completed, so that a `kind` left to its default is there to be compared with."""
    nodes = {}
    for name, field in cls.model_fields.items():
        models = models_in(field.annotation)
        if isinstance(data.get(name), dict) and (node := node_of(field)):
            nodes[name] = node.complete(data[name])
        elif isinstance(data.get(name), dict) and len(models) == 1:
            nodes[name] = complete(models[0], data[name])
    return {**data, **nodes}


def models_in(hint: Any) -> list[type[BaseModel]]:
    """The pydantic models that an annotation chooses from."""
    if get_origin(hint) is Annotated:
        return models_in(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [model for part in get_args(hint) for model in models_in(part)]
    return [hint] if isinstance(hint, type) and issubclass(hint, BaseModel) else []


# types --------------------------------------------------------------------------------------------


def scalar_types(hint: Any) -> set[type]:
    """The types at the leaves of an annotation."""
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    parts = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    return set().union(*(scalar_types(part) for part in parts if part is not Ellipsis)) if parts else {hint}


@dataclasses.dataclass(frozen=True, repr=False)
class Masked:
    """A value of a wrong type that pydantic would convert; in here it will not."""

    value: Any

    def __repr__(self) -> str:
        return repr(self.value)


def mask(value: Any, wanted: set[type]) -> Any:
    """`value`, or each item of a list, but `Masked` if it is none of the types `wanted`. (A float may come as text.)"""
    if not wanted <= {int, float, bool, str, type(None)}:
        return value
    if isinstance(value, (list, tuple)):
        return [mask(item, wanted) for item in value]
    if isinstance(value, bool):
        wrong = bool not in wanted and bool(wanted & {int, float})
    elif isinstance(value, (int, float)):
        wrong = bool in wanted and not wanted & {int, float}
    else:
        wrong = isinstance(value, str) and not wanted & {str, float}
    return Masked(value) if wrong else value
