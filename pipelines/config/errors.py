"""Errors of the command line: one line on stderr and an exit code, without a traceback."""

from __future__ import annotations

import difflib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tokenizer.files import FULL, PipelineLoadError, one_line

CTRL_C, CLOSED_PIPE = 130, 141  # exit codes that shells report for SIGINT and SIGPIPE
HEAD_START = 5.0  # seconds in which the main process prints its error and the launcher ends the others


class UserError(Exception):
    """A mistake by the user. Each of the problems becomes one line of the message, without unprintable characters."""

    def __init__(self, *problems: object) -> None:
        super().__init__("\n".join(one_line(str(problem)) for problem in problems))


@contextmanager
def user_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turn errors of these kinds into `UserError`, after a prefix such as `data: `."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error


class ReportedElsewhere(UserError):
    """Raised on other processes when the main process reports the error."""


class ProcessFailed(Exception):
    """Another process of the group failed; the message says which one and how."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run that has already saved its state and printed so."""


def is_first_process() -> bool:
    """Whether this process prints, among those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str, stream: TextIO | None = None) -> None:
    """Print one line, see `one_line`, by default to stderr. Write errors such as a full disk are ignored, except a
    closed pipe, which raises `BrokenPipeError`."""
    try:
        # In one write, so that lines of several processes do not mix.
        print(f"{one_line(line)}\n", end="", file=sys.stderr if stream is None else stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """Suggest the known dotted names nearest to `name`, or return `otherwise` if no name is near."""
    names, name = list(known), name[:80]
    last = [key for key in names if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, names, 1, 0.75) or last[:2] or difflib.get_close_matches(name, names, 1, 0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise


@contextmanager
def exit_codes(*, quiet: bool = False, after_ctrl_c: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn user errors into `error: ...` lines and exit code 2, and Ctrl-C into 130. Bugs keep their traceback.

    quiet: do not print user errors. after_ctrl_c: returns the rest of the line about Ctrl-C.
    """
    rank = os.environ.get("RANK", "0")
    label = "error:" if rank == "0" else f"error on process {rank}:"
    try:
        yield
    except ProcessFailed as error:
        print(f"error on process {rank}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except (UserError, PipelineLoadError) as error:
        if isinstance(error, ReportedElsewhere):
            time.sleep(HEAD_START)
        if not quiet:
            print(*(f"{label} {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        if is_first_process() and not isinstance(error, Interrupted):
            start = "\n" if sys.stderr.isatty() else ""  # the terminal has printed ^C, perhaps after a progress bar
            more = f"; {after_ctrl_c()}" if after_ctrl_c else ""
            print(f"{start}{label} interrupted{more}", file=sys.stderr)
        raise SystemExit(CTRL_C) from error
    except OSError as error:
        full = error.errno in FULL
        if error.filename is None and not full:
            raise
        reason = one_line(f"{error.filename or 'disk full'}: {error.strerror}")
        print(f"{label} {reason}", file=sys.stderr)
        raise SystemExit(1 if full else 2) from error


@contextmanager
def at_a_shell() -> Iterator[None]:
    """End the process as shells expect: silently if its output pipe was closed (`| head`), and by SIGINT itself after
    Ctrl-C, so that a shell loop stops too. Our warnings are one line, without the place in the code."""
    plain, own = warnings.formatwarning, str(Path(__file__).parents[1])

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = category is UserWarning and (filename.startswith(own) or filename == sys.argv[0])
        return f"warning: {message}\n" if ours else plain(message, category, filename, lineno, line)

    warnings.formatwarning = format_warning
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)  # succeeds if a different pipe broke
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
            raise SystemExit(CLOSED_PIPE) from None
        raise
    except SystemExit as error:
        if error.code != CTRL_C:
            raise
        sys.excepthook = lambda *_: None  # the error is already printed
        raise KeyboardInterrupt from None
