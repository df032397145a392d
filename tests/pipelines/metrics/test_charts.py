"""Charts and pages: the data drawn, and independence of the user's matplotlib settings."""

import warnings

import numpy as np
import pytest

from pipelines.metrics import charts
from pipelines.metrics.charts import draw_histogram, draw_usage, page


def rendered(chart, *given):
    """Draw a chart; return its picture and its axes."""
    found = []

    def draw(figure):
        found.append(figure.subplots())
        chart(found[0], *given)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = charts.render(400, 300, draw)
    assert picture.shape == (300, 400, 3) and picture.dtype == np.uint8
    return picture, found[0]


@pytest.mark.parametrize("uses", [[[5.0, 0, 1e6]], [[1.0, 2], [0, 7]], np.zeros((9, 2))])
def test_codes_are_sorted_by_use(uses):
    _, axes = rendered(draw_usage, np.array(uses), [f"level {n}" for n in range(len(uses))], "uses")
    assert [sorted(row, reverse=True) for row in uses] == [p.get_data().values.tolist() for p in axes.patches]
    assert (axes.get_legend() is not None) == (1 < len(uses) <= 6)


@pytest.mark.parametrize("values", [[0.0], [0.0, 1e-30, 1e30], [-3.0, 2.0]])
def test_histograms_are_in_percent(values):
    _, axes = rendered(draw_histogram, np.array(values), "", "")
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


def test_matplotlib_settings_of_the_user_have_no_effect():
    import matplotlib

    expected, _ = rendered(draw_histogram, np.arange(9.0), "a title", "x")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "figure.dpi": 300, "text.usetex": True}):
        assert np.array_equal(rendered(draw_histogram, np.arange(9.0), "a title", "x")[0], expected)
        assert matplotlib.rcParams["font.size"] == 30
