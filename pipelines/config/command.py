"""From a command line to a run: parse it, run the verb, and end with the exit code that a shell expects."""

from __future__ import annotations

import errno
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NoReturn, TextIO, TypeVar

from pydantic import ValidationError

from tokenizer.config import Data, defaults_of, explain, find_mark, merge, with_defaults
from tokenizer.files import FULL, PipelineLoadError, one_line

from .arguments import ReportedElsewhere, UserError, read_arguments, sorted_words
from .errors import search, told_of
from .help import Known, help_page
from .importing import import_asked
from .lists import split_lists
from .schema import C, Of, as_meant, to_yaml
from .terminal import error_line

if TYPE_CHECKING:
    import torch

R = TypeVar("R")
TELLING = 5.0  # seconds in which the main process has told its error and ended, and its launcher ends the others
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)  # of files and folders; of other things, too, without a name
CTRL_C, CLOSED_PIPE = 130, 141  # the exit codes by which shells show SIGINT and SIGPIPE


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run, which has saved itself and has said so."""


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
    words = sorted_words(sys.argv[1:] if argv is None else argv)
    import_asked(words.imports)
    found_parts, problems = read_arguments(words)
    parts = [as_meant(cls, part) for part in found_parts]
    given: Data = {}
    for part in parts:
        given = merge(given, part)
    if words.help is not None:
        known, more = known_before(cls, parts, given, defaults)
        leave_with(help_page(cls, verb, description, known, words.help), [*problems, *more])
    data = filled(cls, [defaults(given) if defaults else {}, *parts])
    try:
        config = cls.model_validate(data)
    except ValidationError as error:
        # What an unreadable file or argument did not say cannot be called missing.
        found = explain(cls, data, error, partial(search, cls))
        problems += [line for line in found if not (problems and line.endswith(": missing"))]
    if problems:
        raise UserError("\n".join(map(one_line, problems)))
    if words.dry_run:
        leave_with(to_yaml(config))
    return config


def filled(cls: type[C], parts: list[Data]) -> Data:
    """The defaults, and the parts merged into them one by one, each with those of the kinds that it names."""
    data = defaults_of(cls)
    for part in parts:
        data = with_defaults(cls, merge(data, part))
    return split_lists(cls, data)


def known_before(
    cls: type[C], parts: list[Data], given: Data, defaults: Callable[[Data], Data] | None
) -> tuple[Known, list[str]]:
    """What help may show of a command line that need not be whole, and what is wrong with what it has."""
    problems: list[str] = []
    found: Data = {}
    try:
        found = defaults(given) if defaults else {}
    except (UserError, PipelineLoadError) as error:
        problems.append(str(error))
    data = filled(cls, [found, *parts])
    try:
        cls.model_validate(data)
    except ValidationError as error:
        problems += [line for line in explain(cls, data, error, partial(search, cls)) if told_of(given, line)]
    later = frozenset(name for name, field in cls.model_fields.items() if find_mark(field, Of) and not found.get(name))
    return Known(data, given, later), problems


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
    """A user's mistake becomes `error: ...` lines and exit code 2, Ctrl-C becomes 130; a bug keeps its traceback."""
    try:
        yield
    except ProcessFailed as error:
        print(error_line(label(each=True), str(error)), file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    except (UserError, PipelineLoadError) as error:
        if isinstance(error, ReportedElsewhere):
            time.sleep(TELLING)
        if not quiet:
            print(*(error_line(label(), line) for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        if is_first_process() and not isinstance(error, Interrupted):
            below = "\n" if sys.stderr.isatty() else ""  # where ^C stands, and perhaps a progress bar
            left = kept() if kept else ""
            print(below + error_line(label(), f"interrupted{left and f'; {left}'}"), file=sys.stderr, flush=True)
        raise SystemExit(CTRL_C) from error
    except OSError as error:
        if not is_for_users(error):
            raise
        print(error_line(label(), one_line(f"{error.filename or 'disk full'}: {error.strerror}")), file=sys.stderr)
        raise SystemExit(1 if error.errno in FULL else 2) from error


def is_first_process() -> bool:
    """Whether this process is the one that talks, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def label(each: bool = False) -> str:
    """What an error begins with; `each`: of a process as such, the first too."""
    rank = os.environ.get("RANK", "0")
    return f"error on process {rank}:" if each or rank != "0" else "error:"


def leave_with(text: str, problems: Sequence[str] = ()) -> NoReturn:
    """Print `text`, and on stderr what is not as it should be; once, however many processes there are. Exit with
    success."""
    if is_first_process():
        print(text.rstrip(), flush=True)
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


def is_for_users(error: OSError) -> bool:
    """Return whether this is no bug, but for a user to mend: a full disk, a name that is too long, a file that may not
    be used."""
    return error.errno in (*FULL, errno.ENAMETOOLONG) or (error.errno in FORBIDDEN and error.filename is not None)


class ProcessFailed(Exception):
    """Another process of the group failed; the message says which, and how."""
