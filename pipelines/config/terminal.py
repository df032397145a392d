"""What a terminal is like: how wide, and whether it shows colours."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import Any, TextIO

USUAL, NARROWEST, WIDEST = 100, 40, 120  # columns
BOLD, RED = "1", "1;31"


def width() -> int:
    """The columns to write into: those of the terminal, or of COLUMNS, within reason; 100 where there is neither."""
    return min(WIDEST, max(NARROWEST, shutil.get_terminal_size((USUAL, 24)).columns))


def shows_colors(stream: TextIO | None) -> bool:
    """Whether to colour what is written there: on a terminal that can, unless NO_COLOR says no (https://no-color.org);
    FORCE_COLOR says yes wherever it goes."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO | None) -> str:
    """`text` in a style, where `stream` shows such."""
    return f"\033[{style}m{text}\033[0m" if text and shows_colors(stream) else text


def heading(text: str) -> str:
    """A heading of what is printed on stdout: bold."""
    return styled(text, BOLD, sys.stdout)


def error_line(label: str, text: str) -> str:
    """A line of error for stderr: its label bold and red, and in a terminal cut between words, not within."""
    if sys.stderr is not None and sys.stderr.isatty():
        options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "  "}
        text = textwrap.fill(f"{label} {text}", width(), **options).removeprefix(label).lstrip()
    return f"{styled(label, RED, sys.stderr)} {text}"


def tell(line: str, stream: TextIO | None = None) -> None:
    """Print a line, on stderr unless told where. One that cannot be written, to a log on a full disk, say, is lost, and
    what is told of goes on; but for a pipe that nobody reads any more. Raises `BrokenPipeError`."""
    try:
        print(line, file=sys.stderr if stream is None else stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def by_clause(text: str) -> str:
    """A line for stdout, parted at its semicolons where it is wider than the terminal, so that what can be pasted stays
    whole; a file gets one line."""
    wide = sys.stdout is not None and sys.stdout.isatty() and len(text) > shutil.get_terminal_size((USUAL, 24)).columns
    return text.replace("; ", "\n  ") if wide else text
