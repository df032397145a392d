"""One grammar for every verb: YAML files and key=value become a checked, frozen configuration.

    smalti VERB --config a.yaml --config b.yaml train.lr=1e-3 model.kind=gpt

Files merge left to right, then overrides do; a node whose `kind` changes is replaced rather than mixed.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import select
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Annotated, Any, Literal, NoReturn, TextIO, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tokenizer.pretrained import PipelineLoadError

from .arguments import Data, UserError, read_arguments, show, write_yaml
from .heartbeat import ProcessLost
from .nodes import ModelNode, merge, node_of, plain

__all__ = ["Config", "Interrupted", "ModelNode", "UserError", "difference", "merge", "parse", "run_command", "to_yaml"]

C = TypeVar("C", bound="Config")
R = TypeVar("R")
CTRL_C, CLOSED_PIPE = 130, 141  # the exit codes by which shells show SIGINT and SIGPIPE


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run, which has saved itself and has said so."""


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
        from .help import help_page

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
        from .config_errors import explain

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
    kept: Callable[[C], str] | None = None,
) -> R:
    """Parse, and return `run(config)`. A mistake of the user is told in lines on stderr, with exit code 2.

    `kept` says what Ctrl-C leaves. With the command line for `argv` the process ends as `at_a_shell` says.
    """
    with at_a_shell() if argv is None else nullcontext():
        with exit_codes(quiet=not is_first_process()):  # all processes read the same command line
            config = parse(cls, argv, verb=verb, description=description, defaults=defaults)
        with exit_codes(kept=None if kept is None else partial(kept, config)):
            return run(config)


@contextmanager
def at_a_shell() -> Iterator[None]:
    """A process that ends as shells expect it of the commands that they start."""
    with ended_by_closed_pipe(), ended_by_ctrl_c():
        yield


@contextmanager
def ended_by_closed_pipe() -> Iterator[None]:
    """Say nothing, and exit with the code of SIGPIPE, where nobody reads what is printed any more, after `| head`."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at exit, where Python does it, nothing could be caught
    except BrokenPipeError:
        if not nobody_reads(sys.stdout):  # but something else: a connection
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left, as Python exits
        raise SystemExit(CLOSED_PIPE) from None


def nobody_reads(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    if stream is None:
        return False
    poll = select.poll()
    poll.register(stream.fileno())
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let the signal end the process that Ctrl-C ends, as Python itself would: the loop of a shell goes on after any
    exit code, also after 130, which it shows in either case."""
    try:
        yield
    except SystemExit as error:
        if error.code != CTRL_C:
            raise
        sys.excepthook = lambda *_: None  # all is said
        raise KeyboardInterrupt from None


@contextmanager
def exit_codes(quiet: bool = False, kept: Callable[[], str] | None = None) -> Iterator[None]:
    """A user's mistake becomes `error: ...` lines and exit code 2, Ctrl-C becomes 130; a bug keeps its traceback, and a
    last line says on which process and where in a run it came up."""
    try:
        yield
    except ProcessLost as error:
        print(f"error on process {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    except (UserError, PipelineLoadError) as error:
        label = "error" if is_first_process() else f"error on process {os.environ['RANK']}"
        if not quiet:
            print(*(f"{label}: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        if is_first_process() and not isinstance(error, Interrupted):
            below = "\n" if sys.stderr.isatty() else ""  # where ^C stands, and perhaps a progress bar
            print(f"{below}error: interrupted{f'; {kept()}' if kept else ''}", file=sys.stderr, flush=True)
        raise SystemExit(CTRL_C) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # nobody's bug
            label = "error" if is_first_process() else f"error on process {os.environ['RANK']}"
            print(f"{label}: {error.filename or 'disk full'}: {error.strerror}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error
        if not hasattr(error, "place"):  # not while a run was under way
            raise
        traceback.print_exc()
        where = f"error on process {os.environ.get('RANK', '0')}: {error.place}"
        print(f"{where}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def is_first_process() -> bool:
    """Whether this process is the one that talks, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def leave_with(text: str) -> NoReturn:
    """Print `text`, once however many processes there are, and exit with success."""
    if is_first_process():
        print(text.rstrip())
    raise SystemExit(0)


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
