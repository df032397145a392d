"""From a command line to a run: parse it, run the verb, and end with the exit code that a shell expects.

    smalti VERB --config a.yaml --config b.yaml train.lr=1e-3 model.kind=gpt

Files merge left to right, then overrides do; a node whose `kind` changes is replaced rather than mixed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pydantic import ValidationError

from tokenizer.config import Data, defaults_of, explain, find_mark, merge, with_defaults
from tokenizer.files import PipelineLoadError, one_line

from .arguments import read_arguments, sorted_words, split_lists
from .errors import UserError, at_a_shell, did_you_mean, exit_codes, is_first_process
from .help import help_page, keys_of
from .importing import import_asked
from .schema import C, Config, Of, resolve_short_forms, to_yaml

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
    """Parse, and return `run(config)`. A user's mistake is reported in lines on stderr, with exit code 2.

    `after_ctrl_c` says what Ctrl-C leaves. With the command line for `argv` the process ends as `at_a_shell` says.
    """
    with at_a_shell() if argv is None else nullcontext():
        with exit_codes(quiet=not is_first_process()):  # all processes read the same command line
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
    """The configuration that `argv` (default: the command line) asks for. Raises `UserError` with all its problems.

    `--help` and `--dry-run` print and raise `SystemExit(0)`. `defaults` maps what was given to further defaults.
    """
    words = sorted_words(sys.argv[1:] if argv is None else argv)
    import_asked(words.imports)
    parts, problems = read_arguments(words)
    parts = [resolve_short_forms(cls, part) for part in parts]
    given: Data = {}
    for part in parts:
        given = merge(given, part)
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
        lines = explain(cls, data, error, partial(describe_unknown, cls))
        # With help nothing need be complete, and what an unreadable file did not say cannot be called missing.
        incomplete = problems or words.help is not None
        problems += [line for line in lines if not (incomplete and line.endswith(": missing"))]
    if words.help is not None:
        unknown = {name for name, field in cls.model_fields.items() if find_mark(field, Of) and not further.get(name)}
        known = {name: given.get(name, {}) if name in unknown else value for name, value in data.items()}
        page = help_page(cls, verb, description, words.help, known, {*given, *further})
        print_and_exit(page, problems)
    if config is None or problems:
        raise UserError("\n".join(map(one_line, problems)))
    if words.dry_run:
        print_and_exit(to_yaml(config))
    return config


def merge_with_defaults(cls: type[C], parts: list[Data]) -> Data:
    """The defaults, and the parts merged into them one by one, each with those of the kinds that it names."""
    data = defaults_of(cls)
    for part in parts:
        data = with_defaults(cls, merge(data, part))
    return split_lists(cls, data)


def describe_unknown(cls: type[Config], key: str, value: Any) -> list[str]:
    """A line for each unknown key at or below `key`, with the one that was probably meant."""
    known = keys_of(cls)
    return [
        f"{name[:200]}: in a file, keys below a section are nested, without dots"
        if name in known
        else f"{name[:200]}: unknown key; {did_you_mean(name, known, '--help all lists them')}"
        for name in leaves(key, value)
    ]


def leaves(key: str, value: Any) -> Iterator[str]:
    """`key`, or in its place those of the mapping that it holds."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from leaves(f"{key}.{name}", part)
    else:
        yield key


def print_and_exit(text: str, problems: Sequence[str] = ()) -> NoReturn:
    """Print `text`, and warnings on stderr; once, however many processes there are. Exit with success."""
    if is_first_process():
        print(text.rstrip())
        for problem in problems:
            print(f"warning: {problem}", file=sys.stderr)
    raise SystemExit(0)


def choose_device(name: str) -> torch.device:
    """`auto` is the accelerator if there is one. Raises `UserError` for one that is not there."""
    import torch  # not to list the verbs

    try:
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    if found.type == "meta":
        raise UserError("device: 'meta' holds shapes and no numbers; there are cpu, cuda, mps and auto")
    return found
