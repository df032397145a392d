"""Charts as pictures: what is drawn where, whatever the values, and what a user's own settings do not change.

Covers: pipelines/metrics/pages.py.
"""

import importlib
import math
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from prepared import run_file

from pipelines.images.pictures import save_picture
from pipelines.metrics import charts, pages
from pipelines.metrics.charts import bars, bins_of, charts_in_row, curves, histogram, three_digits
from pipelines.metrics.codebook import draw_usage
from pipelines.metrics.pages import mosaic, page

SIZE = (400, 270)
INNER = (slice(charts.TOP, SIZE[1] - charts.BOTTOM), slice(charts.LEFT, SIZE[0] - charts.RIGHT))


def picture_of(chart, *given, **more):
    """A chart alone, and the part of it that lies between its axes."""
    picture = charts_in_row([lambda axes: chart(axes, *given, **more)], *SIZE)
    assert picture.shape == (SIZE[1], SIZE[0], 3) and picture.dtype == np.uint8
    return picture, picture[INNER]


def near(pixels, color, share=1.0):
    """Where the pixels have this colour, of which a `share` is laid over white."""
    rgb = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])
    return (np.abs(pixels - (255 + (rgb - 255) * share)) <= 2).all(2)


def test_dead_codes_are_a_red_field_as_wide_as_they_are_many():
    uses = np.arange(1, 101, dtype=float)[None]
    uses[0, :30] = 0
    _, inner = picture_of(draw_usage, uses, 30, names=[""], low=0.5, unit="", word="dead")
    field = near(inner, charts.RED, 0.19)[3]
    assert field.mean() == pytest.approx(0.3, abs=0.02)
    assert field[-3] and not field[: int(0.68 * len(field))].any()
    _, clean = picture_of(draw_usage, uses + 1, 0, names=[""], low=0.5, unit="", word="dead")
    assert not near(clean, charts.RED, 0.19).any()


@pytest.mark.parametrize("repeats", [1, 5000])
def test_areas_on_a_logarithmic_axis(repeats):
    values = np.repeat([1000.0, 100.0, 10.0, 0.0], repeats)
    _, inner = picture_of(curves, "", {"": values}, labels=("", ""), low=1.0)
    blue = near(inner, charts.BLUE).sum(0)
    heights = [int(blue[int((n + 0.5) / 4 * len(blue))]) for n in range(4)]
    assert heights[3] == 0 and heights[0] > heights[1] > heights[2] > 0
    assert heights[0] / heights[2] == pytest.approx(3, rel=0.05)
    assert heights[1] / heights[2] == pytest.approx(2, rel=0.05)


def test_a_level_is_a_dashed_line():
    _, inner = picture_of(curves, "", {"": np.full(9, 1.0)}, labels=("", ""), low=1.0, level=(10.0, ""))
    dark = (inner.max(2) < 100).sum(1)
    assert (dark > 0.3 * inner.shape[1]).sum() == 1 and dark.max() < 0.7 * inner.shape[1]


def test_bars_show_how_many_are_dead():
    _, inner = picture_of(bars, "", {"0": 80.0, "1": 40.0}, labels=("", ""), marked={"1": 10.0})
    quarter = inner.shape[1] // 4
    first, second = inner[:, [quarter]], inner[:, [3 * quarter]]
    red, blue = (int(near(second, color).sum()) for color in (charts.RED, charts.BLUE))
    assert red / (red + blue) == pytest.approx(0.25, abs=0.03)
    assert not near(first, charts.RED).any()
    assert int(near(first, charts.BLUE).sum()) == pytest.approx(2 * (red + blue), abs=3)


@pytest.mark.parametrize(
    "values",
    [[], [0.0], [math.nan, math.inf, 1.0], [0.0, 1e-30, 1e30], [5.0] * 9, [-3.0, 2.0], [1e-9, 1e-9], [1e4] * 3 + [1.0]],
)
def test_histograms_of_whatever_comes(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture, _ = picture_of(histogram, "", {"a": np.array(values), "b": np.array(values[:1])}, label="")
    assert picture.min() < 120


def test_a_histogram_shows_the_shares():
    _, inner = picture_of(histogram, "", {"": np.repeat([0.0, 10.0], [75, 25])}, label="")
    blue = near(inner, charts.BLUE, 0.6).sum(0)
    assert blue[10] / blue[-10] == pytest.approx(3, rel=0.08) and blue[len(blue) // 2] <= 2


def test_bins_of_what_lies_orders_of_magnitude_apart_grow_by_a_factor():
    edges, log = bins_of({"": np.append(np.full(200, 1.0), 1000.0)})
    assert log and np.allclose(edges[1:] / edges[:-1], edges[1] / edges[0])
    edges, log = bins_of({"": np.linspace(1, 20, 50)})
    assert not log and edges[0] == 0 and edges[-1] == 20 and np.allclose(np.diff(edges), edges[1])


@pytest.mark.parametrize(
    ("low", "high", "scale", "whole"),
    [
        (0, 1, "linear", False),
        (0, 127, "linear", True),
        (0, 3, "linear", True),
        (-2, 7.3, "linear", False),
        (1e-3, 9, "linear", False),
        (11.5, 18.9, "linear", False),
        (1e-3, 1e6, "log", False),
        (0.5, 40000, "log", False),
        (2, 7, "log", False),
    ],
)
def test_ticks_are_few_round_and_have_short_names(low, high, scale, whole):
    found = []

    def chart(axes):
        axes.set(ylim=(low, high), yscale=scale)
        charts.few_ticks(axes.yaxis, 4, whole=whole)
        places = [place for place in axes.yaxis.get_majorticklocs() if low <= place <= high]
        found.extend(zip(places, axes.yaxis.get_major_formatter().format_ticks(places), strict=True))
        assert not len(axes.yaxis.get_minorticklocs())

    charts_in_row([chart], *SIZE)
    assert 2 <= len(found) <= 8 and all(len(name) <= 6 for _, name in found)
    assert not whole or all(place == int(place) for place, _ in found)


def test_numbers_are_short():
    values = [0, 0.25, 1, 14, 999, 999.7, 1500, 65536, 2e6, 3.2e9]
    assert [three_digits(v) for v in values] == ["0", "0.25", "1", "14", "999", "1k", "1.5k", "65.5k", "2M", "3.2G"]


def test_a_mosaic_holds_its_pictures_pixel_by_pixel():
    chance = np.random.default_rng(0)
    tiles = [chance.integers(0, 256, (9, 7, 3), dtype=np.uint8) for _ in range(5)]
    board = mosaic("title", tiles, list("abcde"), 3, 300)
    windows = np.lib.stride_tricks.sliding_window_view(board, (9, 7, 3))[:, :, 0]
    places = [np.argwhere((windows == tile).all((2, 3, 4))) for tile in tiles]
    assert [len(found) for found in places] == [1] * 5
    rows, columns = np.concatenate(places).T
    assert columns.tolist() == [1, 101, 201, 1, 101] and rows[0] == rows[1] == rows[2] < rows[3] == rows[4]


def test_a_page_holds_its_rows_and_cuts_what_is_too_long():
    rows = [np.full((200, 620, 3), 7, np.uint8), np.full((250, 600, 3), 9, np.uint8)]
    found = page("title " * 99, ["line " * 200, "$x", "\N{GRINNING FACE}"], rows)
    assert found.shape[1] == 620 + 2 * pages.MARGIN
    assert (found == 7).all(2).sum() == 200 * 620 and (found == 9).all(2).sum() == 250 * 600
    edges = (found[:, : pages.MARGIN], found[:, -pages.MARGIN :], found[: pages.MARGIN - 2], found[-pages.MARGIN :])
    assert all((edge == 255).all() for edge in edges)


def test_what_the_user_set_for_other_figures_does_not_matter():
    import matplotlib

    expected, _ = picture_of(bars, "a title", {"0": 80.0}, labels=("x", "y"))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "figure.dpi": 300, "text.usetex": True}):
        found, _ = picture_of(bars, "a title", {"0": 80.0}, labels=("x", "y"))
        assert matplotlib.rcParams["font.size"] == 30
    assert np.array_equal(found, expected)


def test_a_saved_page_has_the_pixels_that_were_drawn(tmp_path):
    picture = page("title", [], [charts_in_row([lambda axes: bars(axes, "t", {"a": 1.0}, labels=("", ""))], *SIZE)])
    save_picture(picture, tmp_path / "page.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "page.png")), picture)


def test_matplotlib_is_imported_when_something_is_drawn():
    assert run_file(__file__).split() == ["False", "True", "False"]


if __name__ == "__main__":
    for module in ("train_tokenizer", "commands.inspect_", "commands.probe"):
        importlib.import_module(f"pipelines.{module}")
    print("matplotlib" in sys.modules)
    page("title", [], [])
    print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
