"""Text tables with aligned or wrapped columns."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

GAP = "  "


def table(rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """Align rows of cells in columns; rows may have different lengths. right: indices of right-aligned columns."""
    rows, right = list(rows), set(right)
    count = max((len(row) for row in rows), default=0)
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(count)]

    def cell(column: int, text: str) -> str:
        return text.rjust(widths[column]) if column in right else text.ljust(widths[column])

    lines = [GAP.join(cell(column, text) for column, text in enumerate(row)).rstrip() for row in rows]
    return "\n".join(lines)


def count_of(number: int, noun: str) -> str:
    """Return `1 image` or `2,000 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def width() -> int:
    """Return the width of the terminal, at most 100."""
    return min(100, shutil.get_terminal_size((100, 24)).columns)


def wrap(text: str, columns: int) -> list[str]:
    return textwrap.wrap(text, columns, break_on_hyphens=False)


def wrap_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Wrap rows whose last cell, a sentence, fills the rest. Columns in between leave at least 30 characters."""
    first, *between = [max(map(len, cells)) for cells in list(zip(*rows, strict=True))[:-1]]
    room = width() - len(GAP) - first - len(GAP)
    most = min(20, max(12, (room - 30) // max(1, len(between)) - len(GAP)))
    widths = [first, *(min(most, size) for size in between)]
    widths.append(max(24, room - sum(size + len(GAP) for size in widths[1:])))
    lines = []
    for row in rows:
        columns = [wrap(cell, size) for cell, size in zip(row, widths, strict=True)]
        for line in zip_longest(*columns, fillvalue=""):
            lines.append(GAP + GAP.join(map(str.ljust, line, widths)).rstrip())
    return lines
