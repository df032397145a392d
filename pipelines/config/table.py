"""Rows of text as people read them: columns, each as wide as its widest cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GAP = "  "


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
