"""Pages: charts and pictures one below the other, under a title; and small pictures in rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .charts import GAP, GREY, Pixels, render, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN = 28  # pixels around a page


def mosaic(
    title: str,
    images: Sequence[Pixels],
    captions: Sequence[str],
    columns: int,
    width: int,
    *,
    colors: Sequence[str] | None = None,
    subtitle: str = "",
) -> Pixels:
    """Small pictures in rows of `columns`, each over its caption, spread over `width` pixels."""
    tallest = max((len(image) for image in images), default=0)
    top = 50 if subtitle else 30
    pitch = tallest + 22
    height = top + -(-len(images) // columns) * pitch
    places = [(1 + round(n % columns * width / columns), top + n // columns * pitch) for n in range(len(images))]

    def draw(figure: Figure) -> None:
        write(figure, (0, 0), title, width, size=16)
        write(figure, (0, 26), subtitle, width, color=GREY)
        for n, ((left, row), image) in enumerate(zip(places, images, strict=True)):
            middle = left + image.shape[1] / 2
            below = height - row - len(image) - 5
            color = colors[n] if colors else GREY
            figure.text(middle, below, captions[n], transform=None, ha="center", va="top", color=color)

    board = render((width, height), draw)
    for (left, row), image in zip(places, images, strict=True):
        bottom, right = row + image.shape[0], left + image.shape[1]
        board[row - 1 : bottom + 1, left - 1 : right + 1] = 229  # a frame
        board[row:bottom, left:right] = image
    return board


def page(title: str, lines: Sequence[str], rows: Sequence[Pixels]) -> Pixels:
    """A title, lines of text, and pictures one below the other."""
    width = max([480, *(row.shape[1] for row in rows)])

    def draw(figure: Figure) -> None:
        write(figure, (0, 0), title, width, size=22)
        for n, line in enumerate(lines):
            write(figure, (0, 34 + 20 * n), line, width, size=14, color=GREY)

    header = render((width, 42 + 20 * len(lines)), draw)
    widened = [np.pad(row, ((0, GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.pad(np.concatenate([header, *widened]), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255)
