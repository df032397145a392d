"""Grids of images: where each image lies, and the names drawn above it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from pipelines.images import grids
from pipelines.images.grids import BAND, PADDING, choose_font, class_grid, draw_name, find_font

SIDE = 28
CELL = 2 * SIDE  # after enlarging


def grey_images(count, channels=1):
    """Images of one grey level each, which identifies them."""
    return np.stack([np.full((SIDE, SIDE, channels), 10 + 3 * k, np.uint8) for k in range(count)])


def positions(grid, count):
    """The position (y, x) of each of `grey_images`."""
    found = []
    for k in range(count):
        corners = np.argwhere((grid == 10 + 3 * k).all(-1))
        blocks = (grid[y : y + SIDE, x : x + SIDE] for y, x in corners)  # letters have greys, but no block of them
        found.append(next(tuple(c) for c, b in zip(corners, blocks, strict=True) if (b == 10 + 3 * k).all()))
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_each_class_has_a_column_below_its_name(channels):
    names = ["cat", "dog", "eel", "dog", "dog", "cat", "cat"]
    grid = class_grid(grey_images(7, channels), names)
    columns = {"cat": [0, 5, 6], "dog": [1, 3, 4], "eel": [2]}
    for column, (name, images) in enumerate(columns.items()):
        x = PADDING + column * (CELL + PADDING)
        assert np.array_equal(grid[:BAND, x : x + CELL], draw_name(name, CELL))
        for row, image in enumerate(images):
            assert positions(grid, 7)[image] == (BAND + PADDING + row * (CELL + PADDING), x)


def test_each_image_has_its_name_if_a_column_mixes_classes():
    names = ["cat", "dog", "eel", "dog"]
    grid = class_grid(grey_images(4), names, 3)
    places = positions(grid, 4)
    assert places[0][0] == places[2][0] < places[3][0] and places[3][1] == places[0][1]
    for name, (y, x) in zip(names, places, strict=True):
        assert np.array_equal(grid[y - BAND : y, x : x + CELL], draw_name(name, CELL))


@pytest.mark.parametrize(("names", "columns"), [(None, 4), (["a", "b", "a", "b"], 2)])
def test_no_names_without_captions(names, columns):
    places = positions(class_grid(grey_images(4), names, captions=False), 4)
    assert places[0] == (PADDING, PADDING) and len({x for _, x in places}) == columns


# Letters


@pytest.fixture
def fonts(monkeypatch):
    """A list of installed fonts for names that DejaVu Sans cannot draw; the test fills it."""
    found = []
    monkeypatch.setattr(grids, "find_font", lambda text: found[0] if found else None)
    choose_font.cache_clear()
    yield found
    choose_font.cache_clear()


def draws_missing_glyph(name):
    """Whether a letter of the name is drawn like a code point that no font has."""
    text, font = choose_font(name)
    box = bytes(font.getmask("\U000fffff"))
    return any(bytes(font.getmask(letter)) == box for letter in text)


@pytest.mark.parametrize("name", ["кошка", "Ελληνικά", "cafe\u0301"])
def test_latin_greek_and_cyrillic_names_are_drawn_with_their_letters(name, fonts):
    assert choose_font(name)[0] == unicodedata.normalize("NFC", name) and not draws_missing_glyph(name)


def test_other_scripts_are_drawn_in_an_installed_font_or_as_question_marks(fonts):
    assert choose_font("космос 宇宙")[0] == "космос ??" and not draws_missing_glyph("космос 宇宙")
    fonts.append(find_font("cat"))
    choose_font.cache_clear()
    text, font = choose_font("宇宙")
    assert text == "宇宙" and Path(font.path) == fonts[0]
    assert find_font("\U000fffff") is None  # matplotlib's font of boxes for every code point does not count
