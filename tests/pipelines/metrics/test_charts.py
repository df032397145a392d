"""Charts and pages as pictures: what is drawn, pixel by pixel, and what a user's own settings do not change."""

import importlib
import sys
import warnings

import numpy as np
import pytest
from processes import run_file

from pipelines.metrics import charts
from pipelines.metrics.charts import charts_in_row, draw_histogram, draw_usage, page


def drawn(chart, *given):
    """The chart's picture, and its axes as they were drawn."""
    kept = []

    def keep(axes):
        chart(axes, *given)
        kept.append(axes)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = charts_in_row([keep])
    assert picture.shape == (charts.HEIGHT, charts.WIDTH, 3) and picture.dtype == np.uint8
    return picture, kept[0]


@pytest.mark.parametrize("uses", [[[5.0, 0, 1e6]], [[0.0, 0]], [[1.0, 2], [0, 7]], np.ones((9, 2))])
def test_codes_are_sorted_by_use(uses):
    _, axes = drawn(draw_usage, np.array(uses), [f"level {n}" for n in range(len(uses))], "uses")
    assert [sorted(row, reverse=True) for row in uses] == [p.get_data().values.tolist() for p in axes.patches]
    assert (axes.get_legend() is not None) == (1 < len(uses) <= 6)


@pytest.mark.parametrize("values", [[0.0], [0.0, 1e-30, 1e30], [5.0] * 9, [-3.0, 2.0], [1e4] * 3 + [1.0]])
def test_histograms_are_in_percent(values):
    _, axes = drawn(draw_histogram, np.array(values), "", "")
    assert sum(axes.patches[0].get_data().values) == pytest.approx(100)


def test_a_page_holds_its_pictures_pixel_by_pixel():
    chance = np.random.default_rng(0)
    tiles = [chance.integers(0, 256, size, dtype=np.uint8) for size in ((9, 7, 3), (30, 900, 3))]
    found = page(["title " * 9, "$x", "\N{GRINNING FACE}"], [lambda axes: None], dict(zip("ab", tiles, strict=True)))
    at = 0
    for tile in tiles:
        height, width = tile.shape[:2]
        rows = found[:, charts.MARGIN : charts.MARGIN + width]
        (at,) = [y for y in range(at, len(found) - height + 1) if np.array_equal(rows[y : y + height], tile)]
    edges = (found[:, : charts.MARGIN], found[:, -charts.MARGIN :], found[: charts.MARGIN], found[-charts.MARGIN :])
    assert all((edge == 255).all() for edge in edges)


def test_what_the_user_set_for_other_figures_does_not_matter():
    import matplotlib

    expected, _ = drawn(draw_histogram, np.arange(9.0), "a title", "x")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "figure.dpi": 300, "text.usetex": True}):
        assert np.array_equal(drawn(draw_histogram, np.arange(9.0), "a title", "x")[0], expected)
        assert matplotlib.rcParams["font.size"] == 30


def test_matplotlib_is_imported_when_something_is_drawn():
    assert run_file(__file__).split() == ["False", "True", "False"]


if __name__ == "__main__":
    for module in ("train_tokenizer", "commands.inspect_", "commands.probe", "commands.tune"):
        importlib.import_module(f"pipelines.{module}")
    print("matplotlib" in sys.modules)
    charts_in_row([lambda axes: None])
    print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
