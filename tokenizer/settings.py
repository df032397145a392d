"""Model configurations: frozen dataclasses whose fields carry a sentence and a range, checked on construction.

The same class describes a model in a preset, on the command line's help and in a saved `config.json`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from .files.errors import ConfigError, shown

REQUIRED = dataclasses.MISSING
MAX_ITEMS = 64  # of a list
MAX_PROBLEMS = 20  # of a configuration, which are told


def setting(
    default: Any = REQUIRED,
    help: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] | None = None,
    fact: bool = False,
    family: str | None = None,
    later: bool = False,
    before: Any = REQUIRED,
) -> Any:
    """One field of a `ModelConfig`.

    `ge`, `gt`, `le`, `lt` bound a number (or every number of a tuple); `choices` lists what is allowed. A `fact` comes
    from the data (grid, classes, image size) and is refused in a preset. `family` names the module and class, as in
    `"tokenizer.quantizers:Quantizer"`, whose members a nested `{kind: ...}` may name. A setting that came `later` than
    models were saved without it is no part of a fingerprint while it has its default. One whose default is not what
    these models do says what they do, `before`: a saved configuration that lacks it means that.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "help": help,
        "bounds": {key: value for key, value in bounds.items() if value is not None},
        "choices": choices,
        "fact": fact,
        "family": family,
        "before": default if later else before,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of every model's configuration. Plain JSON values are accepted and converted (lists become tuples,
    `{kind: ...}` becomes the configuration of that kind); a wrong one raises `ConfigError` naming the field."""

    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        problems: list[str] = []
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            try:
                value = _convert(getattr(self, field.name), hints[field.name], field)
                object.__setattr__(self, field.name, value)
            except ConfigError as error:
                problems.append(f"{field.name}{error}")
        if not problems:
            problems = list(self.check())
        if problems:
            raise ConfigError(f"{self.kind or type(self).__name__}: " + "; ".join(problems))

    def check(self) -> Iterator[str]:
        """Yield what is wrong between fields, one sentence each, starting with the field's name."""
        return iter(())

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values, `kind` first."""
        values = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": self.kind, **values}

    def identity(self) -> dict[str, Any]:
        """`to_dict` without what makes no difference to models saved before it was there: settings that are null, and
        those that came later and say what was done before."""
        values: dict[str, Any] = {"kind": self.kind}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or value == field.metadata.get("before", REQUIRED):
                continue
            values[field.name] = value.identity() if isinstance(value, ModelConfig) else _plain(value)
        return values

    @classmethod
    def from_saved(cls, data: dict[str, Any]) -> ModelConfig:
        """`from_dict` of what `to_dict` gave, maybe before some settings were there (those of a nested `{kind: ...}`
        node have their default)."""
        return cls.from_dict({**cls.befores(), **data})

    @classmethod
    def befores(cls) -> dict[str, Any]:
        """What models did before there was a setting, where there is one of which that is known."""
        known = {field.name: field.metadata.get("before", REQUIRED) for field in dataclasses.fields(cls)}
        return {name: before for name, before in known.items() if before is not REQUIRED}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Build from JSON values without `kind`; unknown and missing keys raise `ConfigError`."""
        problems = problems_in(cls, data, facts=True)
        missing = [f.name for f in dataclasses.fields(cls) if f.default is REQUIRED and f.name not in data]
        problems += [f"{name}: missing" for name in missing]
        if problems:
            raise ConfigError(f"{cls.kind}: " + "; ".join(problems))
        return cls(**data)


def problems_in(cls: type[ModelConfig], data: dict[str, Any], *, facts: bool = False, prefix: str = "") -> list[str]:
    """What is wrong with `data` as (part of) a configuration of class `cls`, each problem with its dotted key.

    With `facts=False` (a preset) a field that is a fact of the data is refused and a missing one is no problem.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    allowed = [name for name, f in fields.items() if facts or not f.metadata.get("fact")]
    problems: list[str] = []
    for key, value in data.items():
        if len(problems) >= MAX_PROBLEMS:
            return [*problems, f"{prefix or 'and '}more"]
        if key in fields and key not in allowed:
            problems.append(f"{prefix}{key}: a fact of the data, it can not be set here")
        elif key not in fields:
            near = difflib.get_close_matches(str(key)[:80], allowed, 1, 0.6)
            hint = f"; did you mean '{prefix}{near[0]}'?" if near else f"; there are {', '.join(allowed)}"
            name = key if re.fullmatch(r"[\w.-]{1,64}", str(key)) else shown(key)
            problems.append(f"{prefix}{name}: unknown key{hint}")
        elif fields[key].metadata.get("family") and isinstance(value, dict):
            problems += node_problems(family_of(fields[key]), value, prefix=f"{prefix}{key}.", facts=facts)
        else:
            try:
                _convert(value, hints[key], fields[key])
            except ConfigError as error:
                problems.append(f"{prefix}{key}{error}")
    return problems


def node_problems(family: Any, node: dict[str, Any], *, prefix: str = "", facts: bool = False) -> list[str]:
    """What is wrong with a `{kind: name, ...}` node that names a member of `family`."""
    rest = {key: value for key, value in node.items() if key != "kind"}
    if "kind" not in node:
        return [f"{prefix}kind: missing; there are {', '.join(family.available())}"]
    if node["kind"] not in family.available():
        there = ", ".join(family.available())
        return [f"{prefix}kind: no {family.__name__} is called {shown(node['kind'])}; there are {there}"]
    return problems_in(family.find(node["kind"]).Config, rest, facts=facts, prefix=prefix)


def family_of(field: dataclasses.Field[Any]) -> Any:
    """The family class that the field's `{kind: ...}` node chooses from."""
    import importlib

    module, _, name = field.metadata["family"].partition(":")  # written in our code, never read from a file
    return getattr(importlib.import_module(module), name)


def _convert(value: Any, hint: Any, field: dataclasses.Field[Any]) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if field.metadata.get("family"):
        if isinstance(value, ModelConfig):
            return value
        if not isinstance(value, dict):
            raise ConfigError(f": expected a {{kind: ...}} node (got {shown(value)})")
        problems = node_problems(family_of(field), value, prefix=".", facts=True)
        if problems:
            raise ConfigError("; ".join(problems))
        try:
            return family_of(field).find(value["kind"]).Config(**{k: v for k, v in value.items() if k != "kind"})
        except ConfigError as error:
            raise ConfigError(f": {error}") from error
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            raise ConfigError(f": expected a list (got {shown(value)})")
        if len(value) > MAX_ITEMS:
            raise ConfigError(f": expected at most {MAX_ITEMS} values (got {len(value)})")
        return tuple(_scalar(item, get_args(hint)[0], field) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else _nested(value, hint)
    return _scalar(value, hint, field)


def _nested(value: Any, hint: type) -> Any:
    names = {f.name for f in dataclasses.fields(hint)}
    if not isinstance(value, dict) or set(value) != names:
        raise ConfigError(f": expected the keys {', '.join(sorted(names))} (got {shown(value)})")
    if any(isinstance(item, list) and len(item) > MAX_ITEMS for item in value.values()):
        raise ConfigError(f": expected at most {MAX_ITEMS} values in a list")
    try:
        return hint(**value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f": {error}") from error


def _scalar(value: Any, hint: type, field: dataclasses.Field[Any]) -> Any:
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1000 else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ConfigError(f": expected {names.get(hint, hint.__name__)} (got {shown(value)})")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f": must be finite (got {shown(value)})")
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f": must be one of {', '.join(map(str, choices))} (got {shown(value)})")
    tests = {
        "ge": (">=", lambda a, b: a >= b),
        "gt": (">", lambda a, b: a > b),
        "le": ("<=", lambda a, b: a <= b),
        "lt": ("<", lambda a, b: a < b),
    }
    for key, bound in (field.metadata.get("bounds") or {}).items():
        sign, holds = tests[key]
        if not holds(value, bound):
            raise ConfigError(f": must be {sign} {bound} (got {shown(value)})")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, ModelConfig):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
