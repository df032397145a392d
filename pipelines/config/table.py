"""Rows of text as people read them: columns, each as wide as its widest cell."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

GAP = "  "
NARROW = 30  # columns of a sentence, below which it stands below its row


def table(rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """A line for each row of cells, of which a row may have fewer than another. right: the columns, from 0, whose cells
    end at the same place, as those of numbers should; the others begin there."""
    rows, right = list(rows), set(right)
    count = max((len(row) for row in rows), default=0)
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(count)]

    def cell(column: int, text: str) -> str:
        return text.rjust(widths[column]) if column in right else text.ljust(widths[column])

    lines = [GAP.join(cell(column, text) for column, text in enumerate(row)).rstrip() for row in rows]
    return "\n".join(lines)


def wrapped(text: str, columns: int) -> list[str]:
    """The lines of a text; words stay whole, also those with a hyphen in them and those that are too long."""
    return textwrap.wrap(text, columns, break_long_words=False, break_on_hyphens=False)


def listed(rows: Iterable[Sequence[str]], columns: int, least: int = 0) -> list[str]:
    """Pairs of a name and a sentence, in so many columns, of which names have at least so many."""
    pairs = list(rows)
    longest = max((least, *(len(name) for name, _ in pairs)))
    return [line for pair in pairs for line in row_lines(pair, [longest, columns - longest - 4])]


def row_lines(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of one row, every cell wrapped to its column; the last is a sentence. It begins on a line of its own
    where a word of another cell is wider than its column, and stands below the whole row where it has too little room.
    """
    *first, sentence = cells
    *narrow, room = widths
    if room < NARROW:
        whole = sum(widths) + len(GAP) * len(narrow)
        line = GAP.join(cell.ljust(size) for cell, size in zip(first, narrow, strict=True)).rstrip()
        top, *rest = [line] if len(line) <= whole else wrapped(GAP.join(first), whole - 4)
        return [f"  {top}", *(f"      {text}" for text in [*rest, *wrapped(sentence, whole - 4)])]
    columns = [wrapped(cell, size) or [""] for cell, size in zip(first, narrow, strict=True)]
    overflows = any(len(line) > size for column, size in zip(columns, narrow, strict=True) for line in column)
    below = wrapped(sentence, room) if overflows else []
    lines = zip_longest(*columns, [] if overflows else wrapped(sentence, room), fillvalue="")
    found = [GAP.join(text.ljust(size) for text, size in zip(line, widths, strict=True)).rstrip() for line in lines]
    start = sum(narrow) + len(GAP) * len(narrow)
    return [f"  {line}" for line in [*found, *(" " * start + line for line in below)]]
