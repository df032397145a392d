"""Grids of images: where each image stands, and what is written over it."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.images import grids
from pipelines.images.grids import BAND, PADDING, class_grid, plain, written


def coloured(count, side=28, channels=1):
    """Images of one colour each, which says which they are."""
    return np.stack([np.full((side, side, channels), 10 + 3 * k, np.uint8) for k in range(count)])


def places(grid, count):
    """The place (y, x) of each image: letters have greys, too, but no block of them."""
    found = []
    for k in range(count):
        same = (grid == 10 + 3 * k).all(-1)
        at = np.argwhere(same)
        found.append(next((int(y), int(x)) for y, x in at if same[y : y + 28, x : x + 28].sum() == 28 * 28))
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_each_class_has_a_column_and_its_name_is_on_top(channels, monkeypatch):
    texts = []
    monkeypatch.setattr(grids, "written", lambda name, width: texts.append(name) or written(name, width))
    grid = class_grid(coloured(7, channels=channels), ["cat", "dog", "eel", "dog", "dog", "cat", "cat"])
    at = places(grid, 7)
    assert grid.dtype == np.uint8 and grid.shape[2] == 3 and texts == ["cat", "dog", "eel"]
    columns = {x: [k for k, place in enumerate(at) if place[1] == x] for x in sorted({x for _, x in at})}
    assert list(columns.values()) == [[0, 5, 6], [1, 3, 4], [2]]
    assert all(list(map(at.__getitem__, ks)) == sorted(at[k] for k in ks) for ks in columns.values())
    assert min(y for y, _ in at) == BAND + PADDING
    for name, x in zip(["cat", "dog", "eel"], columns, strict=True):
        assert np.array_equal(grid[:BAND, x : x + 56], written(name, 56))


def test_each_image_has_its_name_where_no_column_is_of_one_class():
    names = ["cat", "dog", "eel", "dog"]
    grid = class_grid(coloured(4), names, 3)
    at = places(grid, 4)
    assert [y for y, _ in at] == [at[0][0]] * 3 + [at[3][0]] and at[3][1] == at[0][1]
    for name, (y, x) in zip(names, at, strict=True):
        assert np.array_equal(grid[y - BAND : y, x : x + 56], written(name, 56))


def test_a_number_of_columns_that_classes_fill_has_heads():
    names = [*"abab"]
    assert np.array_equal(class_grid(coloured(4), names, 2), class_grid(coloured(4), names))
    many = [str(k) for k in range(21)]
    at = places(class_grid(coloured(21), many), 21)
    assert len({x for _, x in at}) == 16 and [y for y, _ in at[:16]] == [at[0][0]] * 16
    assert len({x for _, x in places(class_grid(coloured(20), many[:20]), 20)}) == 20


@pytest.mark.parametrize("names", [None, ["a", "b", "a", "b"], ["a"] * 4])
def test_nothing_is_written_unless_it_is_to_be(names, monkeypatch):
    monkeypatch.setattr(grids, "written", lambda *_: pytest.fail("written"))
    grid = class_grid(coloured(4), names, captions=False)
    assert places(grid, 4)[0] == (PADDING, PADDING)
    assert len({x for _, x in places(grid, 4)}) == (2 if names and "b" in names else 4)


def test_small_images_grow_until_a_name_fits_and_large_ones_stay():
    for side, name, width in ((28, "cat", 56), (28, "ankle boot", 84), (28, "x" * 60, 112), (128, "x" * 60, 128)):
        grid = class_grid(coloured(2, side), [name, "b"])
        assert grid.shape[1] == PADDING + 2 * (width + PADDING), (side, name)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    grid = class_grid(pixels, ["a", "b"])
    assert np.array_equal(grid[BAND + PADDING : BAND + PADDING + 56 : 2, PADDING : PADDING + 56 : 2], pixels[0])


def test_names_are_cut_and_lose_accents():
    assert plain("Äé ñ") == "Ae n"
    band = written("a name that is much too long", 56)
    assert band.shape == (BAND, 56, 3) and not np.array_equal(band, written("a name", 56))
    assert (band == 255).any() and (band < 128).any()
    assert np.array_equal(written("", 56), np.full((BAND, 56, 3), 255, np.uint8))
    assert not np.array_equal(written("cat", 56), written("dog", 56))
