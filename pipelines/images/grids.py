"""Grids of images with the names of their classes: a column for each class, its name on top.

Where no column is of one class, each image has its name above it. The text is Pillow's own font, so that a grid is the
same picture everywhere; letters lose their accents, and those that it does not have are boxes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MOST_CLASSES = 20
"""Columns of their own, at most."""
WIDE = 8
"""Columns where there are no classes to tell apart."""
PADDING, GREY, PAPER, INK = 2, 128, 255, 0
SMALLEST = 56
"""The width that images have at least: their pixels are repeated a whole number of times."""
NAME = 112
"""The width up to which images are enlarged so that a name fits over them; longer ones are cut."""
SIZE, BAND = 12, 16
"""Of the letters, and of the band that they stand in, in pixels."""


def class_grid(
    images: np.ndarray, names: Sequence[str] | None, columns: int | None = None, *, captions: bool = True
) -> np.ndarray:
    """uint8 images (B, H, W, C) as one picture (H, W, 3).

    names: the class of each image, if there are any. columns: None takes one for each class of at most `MOST_CLASSES`,
    in the order in which they first appear, and else 8 (16 of more classes); a number takes the images in their order.
    captions: write the names.
    """
    cells = laid_out(len(images), names, columns)
    names = names if captions else None
    heads = None if names is None else heads_of(cells, names)
    pixels = enlarged(images, names)
    height, width = pixels.shape[1:3]
    over = BAND * (names is not None and heads is None)  # above each image
    top = BAND * (heads is not None)
    rows, across = len(cells), len(cells[0])
    shape = (top + PADDING + rows * (over + height + PADDING), PADDING + across * (width + PADDING), 3)
    canvas = np.full(shape, GREY, np.uint8)
    for row, line in enumerate(cells):
        y = top + PADDING + row * (over + height + PADDING) + over
        for column, number in enumerate(line):
            x = PADDING + column * (width + PADDING)
            if number is not None:
                canvas[y : y + height, x : x + width] = pixels[number]
                if over and names is not None:
                    canvas[y - over : y, x : x + width] = written(names[number], width)
            if heads is not None and row == 0:
                canvas[:top, x : x + width] = written(heads[column], width)
    return canvas


def laid_out(count: int, names: Sequence[str] | None, columns: int | None) -> list[list[int | None]]:
    """The numbers of the images in each row; None where there is none."""
    classes = list(dict.fromkeys(names or []))
    if columns is None and 1 < len(classes) <= MOST_CLASSES:
        of_class: list[list[int]] = [[k for k, name in enumerate(names or []) if name == one] for one in classes]
        return [
            [column[row] if row < len(column) else None for column in of_class]
            for row in range(max(map(len, of_class)))
        ]
    wide = WIDE if len(classes) < 2 else 2 * WIDE
    columns = min(count, columns or wide)
    return [[k if k < count else None for k in range(at, at + columns)] for at in range(0, count, columns)]


def heads_of(cells: list[list[int | None]], names: Sequence[str]) -> list[str] | None:
    """The name of each column, None where some column has images of several classes."""
    columns = [{names[number] for number in column if number is not None} for column in zip(*cells, strict=True)]
    return [next(iter(found)) for found in columns] if all(len(found) == 1 for found in columns) else None


def enlarged(images: np.ndarray, names: Sequence[str] | None) -> np.ndarray:
    """Images of three channels, their pixels repeated so that small ones can be seen and a name can be read."""
    width = images.shape[2]
    wanted = max(SMALLEST, min(NAME, max((round(length(plain(name))) + 4 for name in names or []), default=0)))
    scale = max(1, -(-wanted // width))
    images = images.repeat(scale, 1).repeat(scale, 2)
    return images.repeat(3, 3) if images.shape[3] == 1 else images


def written(name: str, width: int) -> np.ndarray:
    """`name` in the middle of a band, uint8 (BAND, width, 3); cut where it is too long."""
    text = plain(name)
    while text and length(text) > width:
        text = text.removesuffix("..")[:-1]
        text = f"{text}.." if text else ""
    band = Image.new("RGB", (width, BAND), (PAPER,) * 3)
    ImageDraw.Draw(band).text((width / 2, BAND / 2), text, fill=(INK,) * 3, font=font(), anchor="mm")
    return np.asarray(band)


def plain(name: str) -> str:
    """`name` without accents, which the font does not have."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))


def length(text: str) -> float:
    """Its width in pixels."""
    return font().getlength(text)


@cache
def font() -> ImageFont.FreeTypeFont:
    """The one that comes with Pillow."""
    found = ImageFont.load_default(SIZE)
    assert isinstance(found, ImageFont.FreeTypeFont)
    return found
