"""Configurations: frozen pydantic models whose fields have a type, a range, a default and a sentence.

    class GPTConfig(PriorConfig):
        dim: int = Field(128, ge=8, le=16384, description="width of the residual stream")

The same class describes a model in a preset, in `--help` and in a saved `config.json`. Marks say what a type cannot:
`Fact[int]`, `Annotated[bool, Before(False)]`, `Annotated[ModelConfig, Node("module:Family")]`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticKnownError, PydanticUndefined, core_schema

from ..files.errors import ConfigError, shown
from .marks import FACT, Before, Was, mark_of, options, renamed
from .mistakes import explain, located
from .values import merge, parsed_float

MAX_ITEMS = 64  # of a list

Data = dict[str, Any]


class Settings(BaseModel):
    """Base of every configuration: frozen; no unknown keys, no infinities, no conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_named_now(cls, data: Any) -> Any:
        return renamed(cls.model_fields, data) if isinstance(data, dict) else data

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Convert what files cannot express: a tuple is a list there, and 1e-3 may be text."""
        hints = options(cls.model_fields[str(info.field_name)].annotation)
        origins = {get_origin(hint) or hint for hint in hints}
        if isinstance(value, list) and tuple in origins:
            if len(value) > MAX_ITEMS:
                context = {"field_type": "Tuple", "max_length": MAX_ITEMS, "actual_length": len(value)}
                raise PydanticKnownError("too_long", context)
            return tuple(value)
        if isinstance(value, str) and float in origins and str not in origins:
            return parsed_float(value)
        allowed = [choice for hint in hints if get_origin(hint) is Literal for choice in get_args(hint)]
        if value in allowed and type(value) not in map(type, allowed):  # true equals 1
            raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, allowed))})
        return value

    @classmethod
    def below(cls, name: str, value: Data) -> type[Settings] | None:
        """The configuration class of a `value` of the field `name`, if there is one."""
        models, kind = models_in(cls.model_fields[name]), value.get("kind")
        return models.get("") or (models.get(kind) if isinstance(kind, str) else None)


# Nodes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """Marks a field that holds a `{kind: ...}` node, a member of a family: `Node("tokenizer.quantizers:Quantizer")`.
    `only` restricts the members.

    A text is the kind alone. A `ModelConfig` field becomes the configuration of that kind. A `dict` field stays a node,
    as in a preset: without facts, and with the defaults of its kind filled in.
    """

    family: str
    only: tuple[str, ...] = ()

    def load(self) -> Any:
        """The family's class."""
        module, _, name = self.family.partition(":")  # written in our code, never read from a file
        return getattr(importlib.import_module(module), name)

    def kinds(self) -> list[str]:
        """The names of the members."""
        return list(self.only) or self.load().available()

    def member(self, node: Data) -> Any:
        """The class that a node names; raises `ValidationError`."""
        kind, kinds = node.get("kind"), self.kinds()
        there = f"there are {', '.join(kinds)}"
        if "kind" not in node:
            raise located(("kind", f"missing; {there}"))
        if isinstance(kind, str) and kind in kinds:
            return self.load().find(kind)
        if self.only:
            raise located(("kind", f"must be {' or '.join(kinds)} (got {shown(kind)})"))
        raise located(("kind", self.load().unknown(kind)))

    def config(self, value: Any) -> ModelConfig:
        """The configuration of the member that a node names."""
        if isinstance(value, ModelConfig):
            if self.only:
                self.member({"kind": value.kind})
            return value
        value = {"kind": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise PydanticKnownError("dict_type")
        member = self.member(value)
        try:
            config: ModelConfig = member.Config(**{key: item for key, item in value.items() if key != "kind"})
        except ConfigError as error:
            raise error.details or error from None  # with the places of what is wrong
        return config

    def preset(self, value: Any) -> Data:
        """A node with the defaults of its kind filled in."""
        value = {"kind": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise PydanticKnownError("dict_type")
        choices = self.member(value).choices()
        whole = with_defaults(choices, merge(defaults_of(choices), value))
        choices.model_validate(whole)
        return whole  # unvalidated, as it was written: 1 is not 1.0

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        read: Any = self.preset if dict in [get_origin(option) for option in options(source)] else self.config
        to_json = core_schema.plain_serializer_function_ser_schema(plain)
        schema = core_schema.no_info_plain_validator_function(read, serialization=to_json)
        return core_schema.nullable_schema(schema) if type(None) in options(source) else schema


# Models -------------------------------------------------------------------------------------------


class ModelConfig(Settings):
    """Base of every model's configuration; a wrong value raises `ConfigError` naming the field."""

    kind: ClassVar[str] = ""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            lines = "; ".join(explain(type(self), values, error))
            refusal = ConfigError(f"{self.kind or type(self).__name__}: {lines}")
            refusal.details = error
            raise refusal from None  # pydantic's own text, many lines, would come first

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        if problems := [sentence.split(": ", 1) for sentence in self.check()]:
            raise located(*problems)
        return self

    def check(self) -> Iterator[str]:
        """Yield what is wrong between fields, one sentence each that starts with the field's name."""
        return iter(())

    def to_dict(self) -> Data:
        """The configuration as JSON values, `kind` first; a setting keeps the name that it had where that is free."""
        values = {"kind": self.kind, **self.model_dump(mode="json")}
        for name, field in type(self).model_fields.items():
            if (was := mark_of(field, Was)) and values.get(was.name) is None:
                values.pop(was.name, None)
                values = {was.name if key == name else key: value for key, value in values.items()}
        return values

    def identity(self) -> Data:
        """`to_dict` without settings that are null and settings that equal their `Before` value, so that it is the same
        for models saved before these settings existed."""
        values = self.to_dict()
        for name, field in type(self).model_fields.items():
            value, before = getattr(self, name), mark_of(field, Before)
            if values.get(name) is None or (before and value == before.value):
                values.pop(name, None)
            elif isinstance(value, ModelConfig):
                values[name] = value.identity()
        return values

    @classmethod
    def from_saved(cls, data: Data) -> ModelConfig:
        """The configuration from the result of `to_dict`, without `kind`; settings that did not exist when it was saved
        get their `Before` value."""
        return cls(**as_saved(cls, data))


def as_saved(cls: type[Settings], data: Data) -> Data:
    """A saved configuration, in which missing settings get their `Before` value. An empty one stays empty."""
    found = renamed(cls.model_fields, data)
    for name, field in cls.model_fields.items() if data else ():
        before, value = mark_of(field, Before), found.get(name)
        if before and name not in found:
            found[name] = before.value
        elif isinstance(value, dict) and (model := cls.below(name, value)):
            found[name] = as_saved(model, value)
    return found


def as_begun(cls: type[Settings], mine: Mapping[str, Any], then: Data) -> Data:
    """The changes to `mine` when it continues what was begun with `then`: a setting that is left at its default gets
    its `Before` value if `then` lacks it or has that value. In nodes of one kind too."""
    found = {}
    for name, field in cls.model_fields.items():
        before, value, was = mark_of(field, Before), mine[name], then.get(name)
        if before and value == field.default and then.get(name, before.value) == before.value:
            found[name] = before.value
        elif isinstance(value, dict) and isinstance(was, dict) and value.get("kind") == was.get("kind"):
            model = cls.below(name, value)
            found |= {name: {**value, **changes}} if model and (changes := as_begun(model, value, was)) else {}
    return found


class Choices(Settings):
    """Base of the settings of a model that a preset may hold."""

    facts: ClassVar[tuple[str, ...]] = ()


@cache
def choices_of(config: type[ModelConfig], doc: str | None) -> type[Choices]:
    """The settings of a model that a preset may hold: its configuration without facts, and nested configurations as
    nodes. doc: the docstring of the model."""
    fields: Data = {"kind": (Literal[config.kind], config.kind)}
    for name, field in config.model_fields.items():
        hint: Any = field.annotation
        default = field.default
        if mark_of(field, Node):
            optional = type(None) in options(hint)
            hint, default = (dict[str, Any] | None if optional else dict[str, Any]), plain(default)
        if FACT not in field.metadata:
            default = ... if default is PydanticUndefined else default
            hint = Annotated[(hint, *field.metadata)] if field.metadata else hint
            fields[name] = hint, Field(default, description=field.description)
    found = create_model(config.__name__, __base__=Choices, **fields)
    found.__doc__ = doc or config.__doc__
    found.facts = tuple(name for name, field in config.model_fields.items() if FACT in field.metadata)
    return found


# What a field may hold ----------------------------------------------------------------------------


def models_in(field: FieldInfo) -> dict[str, type[Settings]]:
    """The models that a field allows, by `kind`; a single model without kinds has the key ""."""
    if node := mark_of(field, Node):
        return {kind: node.load().find(kind).choices() for kind in node.kinds()}
    alone = [hint for hint in options(field.annotation) if isinstance(hint, type) and issubclass(hint, Settings)]
    return {"": alone[-1]} if alone else {}


# Defaults -----------------------------------------------------------------------------------------


def defaults_of(cls: type[Settings]) -> Data:
    """The defaults, into which overrides of single keys are merged."""
    optional = {name: field for name, field in cls.model_fields.items() if not field.is_required()}
    return with_defaults(
        cls, {name: plain(field.get_default(call_default_factory=True)) for name, field in optional.items()}
    )


def with_defaults(cls: type[Settings], data: Data) -> Data:
    """`data` with the defaults of every node's kind, so that a node always has a `kind` to compare with."""
    found = renamed(cls.model_fields, data)
    for name, field in cls.model_fields.items():
        value = data.get(name)
        value = {"kind": value} if isinstance(value, str) and mark_of(field, Node) is not None else value
        if isinstance(value, dict) and (model := cls.below(name, value)):
            value = renamed(model.model_fields, value)
            found[name] = with_defaults(model, merge(defaults_of(model), value) if mark_of(field, Node) else value)
    return found


def plain(value: Any) -> Any:
    """A value as YAML or JSON has it; a model's configuration as its node."""
    if isinstance(value, ModelConfig):
        return value.to_dict()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value
