"""Grids of images with class names: one column per class, headed by its name.

If a column mixes classes, each image has its name above it instead. The font is DejaVu Sans, which comes with
matplotlib (Latin, Greek, Cyrillic and more), so that a grid looks the same everywhere. A name with other letters is
rendered in an installed font that has them all, if any; otherwise each missing letter becomes `?`."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tokenizer.spec import channels_last, put_on_white, to_float

MAX_CLASSES = 20  # that get a column each
COLUMNS = 8  # of a grid without one column per class; doubled if there are several classes
PADDING, GREY, WHITE, BLACK = 2, 128, 255, 0
MIN_WIDTH = 56  # narrower images are enlarged, by repeating their pixels
MAX_NAME_WIDTH = 112  # images are enlarged up to this width to fit their names; longer names are cut
FONT_SIZE, BAND = 12, 16  # in pixels, and the height of the band behind a name
MISSING = "?"


def class_grid(
    images: np.ndarray, names: Sequence[str] | None, columns: int | None = None, *, captions: bool = True
) -> np.ndarray:
    """Return uint8 images (B, ..., H, W, C) as one picture (H, W, 3), the frames of clips below one another and RGBA
    images on white.

    names: the class of each image, if any. columns: None makes a column for each class if there are at most
    `MAX_CLASSES`, in order of first appearance, and otherwise 8 columns (16 for more classes); a number keeps the order
    of the images. captions: draw the names.
    """
    images = images.reshape(len(images), -1, *images.shape[-2:])
    cells = arrange_images(len(images), names, columns)
    names = names if captions else None
    headings = None if names is None else column_headings(cells, names)
    pixels = enlarge_images(images, names)
    height, width = pixels.shape[1:3]
    over = BAND * (names is not None and headings is None)  # above each image
    top = BAND * (headings is not None)
    shape = (top + PADDING + len(cells) * (over + height + PADDING), PADDING + len(cells[0]) * (width + PADDING), 3)
    canvas = np.full(shape, GREY, np.uint8)
    for row, line in enumerate(cells):
        y = top + PADDING + row * (over + height + PADDING) + over
        for column, number in enumerate(line):
            x = PADDING + column * (width + PADDING)
            if number is not None:
                canvas[y : y + height, x : x + width] = pixels[number]
                if over and names is not None:
                    canvas[y - over : y, x : x + width] = draw_name(names[number], width)
            if headings is not None and row == 0:
                canvas[:top, x : x + width] = draw_name(headings[column], width)
    return canvas


def arrange_images(count: int, names: Sequence[str] | None, columns: int | None) -> list[list[int | None]]:
    """Return the indices of the images in each row; None for an empty cell."""
    classes = list(dict.fromkeys(names or []))
    if columns is None and 1 < len(classes) <= MAX_CLASSES:
        by_class: list[list[int]] = [[k for k, name in enumerate(names or []) if name == each] for each in classes]
        return [
            [column[row] if row < len(column) else None for column in by_class]
            for row in range(max(map(len, by_class)))
        ]
    columns = min(count, columns or (COLUMNS if len(classes) < 2 else 2 * COLUMNS))
    return [[k if k < count else None for k in range(at, at + columns)] for at in range(0, count, columns)]


def column_headings(cells: list[list[int | None]], names: Sequence[str]) -> list[str] | None:
    columns = [{names[number] for number in column if number is not None} for column in zip(*cells, strict=True)]
    return [next(iter(found)) for found in columns] if all(len(found) == 1 for found in columns) else None


def enlarge_images(images: np.ndarray, names: Sequence[str] | None) -> np.ndarray:
    """Enlarge the images by repeating pixels, until they are easy to see and the names fit; return three channels."""
    texts = [choose_font(name) for name in names or []]
    name_width = max((round(font.getlength(text)) + 4 for text, font in texts), default=0)
    wanted = max(MIN_WIDTH, min(MAX_NAME_WIDTH, name_width))
    scale = max(1, -(-wanted // images.shape[2]))
    if images.shape[3] == 4:
        images = channels_last(put_on_white(to_float(torch.from_numpy(images).movedim(3, 1))))
    images = images.repeat(scale, 1).repeat(scale, 2)
    return images.repeat(3, 3) if images.shape[3] == 1 else images


# Text


def draw_name(name: str, width: int) -> np.ndarray:
    """Return the name centred in a band, uint8 (BAND, width, 3), cut to fit."""
    text, font = choose_font(name)
    while text and round(font.getlength(text)) > width:
        text = text.removesuffix("..")[:-1]
        text = f"{text}.." if text else ""
    band = Image.new("RGB", (width, BAND), (WHITE,) * 3)
    ImageDraw.Draw(band).text((width / 2, BAND / 2), text, fill=(BLACK,) * 3, font=font, anchor="mm")
    return np.asarray(band)


@cache
def choose_font(name: str) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return the name as it can be rendered, and its font."""
    import matplotlib

    text = unicodedata.normalize("NFC", name)
    default = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    letters = glyphs_of(default)
    if not letters.issuperset(map(ord, text)):
        if (path := find_font(text)) is not None:
            return text, ImageFont.truetype(path, FONT_SIZE)
        text = "".join(letter if ord(letter) in letters else placeholder(letter) for letter in text)
    return text, ImageFont.truetype(default, FONT_SIZE)


def find_font(text: str) -> Path | None:
    """Return the first installed font that has every letter of the text."""
    from matplotlib import font_manager

    needed = {ord(letter) for letter in text if placeholder(letter)}
    # "Last Resort" draws a box with the name of the script for every letter.
    fonts = [font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")]
    upright = sorted(fonts, key=lambda font: (font.style != "normal", font.weight not in (400, "normal"), font.name))
    return next((path for font in upright if needed <= glyphs_of(path := Path(font.fname))), None)


@cache
def glyphs_of(path: Path) -> frozenset[int]:
    """Return the code points of a font; empty if it cannot be used at `FONT_SIZE`."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(path, FONT_SIZE)  # rejects bitmap fonts, such as colour emoji
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def placeholder(letter: str) -> str:
    """Return the replacement of a letter without a glyph: `?`, or nothing for accents and joiners, which take no
    space."""
    return "" if unicodedata.category(letter) in ("Mn", "Me", "Cf") else MISSING
