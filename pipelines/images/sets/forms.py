"""The forms that a set of images can have, by the suffix of its name, and how each is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...config import UserError
from ...files import Output, replace_file
from ...jobs.pieces import PLACED, RESULT
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
    work: Path | None = None,
) -> None:
    """Write all parts, in their order, as `out`. Of a file or a folder no more is in memory than a part; a grid, of
    `columns` and with the names of the classes if `captions`, is made as a whole (see `class_grid`). work: the folder
    of the job, where it is until it has its name, and where it is noted that it is about to have it.

    Raises `UserError` for what may not be replaced or cannot be written.
    """
    temporary = None if work is None or form is GRID else work / RESULT  # a picture needs its suffix
    if form.is_folder:
        with out.files(temporary) as folder:
            write_folder(folder, parts, facts, rows_there(out.path))
            note_placed(work, {path.name: path for path in folder.iterdir()})
        return
    with out.file(temporary) as path:
        if form.write is None:
            write_picture(grid_of(parts, facts, columns, captions), path)
        else:
            form.write(path, parts, facts)
        note_placed(work, {"": path})


def note_placed(work: Path | None, files: Mapping[str, Path]) -> None:
    """Note which files are about to get their names, by which they are known after a kill; "" is that of the set."""
    if work is not None:
        replace_file(work / PLACED, json.dumps({name: identity(path) for name, path in files.items()}).encode())


def identity(path: Path) -> list[int] | None:
    """What stays of a file that is renamed, and of no other; None where there is no file."""
    try:
        info = path.lstat()
    except OSError:
        return None
    return [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns]


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
