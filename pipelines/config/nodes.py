"""A `{kind: ...}` node in a verb's configuration: a model, checked and completed by the family it belongs to."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from tokenizer.settings import REQUIRED, ModelConfig, family_of, node_problems

from .arguments import Data


@dataclasses.dataclass(frozen=True)
class ModelNode:
    """Marks a field that holds a `{kind: ...}` node: `model: Annotated[dict[str, Any], ModelNode("prior.base:Prior")]`.

    The node is checked against the configuration of that member of the family, and completed with its defaults.
    """

    family: str

    def load(self) -> Any:
        """The family's class."""
        module, _, name = self.family.partition(":")  # written in our code, never read from a file
        return getattr(importlib.import_module(module), name)

    def complete(self, node: Data) -> Data:
        """`node` on top of the defaults of its kind."""
        return completed(self.load(), node)

    def problems(self, node: Data, prefix: str = "") -> list[str]:
        """What is wrong with `node`, one line for each dotted key."""
        return node_problems(self.load(), self.complete(node), prefix=prefix)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(node: Data) -> Data:
            problems = self.problems(node)
            if problems:
                context = {"problems": "; ".join(problems), "family": self.family}
                raise PydanticCustomError("model_node", "{problems}", context)
            return self.complete(node)

        return core_schema.no_info_after_validator_function(check, handler(source))


def node_of(field: FieldInfo) -> ModelNode | None:
    """The field's marker, if it is a model node."""
    return next((mark for mark in field.metadata if isinstance(mark, ModelNode)), None)


def model_as_saved(family: Any, node: Data) -> Data:
    """`node`, with what was done before there was a setting where it lacks that; an unknown kind is left as it is."""
    if node.get("kind") not in family.available():
        return node
    return {**family.find(node["kind"]).Config.befores(), **node}


def as_saved(config: type[BaseModel], data: Data) -> Data:
    """A configuration as it was written: where it lacks a setting, what was done before there was one, which the field
    says by `json_schema_extra={"before": ...}`. What is empty says nothing, and stays so."""
    if not data:
        return data
    found = dict(data)
    for name, field in config.model_fields.items():
        extra = field.json_schema_extra
        if name not in found and isinstance(extra, dict) and "before" in extra:
            found[name] = extra["before"]
        elif isinstance(found.get(name), dict) and (mark := node_of(field)):
            found[name] = model_as_saved(mark.load(), found[name])
        elif isinstance(found.get(name), dict) and isinstance(part := field.annotation, type):
            found[name] = as_saved(part, found[name]) if issubclass(part, BaseModel) else found[name]
    return found


def completed(family: Any, node: Data) -> Data:
    """`node` on top of the defaults of its kind, nested nodes too; an unknown kind is left as it is."""
    if node.get("kind") not in family.available():
        return node
    fields = choices_of(family.find(node["kind"]).Config)
    defaults = {f.name: plain(f.default) for f in fields if f.default is not REQUIRED}
    node = merge({"kind": node["kind"], **defaults}, node)
    nested = [f for f in fields if f.metadata.get("family") and isinstance(node.get(f.name), dict)]
    return {**node, **{f.name: completed(family_of(f), node[f.name]) for f in nested}}


def merge(old: Data, new: Data) -> Data:
    """`new` on top of `old`, mappings key by key, except that a node whose `kind` changes is replaced."""
    if "kind" in old and new.get("kind", old["kind"]) != old["kind"]:
        old = {}
    both = [key for key in new if isinstance(old.get(key), dict) and isinstance(new[key], dict)]
    return {**old, **new, **{key: merge(old[key], new[key]) for key in both}}


def choices_of(config: type[ModelConfig] | ModelConfig) -> list[dataclasses.Field[Any]]:
    """The fields that a preset may set."""
    return [field for field in dataclasses.fields(config) if not field.metadata.get("fact")]


def plain(value: Any) -> Any:
    """A default as YAML would have given it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, ModelConfig):
        return {"kind": value.kind, **{field.name: plain(getattr(value, field.name)) for field in choices_of(value)}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value
