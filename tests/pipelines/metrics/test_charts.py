"""Pages of charts and pictures, which do not depend on the user's matplotlib settings."""

import numpy as np

from pipelines.metrics import charts
from pipelines.metrics.charts import draw_histogram, draw_usage, page


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

    def draw(axes):
        draw_histogram(axes, np.arange(9.0), "a title", "x")

    def draw_uses(axes):
        draw_usage(axes, np.array([[1.0, 2], [0, 7]]), ["level 0", "level 1"], "uses")
        assert [patch.get_data().values.tolist() for patch in axes.patches] == [[2, 1], [7, 0]]  # sorted

    expected = page(["a"], [draw, draw_uses], {})
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "figure.dpi": 300, "text.usetex": True}):
        assert np.array_equal(page(["a"], [draw, draw_uses], {}), expected)
        assert matplotlib.rcParams["font.size"] == 30
