"""Configurations: frozen pydantic models whose fields declare a type, range, default and description.

    class GPTConfig(PriorConfig):
        dim: int = Field(128, ge=8, le=16384, description="width of the residual stream")

One class serves presets, `--help` and saved `config.json` files. Two marks extend the types: the data determine
`Fact[int]`, and `Annotated[ModelConfig, Node("module:Family")]` holds the configuration of another model.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

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
from pydantic_core import (
    CoreSchema,
    ErrorDetails,
    InitErrorDetails,
    PydanticCustomError,
    PydanticKnownError,
    PydanticUndefined,
    core_schema,
)

from .files import ConfigError, quote

MAX_PROBLEMS = 20  # reported at once
FACT = "a fact of the data"

T = TypeVar("T")
Data = dict[str, Any]
Fact = Annotated[T, FACT]  # a setting determined by the data (grid, classes, image size); presets may not set it


class Settings(BaseModel):
    """Base class of configurations: frozen, with no unknown keys, infinities or type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Convert lists to tuples and numeric strings to floats: JSON has no tuples, and YAML reads 1e-3 as text."""
        hints = type_options(cls.model_fields[str(info.field_name)].annotation)
        origins = {get_origin(hint) or hint for hint in hints}
        if isinstance(value, list) and tuple in origins:
            return tuple(value)
        if isinstance(value, str) and float in origins and str not in origins:
            try:
                return float(value)
            except ValueError:
                return value
        allowed = [choice for hint in hints if get_origin(hint) is Literal for choice in get_args(hint)]
        if value in allowed and type(value) not in map(type, allowed):  # in Python, True == 1
            raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, allowed))})
        return value

    @classmethod
    def nested(cls, name: str, value: Data) -> type[Settings] | None:
        field = cls.model_fields[name]
        if node := find_mark(field, Node):
            kind = value.get("kind")
            known = isinstance(kind, str) and (kind in node.only or not node.only) and node.load().has(kind)
            return node.load().find(kind).choices() if known else None
        return nested_models(field).get("")


def find_mark(field: FieldInfo, mark: type[T]) -> T | None:
    return next((found for found in field.metadata if isinstance(found, mark)), None)


def type_options(hint: Any) -> list[Any]:
    if get_origin(hint) is Annotated:
        return type_options(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in type_options(part)]
    return [hint]


# Nodes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """Mark a field that holds a `{kind: ...}` node of a family: `Node("tokenizer.quantizers:Quantizer")`. only: the
    allowed kinds; empty allows all.

    A plain string is read as the kind. A `ModelConfig` field parses the node into that kind's configuration. A `dict`
    field keeps the node as in a preset, without facts, and fills in the defaults of its kind.
    """

    family: str
    only: tuple[str, ...] = ()

    def load(self) -> Any:
        module, _, name = self.family.partition(":")  # a constant in our code, never read from a file
        return getattr(importlib.import_module(module), name)

    def kinds(self) -> list[str]:
        return list(self.only) or self.load().available()

    def find_member(self, node: Data) -> Any:
        kind, family = node.get("kind"), self.load()
        if self.only and kind not in self.only:
            raise make_validation_error(("kind", f"must be {' or '.join(self.only)} (got {quote(kind)})"))
        if not family.has(kind):
            raise make_validation_error(("kind", family.describe_unknown(kind)))
        return family.find(kind)

    def to_config(self, value: Any) -> ModelConfig:
        if isinstance(value, ModelConfig):
            if self.only:
                self.find_member({"kind": value.kind})
            return value
        node = self._as_node(value)
        member = self.find_member(node)
        try:
            config: ModelConfig = member.Config(**{key: item for key, item in node.items() if key != "kind"})
        except ConfigError as error:
            raise error.details or error from None  # pydantic's error locates each problem
        return config

    def to_preset(self, value: Any) -> Data:
        """Return the node with the defaults of its kind filled in."""
        node = self._as_node(value)
        choices = self.find_member(node).choices()
        whole = with_defaults(choices, merge(defaults_of(choices), node))
        choices.model_validate(whole)
        return whole  # not the validated values, which would turn 1 into 1.0

    def _as_node(self, value: Any) -> Data:
        value = {"kind": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise PydanticKnownError("dict_type")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        options = type_options(source)
        read: Any = self.to_preset if dict in [get_origin(option) for option in options] else self.to_config
        to_json = core_schema.plain_serializer_function_ser_schema(to_plain)
        schema = core_schema.no_info_plain_validator_function(read, serialization=to_json)
        return core_schema.nullable_schema(schema) if type(None) in options else schema


def nested_models(field: FieldInfo) -> dict[str, type[Settings]]:
    """Map each allowed `kind` to its configuration class; "" is the only key of a field that is not a node."""
    if node := find_mark(field, Node):
        return {kind: node.load().find(kind).choices() for kind in node.kinds()}
    models = [hint for hint in type_options(field.annotation) if is_settings(hint)]
    return {"": models[-1]} if models else {}


def mapped_model(field: FieldInfo) -> type[Settings] | None:
    values = [get_args(hint)[1] for hint in type_options(field.annotation) if get_origin(hint) is dict]
    return next((hint for hint in values if is_settings(hint)), None)


def is_settings(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Settings)


# Models -------------------------------------------------------------------------------------------


class ModelConfig(Settings):
    """Base class of model configurations; an invalid value raises a `ConfigError` that names the field."""

    kind: ClassVar[str] = ""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            lines = "; ".join(explain(type(self), values, error))
            refusal = ConfigError(f"{self.kind or type(self).__name__}: {lines}")
            refusal.details = error
            raise refusal from None  # hide pydantic's multi-line message

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if problems := [sentence.split(": ", 1) for sentence in self.check()]:
            raise make_validation_error(*problems)
        return self

    def check(self) -> Iterator[str]:
        """Yield inconsistencies between fields, each as 'FIELD: problem'."""
        return iter(())

    def to_dict(self) -> Data:
        """Return the configuration as JSON values, `kind` first."""
        return {"kind": self.kind, **self.model_dump(mode="json")}


class Choices(Settings):
    """Base class of the model settings that a preset may contain."""

    facts: ClassVar[tuple[str, ...]] = ()


@cache
def choices_of(config: type[ModelConfig], doc: str | None) -> type[Choices]:
    """Derive what a preset may set: a configuration without facts, with nested ones as nodes. doc: the model's."""
    fields: Data = {"kind": (Literal[config.kind], config.kind)}
    for name, field in config.model_fields.items():
        hint: Any = field.annotation
        default = field.default
        if find_mark(field, Node):
            optional = type(None) in type_options(hint)
            hint, default = (dict[str, Any] | None if optional else dict[str, Any]), to_plain(default)
        if FACT not in field.metadata:
            default = ... if default is PydanticUndefined else default
            hint = Annotated[(hint, *field.metadata)] if field.metadata else hint
            fields[name] = hint, Field(default, description=field.description)
    found = create_model(config.__name__, __base__=Choices, **fields)
    found.__doc__ = doc or config.__doc__
    found.facts = tuple(name for name, field in config.model_fields.items() if FACT in field.metadata)
    return found


# Defaults -----------------------------------------------------------------------------------------


def defaults_of(cls: type[Settings]) -> Data:
    """Return all defaults, with those of nested nodes filled in."""
    optional = {name: field for name, field in cls.model_fields.items() if not field.is_required()}
    return with_defaults(
        cls, {name: to_plain(field.get_default(call_default_factory=True)) for name, field in optional.items()}
    )


def with_defaults(cls: type[Settings], data: Data) -> Data:
    """Fill each node of `data` with the defaults of its kind, so every node has a `kind`."""
    found = dict(data)
    for name, field in cls.model_fields.items():
        value, is_node = data.get(name), find_mark(field, Node) is not None
        value = {"kind": value} if isinstance(value, str) and is_node else value
        if isinstance(value, dict) and (model := cls.nested(name, value)):
            found[name] = with_defaults(model, merge(defaults_of(model), value) if is_node else value)
    return found


def merge(old: Data, new: Data) -> Data:
    """Merge `new` into `old`, mappings key by key; a node whose `kind` changes is replaced."""
    if "kind" in old and new.get("kind", old["kind"]) != old["kind"]:
        old = {}
    nodes = [key for key, value in old.items() if isinstance(value, dict) and "kind" in value]
    new = {**new, **{key: {"kind": new[key]} for key in nodes if isinstance(new.get(key), str)}}
    both = [key for key in new if isinstance(old.get(key), dict) and isinstance(new[key], dict)]
    return {**old, **new, **{key: merge(old[key], new[key]) for key in both}}


def to_plain(value: Any) -> Any:
    """Convert a value to plain YAML or JSON types, and a model's configuration to a node."""
    if isinstance(value, ModelConfig):
        return value.to_dict()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [to_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


# One-line messages for pydantic's errors -----------------------------------------------------------

TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dataclass_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}


def explain(
    cls: type[Any],
    data: Any,
    error: ValidationError,
    search: Callable[[str, Any], list[str]] | None = None,
) -> list[str]:
    """Describe pydantic's errors about `data`, one line a key. search: describes an unknown key outside models."""
    details: dict[str, list[ErrorDetails]] = {}
    owners: dict[str, type[Any]] = {}
    for detail in error.errors(include_url=False):
        key, owner = locate(cls, data, detail["loc"])
        details.setdefault(key, []).append(detail)
        owners[key] = owner
    lines: list[str] = []
    for key, found in details.items():
        unknown = found[0]["type"] in ("extra_forbidden", "invalid_key")
        if unknown and (search is None or hasattr(owners[key], "facts")):  # of a model
            lines.append(describe_unknown_key(owners[key], key))
        elif unknown and search is not None:
            lines += search(key, found[0]["input"])
        else:
            lines.append(describe_problems(key, found).removeprefix(": "))
    return lines if len(lines) <= MAX_PROBLEMS else [*lines[:MAX_PROBLEMS], "and more"]


def locate(cls: type[Any], data: Any, location: tuple[int | str, ...]) -> tuple[str, type[Any]]:
    """Convert pydantic's `location` to a dotted key, without union branches and list positions, and its owner."""
    keys: list[str] = []
    owner: type[Any] = cls
    model: type[Any] | None = cls
    values: type[Any] | None = None  # of a `dict[str, Settings]`
    for position, part in enumerate(location):
        if values is not None:  # a name chosen by the user
            keys.append(str(part))
            data = data.get(part) if isinstance(data, dict) else None
            owner, model, values = values, values, None
        elif model is not None and part in model.model_fields:
            keys.append(str(part))
            data = data.get(part) if isinstance(data, dict) else None
            owner, values = model, mapped_model(model.model_fields[str(part)])
            model = model.nested(str(part), data) if isinstance(data, dict) else None
        elif position == len(location) - 1 and (model is not None or part == "kind"):
            keys.append(str(part))
            owner = model or owner
    return ".".join(keys), owner


def describe_unknown_key(model: type[Any], key: str) -> str:
    """Describe an unknown key in one line, suggesting the most similar key."""
    parent, _, name = key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    if name in getattr(model, "facts", ()):
        return f"{key}: determined by the data, so it cannot be set here"
    known = [known for known in model.model_fields if known != "kind"]
    near = difflib.get_close_matches(name[:80], known, 1, 0.6)
    hint = f"did you mean {prefix + near[0]!r}?" if near else f"must be one of {', '.join(known)}"
    name = name if re.fullmatch(r"[\w.-]{1,64}", name) else quote(name)
    return f"{prefix}{name}: unknown key; {hint}"


def describe_problems(key: str, details: list[ErrorDetails]) -> str:
    """Describe the problems of one key; if all branches of a union failed, other errors before those of type."""
    details = [detail for detail in details if detail["type"] != "too_short"] or details  # too_short says least
    problems = [describe_problem(detail) for detail in details if detail["type"] not in TYPES]
    if problems:
        return f"{key}: {'; '.join(dict.fromkeys(problems))}"
    value, expected = details[0]["input"], " or ".join(dict.fromkeys(TYPES[detail["type"]] for detail in details))
    if isinstance(value, dict) and value and "mapping" not in expected:
        return f"{key}.{next(iter(value))}: {key} takes no nested keys; expected {expected}"
    quoting = "; quote text that YAML would read as another type" if "text" in expected and value is not None else ""
    return f"{key}: expected {expected} (got {show_value(value)}{quoting})"


def describe_problem(detail: ErrorDetails) -> str:
    kind, got = detail["type"], f"(got {show_value(detail['input'])})"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "problem":  # from `make_validation_error`
        return detail["msg"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return "unknown key"
    if kind == "missing" and isinstance(detail["loc"][-1], str):
        return "missing"
    if kind in ("missing", "too_short", "too_long"):  # from a list
        return f"too {'many' if kind == 'too_long' else 'few'} values {got}"
    return f"{detail['msg'].removeprefix('Input ')} {got}"


def make_validation_error(*problems: Sequence[str]) -> ValidationError:
    details = [
        InitErrorDetails(
            type=PydanticCustomError("problem", "{problem}", {"problem": problem}),
            loc=tuple(key.split(".")),
            input=None,
        )
        for key, problem in problems
    ]
    return ValidationError.from_exception_data("", details)


def show_value(value: Any) -> str:
    """Format a value as one line of YAML with at most 200 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
