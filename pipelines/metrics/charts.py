"""Charts drawn with matplotlib, and pages that combine a row of charts with pictures.

matplotlib is imported on first use because that takes a second. pyplot is not used: all threads share its current
figure.
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
"""A function that draws on the given axes."""

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
    """Return a picture of this size in pixels, filled by `draw`. A user's matplotlibrc has no effect."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure((width / 100, height / 100), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_usage(axes: Axes, uses: Values, names: Sequence[str], label: str) -> None:
    """Draw how often codes are used, `uses` `(parts, V)`, sorted within each part: an area for one part, else lines."""
    if len(uses) == 1:
        axes.stairs(-np.sort(-uses[0]), fill=True, color=BLUE)
    else:
        for n, (counts, name) in enumerate(zip(uses, names, strict=True)):
            axes.stairs(-np.sort(-counts), baseline=None, color=f"C{n % 10}", label=name)
    axes.set_yscale("symlog", linthresh=1)  # linear below 1, so that 0 can be shown
    axes.set(title="Use of the codes", xlabel="codes, most used first", ylabel=label, xlim=(0, uses.shape[1]), ylim=0)
    if 1 < len(uses) <= 6:
        axes.legend()


def draw_histogram(axes: Axes, values: Values, title: str, label: str) -> None:
    """Draw a histogram of `values` in percent."""
    counts, edges = np.histogram(values, 40)
    axes.stairs(100 * counts / len(values), edges, fill=True, color=BLUE)
    axes.set(title=title, xlabel=label, ylabel="%")


def add_heading(lines: Sequence[str], size: int, picture: Pixels) -> Pixels:
    """Return the picture with lines of text above it, the first in font size `size`."""
    texts = [(line, ImageFont.load_default(size if n == 0 else 14)) for n, line in enumerate(lines)]
    width = max(picture.shape[1], *(math.ceil(font.getlength(line)) for line, font in texts))
    top = size + 12 + 20 * (len(lines) - 1)
    canvas = Image.new("RGB", (width, top + len(picture)), "white")
    for n, (line, font) in enumerate(texts):
        ImageDraw.Draw(canvas).text((0, 0 if n == 0 else size + 20 * n - 10), line, INK, font)
    canvas.paste(Image.fromarray(picture), (0, top))
    return np.array(canvas)


def page(lines: Sequence[str], charts: Sequence[Chart], pictures: Mapping[str, Pixels]) -> Pixels:
    """Return a page: lines of text (the first is the title), a row of charts, and pictures with their names above."""

    def draw(figure: Figure) -> None:
        for chart, axes in zip(charts, figure.subplots(1, len(charts), squeeze=False)[0], strict=True):
            chart(axes)

    parts = [add_heading(lines, 22, render(WIDTH * len(charts), HEIGHT, draw))]
    parts += [add_heading([name], 16, picture) for name, picture in pictures.items()]
    width = max(part.shape[1] for part in parts)
    rows = [np.pad(part, ((0, MARGIN), (0, width - part.shape[1]), (0, 0)), constant_values=255) for part in parts]
    return np.pad(np.concatenate(rows), ((MARGIN, 0), (MARGIN, MARGIN), (0, 0)), constant_values=255)
