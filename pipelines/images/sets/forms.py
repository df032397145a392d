"""The forms that a set of images can have, by the suffix of its name, and how each is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...config import UserError
from ...files import Output
from ..grids import class_grid
from ..pictures import SUFFIXES, png_bytes, write_picture
from .folder import SHEET, rows_there, write_folder
from .npz import raw_pixels, write_npz
from .parquet import write_parquet
from .parts import Facts, Part
from .tar import write_tar


@dataclass(frozen=True)
class Form:
    """keep: an image, uint8 (H, W, C), as the parts hold it. write: a new file of all parts; None for a grid and for a
    folder."""

    name: str
    keep: Callable[[np.ndarray], bytes]
    write: Callable[[Path, Iterable[Part], Facts], None] | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, with a file for each image."""
        return self.name == "folder"


FOLDER, GRID = Form("folder", png_bytes), Form("grid", raw_pixels)
FILES = {
    ".npz": Form("npz", raw_pixels, write_npz),
    ".parquet": Form("parquet", png_bytes, write_parquet),
    ".tar": Form("tar", png_bytes, write_tar),
}


def form_of(out: Path) -> Form:
    """The form of this name. Raises `UserError` for another suffix."""
    suffix = out.suffix.lower()
    if suffix and suffix not in (*SUFFIXES, *FILES):
        raise UserError(
            f"out: {str(out)!r} should end in {', '.join(SUFFIXES)} for a grid, in {', '.join(FILES)} for all images "
            "in one file, or be a folder"
        )
    return FILES.get(suffix, GRID if suffix else FOLDER)


def check_out(form: Form, out: Output, count: int) -> None:
    """Raise `UserError` unless a set of so many images can be written as `out`."""
    if form.is_folder:
        key = Facts(count, 0, 0).key
        out.check_files([SHEET, *(f"{key(number)}.png" for number in range(count))])
    else:
        out.check_file()


def told(form: Form, out: Path, facts: Facts) -> str:
    """Where a set is, as it is printed."""
    if form.is_folder:
        return f": {out}/{facts.key(0)}.png ..."
    return f" in one {'grid' if form.write is None else 'file'}: {out}"


def save(
    form: Form,
    out: Output,
    parts: Iterable[Part],
    facts: Facts,
    *,
    columns: int | None,
    captions: bool = True,
    temporary: Path | None = None,
) -> None:
    """Write all parts, in their order, as `out`. Of a file or a folder no more is in memory than a part; a grid, of
    `columns` and with the names of the classes if `captions`, is made as a whole (see `class_grid`). temporary: where
    it is until it has its name; None: beside it.

    Raises `UserError` for what may not be replaced or cannot be written.
    """
    if form is GRID:
        picture = grid_of(parts, facts, columns, captions)
        with out.file() as path:
            write_picture(picture, path)
    elif form.write is not None:
        with out.file(temporary) as path:
            form.write(path, parts, facts)
    else:
        with out.files(temporary) as folder:
            write_folder(folder, parts, facts, rows_there(out.path))


def grid_of(parts: Iterable[Part], facts: Facts, columns: int | None, captions: bool) -> np.ndarray:
    """All images in one picture."""
    pixels, labels = [], list[int]()
    for part in parts:
        pixels += part.images
        labels += part.labels or []
    images = np.frombuffer(b"".join(pixels), np.uint8).reshape(facts.count, facts.height, facts.width, 3)
    known = [*(facts.class_names or []), ""]  # the last is of the null class
    names = [known[label] for label in labels] if labels else None
    return class_grid(images, names, columns, captions=captions)
