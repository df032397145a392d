"""Charts and pages drawn with Pillow alone: white panels with a title, two axes and areas, put together on one page.

All lines are level or upright, so nothing needs smoothing; text is the font that Pillow carries (ASCII only).
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = Image.Image
Values = NDArray[np.float64]
Color = tuple[int, int, int]

INK, GREY, FAINT, WHITE = (34, 38, 43), (98, 104, 112), (228, 231, 235), (255, 255, 255)
BLUE, ORANGE, RED, GREEN = (92, 128, 174), (222, 142, 80), (196, 84, 84), (106, 158, 120)
COLORS: tuple[Color, ...] = (BLUE, ORANGE, GREEN, (142, 118, 172), (150, 128, 104), (206, 136, 170), GREY, INK)
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 52, 46  # of the plotted area, within its panel
GAP, MARGIN = 20, 28  # between panels, and around the page


@dataclass(frozen=True)
class Axis:
    """From `low` to `high` > `low` (both > 0 when `log`). `whole` axes have ticks at whole numbers only."""

    low: float
    high: float
    label: str = ""
    log: bool = False
    whole: bool = False

    def share(self, values: Any) -> Values:
        """Where `values` lie between the ends, from 0 to 1; those outside at the nearer end."""
        values, low, high = np.asarray(values, dtype=np.float64), self.low, self.high
        if self.log:
            values, low, high = np.log(np.maximum(values, low)), math.log(low), math.log(high)
        return np.clip((values - low) / (high - low), 0, 1)

    def ticks(self, wanted: int) -> list[float]:
        """About `wanted` round numbers between the ends."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last > first:
                return [10.0**power for power in range(first, last + 1, -(-(last - first) // wanted))]
        step = round_up((self.high - self.low) / wanted)
        step = max(1.0, 5.0 if step == 2.5 else step) if self.whole else step
        ticks = [step * n for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        return ticks if len(ticks) > 1 or self.log else [self.low, self.high]


def round_up(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `value` > 0."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 2.5, 5, 10) if power * step >= value * (1 - 1e-9))


def number(value: float) -> str:
    """Three digits of a number: 0.25, 14, 1.5k, 20M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


@cache
def font(size: int) -> Any:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def shortened(text: str, width: float, size: int) -> str:
    """`text`, or as much of it as fits `width` pixels."""
    if font(size).getlength(text) <= width:
        return text
    fitting = bisect(range(len(text)), width, key=lambda count: font(size).getlength(text[:count] + "..."))
    return text[: max(0, fitting - 1)] + "..."


class Panel:
    """A white rectangle of `size` (width, height) with a title, a line about it, and axes to draw areas between."""

    def __init__(self, title: str, size: tuple[int, int], x: Axis, y: Axis, x_names: Mapping[float, str] | None = None):
        self.x, self.y, self.size = x, y, size
        self.image = Image.new("RGB", size, WHITE)
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.left, self.right, self.top, self.bottom = LEFT, size[0] - RIGHT, TOP, size[1] - BOTTOM
        self.draw.text((0, 0), shortened(title, size[0], 16), INK, font(16))
        self.draw.text((0, 27), y.label, GREY, font(12))
        middle = (self.left + self.right) / 2
        self.draw.text((middle, size[1]), x.label, GREY, font(12), anchor="md")
        for value in y.ticks(4):
            row = self.row(value)
            self.draw.line((self.left, row, self.right, row), FAINT)
            self.draw.text((self.left - 6, row), number(value), GREY, font(12), anchor="rm")
        names = x_names or {value: number(value) for value in x.ticks(max(2, (self.right - self.left) // 70))}
        for value, name in names.items():
            self.draw.text((self.column(value), self.bottom + 6), name, GREY, font(12), anchor="mt")
        self.draw.line((self.left, self.bottom, self.right, self.bottom), GREY)

    def column(self, value: Any) -> Any:
        """The pixel columns of `value`(s) on the x axis."""
        return np.rint(self.left + self.x.share(value) * (self.right - self.left))

    def row(self, value: Any) -> Any:
        """The pixel rows of `value`(s) on the y axis."""
        return np.rint(self.bottom - self.y.share(value) * (self.bottom - self.top))

    def box(self, left: float, right: float, low: float, high: float, color: tuple[int, ...], gap: int = 0) -> None:
        """A filled rectangle, given in the axes' values, `gap` pixels narrower; nothing for one without height."""
        x0, x1, y0, y1 = self.column(left), self.column(right), self.row(high), self.row(low) - 1
        if y1 >= y0 and high > low:
            self.draw.rectangle((x0, y0, max(x0, x1 - 1 - gap), y1), color)

    def outline(self, edges: Values, heights: Values, color: Color) -> None:
        """A line along the tops of boxes, `edges` (n + 1,) and `heights` (n,)."""
        columns, rows = np.repeat(self.column(edges), 2)[1:-1], np.repeat(self.row(heights), 2)
        self.draw.line([*zip(columns.tolist(), rows.tolist(), strict=True)], color, 2)

    def level(self, value: float, text: str) -> None:
        """A dashed line at a value of the y axis, with what it is."""
        row = self.row(value)
        for column in range(self.left, self.right, 8):
            self.draw.line((column, row, min(column + 4, self.right), row), INK)
        self.draw.text((self.right - 2, row - 3), text, INK, font(12), anchor="rs")

    def legend(self, entries: Mapping[str, Color]) -> None:
        """Coloured squares with names, right-aligned above the plotted area."""
        column = float(self.right)
        for name, color in reversed(list(entries.items())):
            column -= font(12).getlength(name)
            self.draw.text((column, 27), name, GREY, font(12))
            self.draw.rectangle((column - 15, 28, column - 6, 37), color)
            column -= 27


def curves(
    title: str,
    series: Mapping[str, Values],
    size: tuple[int, int],
    *,
    labels: tuple[str, str],
    low: float,
    level: tuple[float, str] | None = None,
) -> Panel:
    """Values in their order, `(n,)` each, on a logarithmic y axis from `low` > 0: an area for one series, lines for
    several. `labels` are those of x and y, `level` is a value to mark with a dashed line."""
    length = max(len(values) for values in series.values())
    high = max([2 * low, *(level or ())[:1], *(float(values.max()) for values in series.values())])
    panel = Panel(title, size, Axis(0, length, labels[0], whole=True), Axis(low, high * 1.2, labels[1], log=True))
    for (_, values), color in zip(series.items(), COLORS * -(-len(series) // len(COLORS)), strict=False):
        columns = min(len(values), panel.right - panel.left)
        at = np.arange(columns) * len(values) // columns
        edges, heights = np.append(at, len(values)).astype(float), values[at]
        if len(series) == 1:
            for left, right, height in zip(edges, edges[1:], heights, strict=False):
                panel.box(left, right, low, height, color)
        else:
            panel.outline(edges, heights, color)
    if 1 < len(series) <= 4:
        panel.legend(dict(zip(series, COLORS, strict=False)))
    if level:
        panel.level(*level)
    return panel


def histogram(title: str, series: Mapping[str, Values], size: tuple[int, int], *, label: str) -> Panel:
    """How the values of each series are spread, in percent of it. The x axis is logarmithic where the values, all
    >= 0, differ by orders of magnitude."""
    kept = {name: values[np.isfinite(values)] for name, values in series.items()}
    every = np.concatenate([*kept.values(), np.zeros(0)])
    every = every if len(every) else np.zeros(1)
    low, high, log = float(every.min()), float(every.max()), spans_magnitudes(every)
    bins = int(np.clip(2 * min([len(values) for values in kept.values()] or [0]) ** 0.5, 10, 50))
    if log:
        low = max(float(every[every > 0].min()), high * 1e-6)
        edges = np.geomspace(low, high, bins + 1)
    else:
        low = 0.0 if 0 < low < high / 2 else low
        low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
        edges = np.linspace(low, high, bins + 1)
    shares = {
        name: 100 * np.histogram(np.clip(values, low, high), edges)[0] / max(1, len(values))
        for name, values in kept.items()
    }
    top = max(1.0, *(float(share.max()) for share in shares.values()))
    panel = Panel(title, size, Axis(float(edges[0]), float(edges[-1]), label, log=log), Axis(0, top * 1.05, "%"))
    for (_, share), color in zip(shares.items(), COLORS, strict=False):
        for left, right, height in zip(edges, edges[1:], share, strict=False):
            panel.box(left, right, 0, height, (*color, 150))
        panel.outline(edges, share, color)
    if len(series) > 1:
        panel.legend(dict(zip(series, COLORS, strict=False)))
    return panel


def spans_magnitudes(values: Values) -> bool:
    """Whether values >= 0 are so far apart that equal bins would hold nearly all of them in one."""
    positive = values[values > 0]
    return len(positive) > 0 and values.min() >= 0 and bool(positive.max() > 30 * np.median(positive))


def bars(
    title: str,
    values: Mapping[str, float],
    size: tuple[int, int],
    *,
    labels: tuple[str, str],
    marked: Mapping[str, float] | None = None,
    texts: Mapping[str, str] | None = None,
    top: float | None = None,
) -> Panel:
    """One bar for each name, with `texts` (default: its value) above it; of each bar `marked` is drawn in red."""
    high = top or max([1.0, *values.values()])
    every = -(-len(values) * 34 // (size[0] - LEFT - RIGHT))  # a name takes up to 34 pixels
    names = {n + 0.5: name for n, name in enumerate(values) if n % every == 0}
    panel = Panel(title, size, Axis(0, len(values), labels[0]), Axis(0, high * 1.1, labels[1], whole=True), names)
    half = min(0.38, 30 * len(values) / (panel.right - panel.left))  # at most 60 pixels wide
    for n, (name, value) in enumerate(values.items()):
        red = (marked or {}).get(name, 0.0)
        panel.box(n + 0.5 - half, n + 0.5 + half, 0, red, RED)
        panel.box(n + 0.5 - half, n + 0.5 + half, red, value, BLUE)
        text = number(value) if texts is None else texts[name]
        if value and every == 1:
            panel.draw.text((panel.column(n + 0.5), panel.row(value) - 3), text, INK, font(12), anchor="ms")
    return panel


def mosaic(
    title: str,
    images: Sequence[Picture],
    captions: Sequence[str],
    columns: int,
    width: int,
    *,
    colors: Sequence[Color] | None = None,
    subtitle: str = "",
) -> Picture:
    """Small pictures in rows of `columns`, each over its caption, spread over `width` pixels."""
    cell, rows = width / columns, -(-len(images) // columns)
    tallest = max((image.height for image in images), default=0)
    top, step = 30 + 20 * bool(subtitle), tallest + 22
    board = Image.new("RGB", (width, top + rows * step), WHITE)
    draw = ImageDraw.Draw(board)
    draw.text((0, 0), shortened(title, width, 16), INK, font(16))
    draw.text((0, 24), shortened(subtitle, width, 12), GREY, font(12))
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, row = 1 + round(n % columns * cell), top + n // columns * step
        board.paste(image, (left, row))
        draw.rectangle((left - 1, row - 1, left + image.width, row + image.height), outline=FAINT)
        middle = left + image.width / 2
        draw.text((middle, row + image.height + 4), caption, colors[n] if colors else GREY, font(12), anchor="mt")
    return board


def page(title: str, lines: Sequence[str], rows: Sequence[Sequence[Picture]]) -> NDArray[np.uint8]:
    """A title, lines of text, and rows of panels, as one uint8 (H, W, 3) array."""
    widths = [sum(panel.width for panel in row) + GAP * (len(row) - 1) for row in rows]
    width = max([480, *widths])
    header = 34 + 20 * len(lines)
    height = header + sum(max(panel.height for panel in row) + GAP for row in rows)
    board = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), WHITE)
    draw = ImageDraw.Draw(board)
    draw.text((MARGIN, MARGIN - 6), shortened(title, width, 22), INK, font(22))
    for n, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 28 + 20 * n), shortened(line, width, 14), GREY, font(14))
    top = MARGIN + header
    for row in rows:
        left = MARGIN
        for panel in row:
            board.paste(panel, (left, top))
            left += panel.width + GAP
        top += max(panel.height for panel in row) + GAP
    return np.asarray(board)
