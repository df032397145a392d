"""Charts, drawn with matplotlib: white, with a title above each and its unit beside the legend.

matplotlib is imported when something is drawn, as it takes a second. There is no pyplot, whose current figure would be
one for all threads. A figure has 72 dots per inch, so a point is a pixel everywhere. The text is in DejaVu Sans, which
matplotlib brings along.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]
"""A picture, (H, W, 3)."""
Values = NDArray[np.float64]
Chart = Callable[["Axes"], None]
"""Draws on the axes it is given."""

INK, GREY, FAINT = "#22262b", "#626870", "#e4e7eb"
BLUE, ORANGE, RED, GREEN = "#5c80ae", "#de8e50", "#c45454", "#6a9e78"
COLORS = (BLUE, ORANGE, GREEN, "#8e76ac", "#968068", "#ce88aa", GREY, INK)
STYLE = {
    "figure.dpi": 72,
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "axes.labelcolor": GREY,
    "axes.labelpad": 8,
    "axes.edgecolor": GREY,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "legend.labelcolor": GREY,
    "legend.frameon": False,
}
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 52, 46  # pixels between the edges of a chart and its axes
GAP = 20  # pixels between charts
STEPS = 2000  # of a curve at most: more than there are pixels


def render(size: tuple[int, int], draw: Callable[[Figure], None]) -> Pixels:
    """A picture of `size` (width, height) pixels. `draw` puts things on its figure; what the user set for other
    figures (matplotlibrc) does not matter."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for a letter that the font does not have
        figure = Figure((size[0] / 72, size[1] / 72))
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write(figure: Figure, place: tuple[float, float], text: str, width: float, **style: Any) -> None:
    """One line of text from `place`, pixels from the left and the top, cut where it would be wider than `width`."""
    x, y = place
    line = figure.text(x, figure.bbox.height - y, text, transform=None, va="top", **style)
    while text and (wide := line.get_window_extent().width) > width:
        text = text[: int(len(text) * width / wide) - 3]
        line.set_text(f"{text}...")


def charts_in_row(charts: Sequence[Chart], width: int, height: int) -> Pixels:
    """Charts of equal size side by side in one picture of this size, in pixels."""
    each = (width - GAP * (len(charts) - 1)) // len(charts)

    def draw(figure: Figure) -> None:
        for n, chart in enumerate(charts):
            left = n * (each + GAP) + LEFT
            inner = (each - LEFT - RIGHT, height - TOP - BOTTOM)
            chart(figure.add_axes((left / width, BOTTOM / height, inner[0] / width, inner[1] / height)))

    return render((width, height), draw)


# Axes ---------------------------------------------------------------------------------------------


def head(axes: Axes, title: str, unit: str) -> None:
    """A title above a chart, and the unit of its y axis."""
    axes.annotate(title, (0, 1), (-LEFT, TOP - 14), xycoords="axes fraction", textcoords="offset points", size=16)
    axes.annotate(unit, (0, 1), (-LEFT, 8), xycoords="axes fraction", textcoords="offset points", color=GREY)


def legend(axes: Axes, colors: Mapping[str, str]) -> None:
    """Coloured squares with names, beside the unit."""
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=color, label=name) for name, color in colors.items()],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.4,
        borderpad=0,
        handlelength=0.8,
        handleheight=0.8,
        handletextpad=0.5,
        columnspacing=1.2,
        ncols=len(colors),
    )


def few_ticks(axis: Axis, count: int, *, whole: bool = False) -> None:
    """About `count` ticks at round numbers, of three digits; on a logarithmic axis at powers of ten, if there are two.
    whole: at whole numbers only."""
    from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    locator: Locator = MaxNLocator(count, integer=whole, steps=[1, 2, 2.5, 5, 10])
    if axis.get_scale() == "log" and np.floor(np.log10(high)) > np.ceil(np.log10(low)):
        locator = LogLocator(numticks=count + 2)
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: three_digits(value)))


def three_digits(value: float) -> str:
    """A number in short: 0.25, 14, 1.5k, 20M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


# Charts -------------------------------------------------------------------------------------------


def curves(
    axes: Axes,
    title: str,
    series: Mapping[str, Values],
    *,
    labels: tuple[str, str],
    low: float,
    level: tuple[float, str] | None = None,
) -> None:
    """Values in their order, `(n,)` each, on a logarithmic y axis from `low` > 0: an area for one series, lines for
    several. `labels` are those of x and y, `level` is a value to mark with a dashed line."""
    length = max(len(values) for values in series.values())
    high = max([2 * low, *(level or ())[:1], *(float(values.max()) for values in series.values())])
    head(axes, title, labels[1])
    axes.set(xlim=(0, length), ylim=(low, high * 1.2), yscale="log", xlabel=labels[0])
    few_ticks(axes.xaxis, 5, whole=True)
    few_ticks(axes.yaxis, 4)
    colors = {name: COLORS[n % len(COLORS)] for n, name in enumerate(series)}
    for name, values in series.items():
        count = min(len(values), STEPS)
        chosen = np.arange(count) * len(values) // count
        heights = np.maximum(values[chosen], low)
        edges = [*chosen, len(values)]
        if len(series) == 1:
            axes.stairs(heights, edges, baseline=low, fill=True, color=colors[name])
        else:
            axes.stairs(heights, edges, baseline=None, color=colors[name], linewidth=1.5)
    if 1 < len(series) <= 4:
        legend(axes, colors)
    if level:
        axes.axhline(level[0], color=INK, linewidth=1, linestyle=(0, (4, 4)))
        axes.text(1, level[0], f"{level[1]} ", transform=axes.get_yaxis_transform(), ha="right", va="bottom")


def histogram(axes: Axes, title: str, series: Mapping[str, Values], *, label: str) -> None:
    """How the values of each series are spread, in percent of it; what is not finite is left out. The x axis is
    logarithmic where the values, all >= 0, differ by orders of magnitude."""
    kept = {name: values[np.isfinite(values)] for name, values in series.items()}
    edges, log = bins_of(kept)
    shares = {
        name: 100 * np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(1, len(values))
        for name, values in kept.items()
    }
    top = max(1.0, *(float(share.max()) for share in shares.values()))
    head(axes, title, "%")
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, top * 1.05), xscale="log" if log else "linear", xlabel=label)
    few_ticks(axes.xaxis, 5)
    few_ticks(axes.yaxis, 4)
    colors = dict(zip(series, COLORS, strict=False))
    for name, share in shares.items():
        axes.stairs(share, edges, fill=True, color=colors[name], alpha=0.6)
        axes.stairs(share, edges, color=colors[name], linewidth=1.5)
    if len(series) > 1:
        legend(axes, colors)


def bins_of(series: Mapping[str, Values]) -> tuple[Values, bool]:
    """Edges of the bins for all series, ascending, and whether they are apart by a factor."""
    every = np.concatenate([*series.values(), np.zeros(0)])
    every = every if len(every) else np.zeros(1)
    low, high = float(every.min()), float(every.max())
    count = int(np.clip(2 * min([len(values) for values in series.values()] or [0]) ** 0.5, 10, 50))
    if spans_magnitudes(every):
        low = max(float(every[every > 0].min()), high * 1e-6)
        return np.geomspace(low, high, count + 1), True
    low = 0.0 if 0 < low < high / 2 else low
    low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
    return np.linspace(low, high, count + 1), False


def spans_magnitudes(values: Values) -> bool:
    """Whether values >= 0 are so far apart that equal bins would hold nearly all of them in one."""
    positive = values[values > 0]
    return len(positive) > 0 and values.min() >= 0 and bool(positive.max() > 30 * np.median(positive))


def bars(
    axes: Axes,
    title: str,
    values: Mapping[str, float],
    *,
    labels: tuple[str, str],
    marked: Mapping[str, float] | None = None,
    texts: Mapping[str, str] | None = None,
    top: float | None = None,
) -> None:
    """One bar for each name, with `texts` (default: its value) above it; of each bar `marked` is drawn in red."""
    high = top or max([1.0, *values.values()])
    width = axes.get_window_extent().width
    every = int(-(-len(values) * 34 // width))  # a name takes up to 34 pixels
    names, places = list(values), np.arange(len(values))
    head(axes, title, labels[1])
    axes.set(xlim=(-0.5, len(values) - 0.5), ylim=(0, high * 1.1), xlabel=labels[0])
    axes.set_xticks(places[::every], names[::every])
    few_ticks(axes.yaxis, 4, whole=True)
    thick = min(0.76, 60 * len(values) / width)  # at most 60 pixels
    columns = axes.bar(places, [*values.values()], thick, color=BLUE)
    if marked:
        axes.bar(places, [marked.get(name, 0.0) for name in names], thick, color=RED)
    if every == 1:
        above = [(texts[name] if texts else three_digits(value)) if value else "" for name, value in values.items()]
        axes.bar_label(columns, above, padding=2)


def lines(
    axes: Axes,
    *,
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    ceiling: float | None = None,
    ringed: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Points `(x, y)` of each series, ascending in x, joined by a line; `ringed` ones have a ring and a name. `labels`
    are those of x and y; lines are cut off above `ceiling` times the lowest point."""
    heights = np.array([y for points in series.values() for _, y in points])
    low, high = float(heights.min()), float(heights.max())
    high = min(high, ceiling * low) if ceiling else high
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    colors = {name: COLORS[n % len(COLORS)] for n, name in enumerate(series)}
    head(axes, title, labels[1])
    axes.set(ylim=(low - room, high + 2 * room), xlabel=labels[0])
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), color=colors[name], linewidth=1.8, marker="o", markersize=4.5)
    for name, place in (ringed or {}).items():
        axes.plot(*place, marker="o", markersize=13, color=INK, fillstyle="none", linestyle="none")
        axes.annotate(name, place, (0, 12), textcoords="offset points", ha="center")
    few_ticks(axes.xaxis, 5)
    few_ticks(axes.yaxis, 4)
    if len(series) > 1:
        legend(axes, colors)
