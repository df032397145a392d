"""How a command ends that cannot do what it was asked for: a line on stderr and an exit code, and no traceback."""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tokenizer.files import FULL, PipelineLoadError, escape, one_line

CTRL_C, CLOSED_PIPE = 130, 141  # the exit codes by which shells show SIGINT and SIGPIPE
HEAD_START = 5.0  # seconds in which the main process prints its error and its launcher ends the other processes


class UserError(Exception):
    """A user's mistake. Each line of the message is one problem; unprintable characters are escaped."""

    def __init__(self, message: object = "") -> None:
        super().__init__(escape(str(message), keep="\n"))


class ReportedElsewhere(UserError):
    """A mistake that the main process has found and reports; this is another process."""


class ProcessFailed(Exception):
    """Another process of the group failed; the message says which, and how."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run, which has saved itself and has said so."""


def is_first_process() -> bool:
    """Whether this process is the one that prints, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str, stream: TextIO | None = None) -> None:
    """Print a line, on stderr by default. One that cannot be written, as to a log on a full disk, is lost, and the
    command continues. Raises `BrokenPipeError` where nobody reads the stream any more."""
    try:
        print(line, file=sys.stderr if stream is None else stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """A question with the known dotted names that are nearest to `name`; `otherwise` where none is near."""
    names, name = list(known), name[:80]
    last = [key for key in names if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, names, 1, 0.75) or last[:2] or difflib.get_close_matches(name, names, 1, 0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise


@contextmanager
def exit_codes(*, quiet: bool = False, after_ctrl_c: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn a user's mistake into `error: ...` lines and exit code 2, Ctrl-C into 130; a bug keeps its traceback.

    quiet: print nothing of a mistake. after_ctrl_c: what the line about Ctrl-C says next.
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
            start = "\n" if sys.stderr.isatty() else ""  # the terminal shows ^C, perhaps after a progress bar
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
    """End the process as shells expect: in silence where nobody reads its output any more, as after `| head`, and by
    SIGINT itself after Ctrl-C, so that a loop of commands ends with it."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)  # works if it was another pipe that broke
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it exits
            raise SystemExit(CLOSED_PIPE) from None
        raise
    except SystemExit as error:
        if error.code != CTRL_C:
            raise
        sys.excepthook = lambda *_: None  # everything is said
        raise KeyboardInterrupt from None
