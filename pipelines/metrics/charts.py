"""Charts, drawn with matplotlib, and pages that have a row of them above pictures.

matplotlib is imported when something is drawn, as this takes a second. pyplot is not used: its current figure would be
one for all threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]
"""A picture, (H, W, 3)."""
Values = NDArray[np.float64]
Chart = Callable[["Axes"], None]
"""Draws on the axes it is given."""

BLUE, GREY, INK = "#5c80ae", "#a0a6ad", "#22262b"
STYLE = {
    "figure.dpi": 100,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
}
WIDTH, HEIGHT = 400, 300  # pixels of a chart in a row
MARGIN = 24  # pixels around a page


def render(width: int, height: int, draw: Callable[[Figure], None]) -> Pixels:
    """A picture of this size in pixels, which `draw` fills; the settings in a user's matplotlibrc do not count."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure((width / 100, height / 100), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def charts_in_row(charts: Sequence[Chart]) -> Pixels:
    """Charts side by side."""

    def draw(figure: Figure) -> None:
        for chart, axes in zip(charts, figure.subplots(1, len(charts), squeeze=False)[0], strict=True):
            chart(axes)

    return render(WIDTH * len(charts), HEIGHT, draw)


def draw_usage(axes: Axes, uses: Values, names: Sequence[str], label: str) -> None:
    """How often codes are used, `(parts, V)`, each part sorted: an area for one part, lines for several."""
    if len(uses) == 1:
        axes.stairs(-np.sort(-uses[0]), fill=True, color=BLUE)
    else:
        for n, (counts, name) in enumerate(zip(uses, names, strict=True)):
            axes.stairs(-np.sort(-counts), baseline=None, color=f"C{n % 10}", label=name)
    axes.set_yscale("symlog", linthresh=1)  # linear below 1, which has a place for 0
    axes.set(title="Use of the codes", xlabel="codes, most used first", ylabel=label, xlim=(0, uses.shape[1]), ylim=0)
    if 1 < len(uses) <= 6:
        axes.legend()


def draw_histogram(axes: Axes, values: Values, title: str, label: str) -> None:
    """How values are spread, in percent."""
    counts, edges = np.histogram(values, 40)
    axes.stairs(100 * counts / len(values), edges, fill=True, color=BLUE)
    axes.set(title=title, xlabel=label, ylabel="%")


def headed(lines: Sequence[str], size: int, picture: Pixels) -> Pixels:
    """A picture below lines of text, the first of this size."""
    texts = [(line, ImageFont.load_default(size if n == 0 else 14)) for n, line in enumerate(lines)]
    width = max(picture.shape[1], *(math.ceil(font.getlength(line)) for line, font in texts))
    top = size + 12 + 20 * (len(lines) - 1)
    canvas = Image.new("RGB", (width, top + len(picture)), "white")
    for n, (line, font) in enumerate(texts):
        ImageDraw.Draw(canvas).text((0, 0 if n == 0 else size + 20 * n - 10), line, INK, font)
    canvas.paste(Image.fromarray(picture), (0, top))
    return np.array(canvas)


def page(lines: Sequence[str], charts: Sequence[Chart], pictures: Mapping[str, Pixels]) -> Pixels:
    """Lines of text, the first a title; charts in a row; and pictures, each below its name."""
    parts = [headed(lines, 22, charts_in_row(charts))]
    parts += [headed([name], 16, picture) for name, picture in pictures.items()]
    width = max(part.shape[1] for part in parts)
    rows = [np.pad(part, ((0, MARGIN), (0, width - part.shape[1]), (0, 0)), constant_values=255) for part in parts]
    return np.pad(np.concatenate(rows), ((MARGIN, 0), (MARGIN, MARGIN), (0, 0)), constant_values=255)
