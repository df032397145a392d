"""Parse a command line, run its verb, and exit with the code that a shell expects.

    smalti VERB --config a.yaml --config b.yaml train.lr=1e-3 model.kind=gpt

Files are merged from left to right, then overrides. A model whose `kind` changes is replaced, not merged. A part of a
model, such as its quantizer, keeps the settings that the new kind has too; a line says which.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pydantic import ValidationError

from tokenizer.config import Data, Node, Settings, defaults_of, explain, find_mark, merge, show_value, with_defaults
from tokenizer.files import PipelineLoadError

from .arguments import nest_settings, read_arguments, read_preset, sort_words, split_lists
from .errors import UserError, at_a_shell, did_you_mean, exit_codes, is_first_process, tell
from .help import list_keys, verb_help_page
from .importing import import_all
from .schema import C, Config, DefaultsFrom, resolve_short_forms, to_yaml

if TYPE_CHECKING:
    import torch

R = TypeVar("R")


def run_command(
    cls: type[C],
    run: Callable[[C], R],
    argv: list[str] | None = None,
    *,
    verb: str,
    description: str | None,
    defaults: Callable[[Data], Data] | None = None,
    after_ctrl_c: Callable[[C], str] | None = None,
) -> R:
    """Parse the command line and return `run(config)`. User errors are printed to stderr, with exit code 2.

    after_ctrl_c: describes what an interrupted run leaves behind. If `argv` is None, the process command line is used
    and the process exits as described in `at_a_shell`.
    """
    with at_a_shell() if argv is None else nullcontext():
        with exit_codes(quiet=not is_first_process()):  # every process reads the same command line
            config = parse(cls, argv, verb=verb, description=description, defaults=defaults)
        with exit_codes(after_ctrl_c=None if after_ctrl_c is None else partial(after_ctrl_c, config)):
            return run(config)


def parse(
    cls: type[C],
    argv: list[str] | None = None,
    *,
    verb: str,
    description: str | None,
    defaults: Callable[[Data], Data] | None = None,
) -> C:
    """Return the configuration for `argv` (default: the process command line). Raises one `UserError` that lists every
    problem; `--help` and `--dry-run` print and raise `SystemExit(0)`.

    defaults: computes further defaults from the keys that were given.
    """
    words = sort_words(sys.argv[1:] if argv is None else argv)
    import_all(words.imports)
    parts, problems = read_arguments(words, cls)
    parts = [resolve_short_forms(cls, part) for part in parts]
    given: Data = reduce(merge, parts, Data())
    further: Data = {}
    try:
        further = defaults(given) if defaults else {}
    except (UserError, PipelineLoadError) as error:
        if words.help is None:
            raise
        problems.append(str(error))
    data = merge_with_defaults(cls, [further, *parts])
    config: C | None = None
    try:
        config = cls.model_validate(data)
    except ValidationError as error:
        lines = explain(cls, data, error, partial(suggest_keys, cls))
        # Help needs no complete configuration, and a key may only seem missing because its file was unreadable.
        incomplete = problems or words.help is not None
        problems += [line for line in lines if not (incomplete and line.endswith(": missing"))]
    if words.help is not None:
        unknown = {
            name for name, field in cls.model_fields.items() if find_mark(field, DefaultsFrom) and not further.get(name)
        }
        known = {name: given.get(name, {}) if name in unknown else value for name, value in data.items()}
        page = verb_help_page(cls, verb, description, words.help, known, {*given, *further})
        print_and_exit(page, problems)
    if config is None or problems:
        raise UserError(*problems)
    if words.dry_run:
        print_and_exit(to_yaml(config))
    return config


def build_config(
    cls: type[C], files: Sequence[str | Path], settings: Data, defaults: Callable[[Data], Data] | None = None
) -> C:
    """Return the configuration for presets or files, then keyword arguments, whose names may have dots. Raises
    `UserError`, with a line for each problem.

    defaults: as in `parse`.
    """
    parts = [*(read_preset(os.fspath(file), cls) for file in files), nest_settings(settings)]
    parts = [resolve_short_forms(cls, part) for part in parts]
    data = merge_with_defaults(cls, [defaults(reduce(merge, parts, {})) if defaults else {}, *parts])
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = explain(cls, data, error, partial(suggest_keys, cls))
        raise UserError(*lines) from None  # hide pydantic's multi-line message


def merge_with_defaults(cls: type[C], parts: list[Data]) -> Data:
    """Merge the parts into the defaults one by one, adding the defaults of each kind that a part selects. Print which
    settings a part of a model keeps when its kind changes."""
    data, given, notes = defaults_of(cls), Data(), dict[str, Data]()
    for part in parts:
        part = keep_settings(cls, data, given, part, notes)
        given = merge(add_kinds(given, data), part)
        data = with_defaults(cls, merge(data, part))
    for key, reset in notes.items() if is_first_process() else ():
        node = reduce(lambda node, name: node[name], key.split("."), given)
        kept, lost = (
            ", ".join(f"{name}={show_value(value)}" for name, value in settings.items() if name != "kind")
            for settings in (node, reset)
        )
        tell(f"{key}: {node['kind']} with {kept or 'its defaults'}" + (f"; it does not take {lost}" if lost else ""))
    return split_lists(cls, data)


def keep_settings(
    cls: type[Settings], data: Data, given: Data, part: Data, notes: dict[str, Data], path: str = ""
) -> Data:
    """Return `part`; where it changes the kind of a node within a model, with the settings in `given` (the earlier
    parts) that the new kind accepts. data: `given` with defaults. Those it does not accept are added to `notes`, by the
    key of the node."""
    found = dict(part)
    for name in part.keys() & cls.model_fields.keys():
        old, new, own, key = data.get(name), part[name], given.get(name), f"{path}{name}"
        is_node = find_mark(cls.model_fields[name], Node) is not None
        new = {"kind": new} if is_node and isinstance(new, str) else new
        if not (isinstance(old, dict) and isinstance(new, dict) and (model := cls.nested(name, {**old, **new}))):
            continue
        own = own if isinstance(own, dict) else {}
        if not is_node or new.get("kind", old.get("kind")) == old.get("kind"):
            found[name] = keep_settings(model, old, own, new, notes, f"{key}.")
        elif path:
            kept = {each: value for each, value in own.items() if each not in new and accepts(model, each, value)}
            found[name] = {**kept, **new}
            if own.keys() - {"kind"}:
                notes[key] = {each: value for each, value in own.items() if each not in found[name]}
    return found


def accepts(model: type[Settings], name: str, value: Any) -> bool:
    if name == "kind" or name not in model.model_fields:
        return False
    try:
        model.model_validate({**defaults_of(model), name: value})
    except ValidationError as error:
        return all(detail["loc"][:1] != (name,) for detail in error.errors())
    return True


def add_kinds(given: Data, data: Data) -> Data:
    """Return the settings `given` with the kind of each node, from `data`."""
    nodes = {name: data[name] for name, value in given.items() if isinstance(value, dict) and name in data}
    nested = {name: add_kinds(given[name], node) for name, node in nodes.items() if isinstance(node, dict)}
    return {**given, **nested, **({"kind": data["kind"]} if "kind" in data else {})}


def suggest_keys(cls: type[Config], key: str, value: Any) -> list[str]:
    """Return a line for each unknown key at or below `key`, with the key that was probably meant."""
    if isinstance(value, dict) and value:
        return [line for name, part in value.items() for line in suggest_keys(cls, f"{key}.{name}", part)]
    known, (first, dot, rest) = list_keys(cls), key.partition(".")
    if key in known:
        return [f"{key}: in a file, write nested keys instead of dots"]
    hint = cls.unavailable.get(key) or did_you_mean(key, known, "--help all lists them")
    hint = f"it is called {cls.renamed[first]}{dot}{rest[:200]} now" if first in cls.renamed else hint
    return [f"{key[:200]}: unknown key; {hint}"]


def print_and_exit(text: str, problems: Sequence[str] = ()) -> NoReturn:
    """Print `text`, and `problems` as warnings on stderr, on the first process only; exit with code 0."""
    if is_first_process():
        print(text.rstrip())
        for problem in problems:
            print(f"warning: {problem}", file=sys.stderr)
    raise SystemExit(0)


def choose_device(name: str) -> torch.device:
    """Return the device; `auto` is the GPU if there is one. Raises `UserError` for a device that is not available."""
    import torch  # slow, and not needed to list the verbs

    try:
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    if found.type == "meta":
        raise UserError("device: 'meta' holds no data; choose cpu, cuda, mps or auto")
    return found
