"""One grammar for every verb: YAML files and key=value become a checked, frozen configuration.

    smalti VERB --config a.yaml --config b.yaml train.lr=1e-3 model.kind=gpt

Files merge left to right, then overrides do; a node whose `kind` changes is replaced rather than mixed.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, PydanticUndefined, core_schema

from tokenizer.pretrained import ModelConfig, PipelineLoadError, node_problems
from tokenizer.settings import REQUIRED, family_of

Data = dict[str, Any]
C = TypeVar("C", bound="Config")
R = TypeVar("R")

WIDTH = 110  # of the help page
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class UserError(Exception):
    """A user's mistake. Each line of the message is a problem of its own."""


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
        return {key: unmask(value, kinds[key]) if key in kinds else value for key, value in data.items()}


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


def parse(
    cls: type[C],
    argv: list[str] | None = None,
    *,
    verb: str,
    description: str | None,
    defaults: Callable[[Data], Data] | None = None,
) -> C:
    """The configuration that `argv` (default: the command line) asks for; raises `UserError` with all its problems.

    `--help` and `--dry-run` print and raise `SystemExit(0)`. `defaults` maps what was given to further defaults.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        leave_with(help_page(cls, verb, description))
    parts, dry_run, problems = read_arguments(argv)
    given: Data = {}
    for part in parts:
        given = merge(given, part)
    data = default_nodes(cls)
    for part in [defaults(given) if defaults else {}, *parts]:
        data = complete(cls, merge(data, part))
    try:
        config = cls.model_validate(data)
    except ValidationError as error:
        # What an unreadable file or argument did not say can not be called missing.
        problems += [line for line in explain(cls, error) if not (problems and line.endswith(": missing"))]
    if problems:
        raise UserError("\n".join(problems))
    if dry_run:
        leave_with(to_yaml(config))
    return config


def run_command(
    cls: type[C],
    run: Callable[[C], R],
    argv: list[str] | None = None,
    *,
    verb: str,
    description: str | None,
    defaults: Callable[[Data], Data] | None = None,
) -> R:
    """Parse, and return `run(config)`. A mistake of the user is told in lines on stderr, with exit code 2."""
    with exit_codes(quiet=not is_first_process()):  # all processes read the same command line
        config = parse(cls, argv, verb=verb, description=description, defaults=defaults)
    with exit_codes():
        return run(config)


@contextmanager
def exit_codes(quiet: bool = False) -> Iterator[None]:
    """A user's mistake becomes `error: ...` lines and exit code 2, Ctrl-C becomes 130; a bug keeps its traceback."""
    try:
        yield
    except (UserError, PipelineLoadError) as error:
        label = "error" if is_first_process() else f"error on process {os.environ['RANK']}"
        if not quiet:
            print(*(f"{label}: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        if is_first_process():
            print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from error


def is_first_process() -> bool:
    """Whether this process is the one that talks, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def leave_with(text: str) -> NoReturn:
    """Print `text`, once however many processes there are, and exit with success."""
    if is_first_process():
        print(text.rstrip())
    raise SystemExit(0)


# YAML ---------------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of `node`; raises `ConstructorError` at a repeated key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = f"{key.value!r} is here twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """What `Loader` reads back: mappings one key a line, lists in brackets."""


for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
                                list("-+.0123456789"))  # fmt: skip
Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))


def to_yaml(config: Config) -> str:
    """The configuration as a file for `--config`."""
    data = config.model_dump(mode="json")
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)


def read_yaml(text: str) -> Any:
    """The value of `text`; raises `UserError` with the line, unless there is only one."""
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark and "\n" in text.strip() else ""
        raise UserError(f"{line}not readable as YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise UserError(f"not readable as YAML: {str(error).splitlines()[0]}") from error


def read_file(path: str) -> Data:
    """The mapping in a YAML file; raises `UserError`."""
    try:
        data = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can not be read ({getattr(error, 'strerror', None) or error})") from error
    except UserError as error:
        raise UserError(f"{path}, {error}") from error
    if not isinstance(data, dict | None):
        raise UserError(f"{path}: expected a mapping of keys at the top level (got {show(data)})")
    return data or {}


# arguments and merging ----------------------------------------------------------------------------


def read_arguments(argv: list[str]) -> tuple[list[Data], bool, list[str]]:
    """What files and then overrides say, each a nested mapping; whether this is a dry run; and what is wrong."""
    files, problems, overrides = [], [], []
    arguments = iter(argument for argument in argv if argument != "--dry-run")
    for argument in arguments:
        try:
            if argument == "--config" or argument.startswith("--config="):
                path = argument[9:] or next(arguments, "")
                if not path:
                    raise UserError("--config: expected a file after it")
                files.append(read_file(path))
            else:
                overrides.append((kinds_first(argument), read_override(argument)))
        except UserError as error:
            problems.append(str(error))
    overrides.sort(key=lambda override: override[0])
    return files + [data for _, data in overrides], "--dry-run" in argv, problems


def kinds_first(argument: str) -> float:
    """Sorts overrides, so that `a.kind=x` does not throw away the `a.b=1` that stands to its left."""
    key = argument.partition("=")[0]
    return key.count(".") if key.split(".")[-1] == "kind" else float("inf")


def read_override(argument: str) -> Data:
    """`a.b=value` as `{"a": {"b": value}}`; raises `UserError`."""
    key, equals, text = argument.partition("=")
    if not equals or not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", key):
        bare = re.fullmatch(r"--?(\w[\w.-]*)(=.*)?", argument)
        hint = f"; write {bare[1]}{bare[2] or '=value'}" if bare else ""
        hint = f"; write --config {argument}" if argument.endswith((".yaml", ".yml")) and not equals else hint
        raise UserError(f"{argument}: expected --config FILE, key=value, --dry-run or --help{hint}")
    try:
        value = read_yaml(text)
    except UserError as error:
        raise UserError(f"{key}: {error} (got {text!r}; for plain text write {key}='\"...\"')") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(old: Data, new: Data) -> Data:
    """`new` on top of `old`, mappings key by key, except that a node whose `kind` changes is replaced."""
    if "kind" in old and new.get("kind", old["kind"]) != old["kind"]:
        old = {}
    both = {key: merge(old[key], value) for key, value in new.items()
            if isinstance(value, dict) and isinstance(old.get(key), dict)}  # fmt: skip
    return {**old, **new, **both}


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


def default_nodes(cls: type[BaseModel]) -> Data:
    """The defaults that are mappings, for overrides of single keys to fall on."""
    data = {name: plain(field.get_default(call_default_factory=True)) for name, field in cls.model_fields.items()
            if not field.is_required()}  # fmt: skip
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


def completed(family: Any, node: Data) -> Data:
    """`node` on top of the defaults of its kind, nested nodes too; an unknown kind is left as it is."""
    if node.get("kind") not in family.available():
        return node
    fields = choices_of(family.find(node["kind"]).Config)
    defaults = {f.name: plain(f.default) for f in fields if f.default is not REQUIRED}
    node = merge({"kind": node["kind"], **defaults}, node)
    nested = {f.name: completed(family_of(f), node[f.name]) for f in fields
              if f.metadata.get("family") and isinstance(node.get(f.name), dict)}  # fmt: skip
    return {**node, **nested}


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


# annotations --------------------------------------------------------------------------------------


def node_of(field: FieldInfo) -> ModelNode | None:
    """The field's marker, if it is a model node."""
    return next((mark for mark in field.metadata if isinstance(mark, ModelNode)), None)


def models_in(hint: Any) -> list[type[BaseModel]]:
    """The pydantic models that an annotation chooses from."""
    if get_origin(hint) is Annotated:
        return models_in(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [model for part in get_args(hint) for model in models_in(part)]
    return [hint] if isinstance(hint, type) and issubclass(hint, BaseModel) else []


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


def unmask(value: Any, wanted: set[type]) -> Any:
    """`value`, or each item of a list, but `Masked` if it is none of the types `wanted`. (A float may come as text.)"""
    if not wanted <= {int, float, bool, str, type(None)}:
        return value
    if isinstance(value, (list, tuple)):
        return [unmask(item, wanted) for item in value]
    if isinstance(value, bool):
        wrong = bool not in wanted and bool(wanted & {int, float})
    elif isinstance(value, (int, float)):
        wrong = bool in wanted and not wanted & {int, float}
    else:
        wrong = isinstance(value, str) and not wanted & {str, float}
    return Masked(value) if wrong else value


# problems -----------------------------------------------------------------------------------------

EXPECTED = {
    "int_type": WORDS[int], "int_parsing": WORDS[int], "int_from_float": WORDS[int], "float_type": WORDS[float],
    "float_parsing": WORDS[float], "bool_type": WORDS[bool], "bool_parsing": WORDS[bool], "string_type": WORDS[str],
    "tuple_type": "a list", "list_type": "a list", "dict_type": "a mapping of keys", "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}  # fmt: skip
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def explain(cls: type[Config], error: ValidationError) -> list[str]:
    """What pydantic found, a line for each key."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        tag = ".kind" if detail["type"].startswith("union_tag") else ""
        found.setdefault(dotted(cls, detail["loc"]) + tag, []).append(detail)
    return [line for key, details in found.items() for line in key_problems(cls, key, details)]


def dotted(cls: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """The key of pydantic's location, which also names branches of unions and positions in lists."""
    keys, models = [], [cls]
    for position, part in enumerate(location):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [model for field in fields for model in models_in(field.annotation)]
        if fields or (models and position == len(location) - 1 and str(part) not in map(tag_of, models)):
            keys.append(str(part))
    return ".".join(keys)


def key_problems(cls: type[Config], key: str, details: list[ErrorDetails]) -> list[str]:
    """The lines for one key. Where every branch of a union complains, those that only want another type are silent."""
    kind, value = details[0]["type"], details[0]["input"]
    if kind == "extra_forbidden":
        return unknown(cls, key, value)
    if kind == "model_node":
        return ModelNode(details[0]["ctx"]["family"]).problems(value, f"{key}.")
    complaints = [complaint(detail) for detail in details if not expected(detail)]
    if complaints:
        return [f"{key}: {text}".removeprefix(": ") for text in dict.fromkeys(complaints)]
    wish = " or ".join(dict.fromkeys(map(expected, details)))
    if isinstance(value, dict) and value and "mapping" not in wish:
        return [f"{key}.{next(iter(value))}: {key} has no keys of its own, it is {wish}"]
    quoting = "; text that looks like something else needs quotes" if WORDS[str] in wish and value is not None else ""
    return [f"{key}: expected {wish} (got {show(value)}{quoting})"]


def expected(detail: ErrorDetails) -> str:
    """The type that pydantic wanted, in words; empty if it complains about something else."""
    return EXPECTED.get(detail["type"], "")


def complaint(detail: ErrorDetails) -> str:
    """What is wrong with a value of the right type."""
    kind, context, got = detail["type"], detail.get("ctx", {}), f" (got {show(detail['input'])})"
    for name, sign in SIGNS.items():
        if name in context:
            return f"must be {sign} {show_number(context[name])}{got}"
    if kind == "union_tag_not_found" or (kind == "missing" and isinstance(detail["loc"][-1], str)):
        return "missing"
    if kind == "missing":  # from a list
        return f"too few values{got}"
    if kind == "too_long":
        return f"expected at most {context['max_length']} values{got}"
    if kind == "literal_error":
        return f"must be one of {context['expected'].replace(' or ', ', ')}{got}"
    if kind == "union_tag_invalid":
        return f"must be one of {context['expected_tags']} (got {context['tag']!r})"
    if kind == "value_error":
        return str(context["error"])
    return "must be finite" + got if kind == "finite_number" else detail["msg"][:1].lower() + detail["msg"][1:] + got


def unknown(cls: type[Config], key: str, value: Any) -> list[str]:
    """A line for each unknown key at or below `key`, with the one that was probably meant."""
    if isinstance(value, dict) and value:
        return [line for name, part in value.items() for line in unknown(cls, f"{key}.{name}", part)]
    rows = [row.key for section in sections(cls, {}) for row in section.rows]
    known = {".".join(row.split(".")[:depth]): None for row in rows for depth in range(1, row.count(".") + 2)}
    if key in known:
        return [f"{key}: not a key of this kind, or dots where YAML wants nested keys"]
    same_name = [row for row in rows if row.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, known, 1, 0.75) or same_name or difflib.get_close_matches(key, known, 1, 0.6)
    return [f"{key}: unknown key; " + (f"did you mean {near[0]!r}?" if near else "--help lists what there is")]


# help ---------------------------------------------------------------------------------------------


OPTIONS = (
    ("--config FILE", "a YAML file; several merge left to right"),
    ("key=value", "set one key, whatever the files say; the value is YAML, as in train.lr=1e-3 or sizes=[1,2]; "
     "another kind replaces its node with all that was set below it"),
    ("--dry-run", "print the resulting configuration, itself a file for --config, and stop"),
)  # fmt: skip


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


def sections(cls: type[BaseModel], defaults: Data, prefix: str = "", title: str = "") -> Iterator[Section]:
    """The keys of a configuration, each nested node a section of its own. `defaults` win over those of the class."""
    rows, nested = [], []
    for name, field in cls.model_fields.items():
        key, sentence, models = prefix + name, field.description or "", models_in(field.annotation)
        default = defaults.get(name, plain(field.get_default(call_default_factory=True)))
        below = default if isinstance(default, dict) else {}
        if node := node_of(field):
            nested.append(Section(heading(key, sentence), [kind_row(node.load(), key, below.get("kind"))]))
            nested += family_sections(node.load(), key, below)
        elif len(models) == 1:
            nested += sections(models[0], below, f"{key}.", heading(key, sentence))
        elif models:
            rows.append(Row(f"{key}.kind", " | ".join(map(tag_of, models)), below.get("kind", "required"), sentence))
            for model in models:
                matching = below if below.get("kind") == tag_of(model) else {}
                about = (model.__doc__ or "").split("\n")[0]
                nested += sections(model, matching, f"{key}.", heading(f"{key}.kind={tag_of(model)}", about))
        elif name == "kind" and tag_of(cls):
            continue  # shown where the kinds are listed
        else:
            rows.append(Row(key, type_text(field.annotation, range_of(field)), default_text(default), sentence))
    yield Section(title, rows)
    yield from nested


def family_sections(family: Any, key: str, defaults: Data) -> Iterator[Section]:
    """The keys of every member of a family of models, for a node at `key` that is `defaults` if nothing is said."""
    for name in family.available():
        given = defaults if defaults.get("kind") == name else {}
        config = family.find(name).Config
        hints = get_type_hints(config)
        rows: list[Row] = []
        nested: list[Section] = []
        for field in choices_of(config):
            path, sentence = f"{key}.{field.name}", field.metadata.get("help", "")
            default = given.get(field.name, plain(field.default))
            if field.metadata.get("family"):
                below = default if isinstance(default, dict) else {}
                rows.append(kind_row(family_of(field), path, below.get("kind"), sentence))
                nested += family_sections(family_of(field), path, below)
            else:
                rows.append(Row(path, setting_text(field, hints[field.name]), default_text(default), sentence))
        about = (family.find(name).__doc__ or config.__doc__ or "").strip().split("\n")[0]
        yield Section(heading(f"{key}.kind={name}", about), rows)
        yield from nested


def kind_row(family: Any, key: str, default: str | None, sentence: str = "") -> Row:
    """The row of the key that chooses a member of a family."""
    return Row(f"{key}.kind", " | ".join(family.available()), default or "required", sentence)


def heading(key: str, sentence: str) -> str:
    """The title of a section."""
    return f"{key}: {sentence}" if sentence else key


def tag_of(model: type[BaseModel]) -> str:
    """The `kind` by which a union tells `model` from its siblings; empty without one."""
    hint: Any = model.model_fields["kind"].annotation if "kind" in model.model_fields else None
    return str(get_args(hint)[0]) if get_origin(hint) is Literal else ""


def setting_text(field: dataclasses.Field[Any], hint: Any) -> str:
    """The choices, or else the type and range, of a model's setting."""
    choices = " | ".join(map(str, field.metadata.get("choices") or ()))
    return choices or type_text(hint, bounds_text(field.metadata.get("bounds") or {}))


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


def show_number(value: float) -> str:
    """A bound without needless digits."""
    return str(int(value)) if float(value).is_integer() else str(value)


def show(value: Any) -> str:
    """A value as one would write it in YAML, on one line, shortened."""
    value = value.value if isinstance(value, Masked) else value
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."


def default_text(value: Any) -> str:
    """A default on the help page, where text needs no quotes."""
    if value is REQUIRED or value is PydanticUndefined:
        return "required"
    return value if isinstance(value, str) and value else show(plain(value))
