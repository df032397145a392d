"""Images in a folder: one folder per class, folders of splits, or a sheet that lists each image with its class.

`datasets` is not used for these: it takes a class called `train`, or `test.png`, for a split, and drops labels if one
folder is deeper than the others.
"""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizer.files import one_line

from ..config import UserError, is_first_process, tell
from .decoding import LABEL, Payload, Rows, SplitRows

if TYPE_CHECKING:
    from .dataset import DataConfig

DEEPEST = 100  # folders within folders
READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SUFFIXES = READ_SUFFIXES | {".heic", ".avif", ".jp2", ".ppm"}
"""More formats than are decoded, so that an image of another format is reported, not overlooked."""
SPLIT_FOLDERS = ("train", "training", "test", "testing", "held_out", "validation", "val", "valid", "dev")
SHEETS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


# Walking


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield what `os.walk` yields. Raises `UserError` for folders nested without end, and for one that cannot be read,
    whose files would be missing silently."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    top = str(folder).count(os.sep)
    for parent, folders, files in os.walk(folder, onerror=refuse):
        if parent.count(os.sep) - top > DEEPEST:
            raise UserError(f"{folder}: folders are nested more than {DEEPEST} deep in it")
        yield parent, folders, files


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder and below it. Raises `UserError` as `walk` does."""
    return (Path(parent, name) for parent, _, files in walk(folder) for name in files)


def find_images(folder: Path) -> list[Path]:
    """Return all files with the name of an image, except dotfiles. Raises `UserError` as `walk` does."""
    return [Path(path) for path in image_paths(folder)]


def image_paths(folder: Path) -> list[str]:
    """Return the paths of `find_images`, in the same order on every file system. Raises `UserError` for a link to a
    folder, which may lead in circles, and as `walk` does."""
    found = []
    for parent, folders, files in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                raise UserError(
                    f"{os.path.join(parent, name)}: links to folders are not followed; use the folder itself"
                )
        found += [os.path.join(parent, name) for name in files if not name.startswith(".") and is_image_name(name)]
    return sorted(found, key=os.fsencode)


def is_image_name(name: str) -> bool:
    """Whether a file has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def kinds_below(folder: Path) -> set[str]:
    """Return which of `image`, `sheet`, `.parquet` and `.tar` there are in a folder and below it."""
    found = set()
    for _, _, files in walk(folder):
        for name in files:
            suffix = os.path.splitext(name)[1]
            if name in SHEETS:
                found.add("sheet")
            elif suffix in (".parquet", ".tar"):
                found.add(suffix)
            elif suffix.lower() in SUFFIXES and not name.startswith("."):
                found.add("image")
    return found


def holds_files(folder: Path) -> bool:
    """Whether a folder is read as files of images, and not as tables: parquet files, or tar files without images."""
    kinds = kinds_below(folder)
    return ".parquet" not in kinds and ("image" in kinds or ".tar" not in kinds)


# Splits and classes


def open_folder(root: Path, config: DataConfig) -> SplitRows:
    """Return the splits of a folder of images: folders named after splits, if any. Their images have the classes that
    sheets say, if there are any, else those of their folders. Raises `UserError` for a sheet beside the splits."""
    folders = split_folders(root, config)
    with_sheets = "sheet" in kinds_below(root)
    beside = [name for name in SHEETS if with_sheets and (root / name).exists() and root not in folders.values()]
    if beside:
        raise UserError(
            f"data.source: {root / beside[0]}: a sheet lists the images of its own folder, and the splits are "
            f"{', '.join(folders)}; put one into each of them"
        )
    open_split = sheet_rows if with_sheets else folder_rows
    return {name: partial(open_split, folder, config) for name, folder in folders.items()}


def split_folders(root: Path, config: DataConfig) -> dict[str, Path]:
    """Return the folders of the splits: those that the configuration names and, if there is a folder for `split`, all
    others that hold images, without those that share images with it. A folder without such folders is `train` as a
    whole: its folders are classes. Raises `UserError` if these seem to be splits."""
    names = [config.split, config.held_out or "test"]
    if (root / config.split).is_dir():
        others = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        names += [*SPLIT_FOLDERS, *sorted(path.name for path in others if "image" in kinds_below(path))]
    found = {name: root / name for name in dict.fromkeys(names) if (root / name).is_dir()}
    own = root / config.split
    found = {name: path for name, path in found.items() if name == config.split or are_apart(path, own)}
    if not found:
        require_classes(root)
    return found or {"train": root}


def are_apart(one: Path, other: Path) -> bool:
    """Whether neither folder lies in the other: as splits, they would share images."""
    here, there = (os.path.join(os.path.realpath(path), "") for path in (one, other))
    return not here.startswith(there) and not there.startswith(here)


def require_classes(root: Path) -> None:
    """Raise `UserError` if the folders of `root` cannot all be classes, so that test images would be trained on: all
    have the names of splits, and these have capitals (`Train`, `Test`) or each holds folders of images itself."""
    folders = sorted(name for name in next(walk(root))[1] if not name.startswith("."))
    if len(folders) < 2 or not {name.lower() for name in folders} <= set(SPLIT_FOLDERS):
        return
    if any(name != name.lower() for name in folders) or all(holds_classes(root / name) for name in folders):
        raise UserError(
            f"{root}: {', '.join(folders)} are folders of splits, it seems, and not of classes; call them train, test "
            "and validation, or say data.split= and data.held_out="
        )


def holds_classes(folder: Path) -> bool:
    """Whether all images of a folder are in folders within it, and there are two of these or more."""
    inside = [path[len(os.path.join(folder, "")) :].split(os.sep) for path in image_paths(folder)]
    return all(len(parts) > 1 for parts in inside) and len({parts[0] for parts in inside}) > 1


def folder_rows(folder: Path, config: DataConfig) -> Rows:
    """Return one split, in which the top folders are classes. Raises `UserError` for one without images."""
    paths = image_paths(folder)
    if not paths:
        raise UserError(f"{folder}: no images here (looked for {', '.join(sorted(READ_SUFFIXES))})")
    if config.label_column is None:
        return file_rows(paths, None)
    start = len(os.path.join(folder, ""))
    inner = [path[start:].split(os.sep) for path in paths]
    labels = [parts[0] if len(parts) > 1 else None for parts in inner]
    if all(label is None for label in labels):
        return file_rows(paths, None)
    say_merged(folder, inner)
    return file_rows(paths, labels)


def file_rows(paths: list[str], labels: list[Any] | None) -> Rows:
    """Return the rows of image files."""

    def read(rows: Sequence[int]) -> list[Payload]:
        return [Path(paths[row]) for row in rows]

    return Rows(len(paths), read, paths.__getitem__, labels)


def say_merged(folder: Path, inner: list[list[str]]) -> None:
    """Print one line about classes that take in images of several folders. inner: the parts of each image's path."""
    within: dict[str, set[str]] = {}
    for parts in inner:
        within.setdefault(parts[0], set()).add("/".join(parts[1:-1]))
    merged = {name: sorted(folders) for name, folders in within.items() if len(folders) > 1}
    if merged and is_first_process():
        name, folders = next(iter(merged.items()))
        some = ", ".join(f"{name}/{part}".rstrip("/") for part in folders[:3]) + (", ..." if len(folders) > 3 else "")
        more = f"; and {len(merged) - 1:,} more such classes" if len(merged) > 1 else ""
        tell(one_line(f"data.source: {folder}: only its own folders are classes: {name!r} is all of {some}{more}"))


# Sheets


def sheet_rows(folder: Path, config: DataConfig) -> Rows:
    """Return the images of one split that the sheets below `folder` list. Raises `UserError` for images without a
    row, and for rows without an image in the folder."""
    sheets = sorted(path for path in files_below(folder) if path.name in SHEETS)
    found = {same_spelling(path): path for path in image_paths(folder)}
    listed, others, columns = dict[str, Any](), set[str](), dict[str, None]()
    for sheet in sheets:
        for row in read_sheet(sheet):
            columns |= dict.fromkeys(row)
            image, further = files_in_row(sheet, row, config.image_column)
            if image not in found:
                raise UserError(one_line(f"data.source: {sheet}: it lists {image}, which is no image in {folder}"))
            label = row.get(str(config.label_column))
            if listed.setdefault(image, label) != label:
                raise UserError(
                    one_line(f"data.source: {sheet}: {image} has two classes, {listed[image]!r} and {label!r}")
                )
            others |= further
    paths = [path for key, path in found.items() if key in listed]
    missing = [path for key, path in found.items() if key not in listed and key not in others]
    if missing or not paths:
        name = sheets[0].relative_to(folder) if sheets else "a sheet (metadata.jsonl or metadata.csv), as others have"
        count = f"{len(missing):,} of {len(found):,} images have no row" if missing else "no images have a row"
        first = f", the first is {os.path.relpath(missing[0], folder)}" if missing else ""
        raise UserError(
            f"data.source: {folder}: {count} in {name}{first}; add rows for them, or move them elsewhere; without any "
            "sheet, folders are classes"
        )
    if config.label_column is None or config.label_column not in columns:
        say_no_classes(sheets[0], list(columns), config.label_column)
        return file_rows(paths, None)
    labels = [listed[same_spelling(path)] for path in paths]
    return file_rows(paths, as_numbers(labels) if sheets[0].suffix == ".csv" else labels)


def say_no_classes(sheet: Path, columns: list[str], column: str | None) -> None:
    """Print one line about a sheet without classes. Raises `UserError` if they were asked for by another name than the
    usual one."""
    there = ", ".join(name for name in columns if name != "file_name") or "none"
    if column not in (None, LABEL):
        raise UserError(f"data.label_column: no column {column!r}; there are {there}")
    if column == LABEL and is_first_process():
        tell(one_line(f"data.label_column: {sheet} has no column {column!r}, so there are no classes; others: {there}"))


def read_sheet(sheet: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a sheet. Raises `UserError`."""
    try:
        if sheet.suffix == ".csv":
            with sheet.open(newline="", encoding="utf-8-sig") as file:
                yield from csv.DictReader(file)
        elif sheet.suffix == ".jsonl":
            with sheet.open(encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is not a JSON object")
            yield from rows
        else:
            import pyarrow.parquet as pq

            yield from pq.read_table(sheet).to_pylist()
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # of pyarrow's errors, most are ValueErrors
        raise UserError(one_line(f"data.source: {sheet} cannot be read: {error}")) from error


def files_in_row(sheet: Path, row: dict[str, Any], image_column: str) -> tuple[str, set[str]]:
    """Return the path of a row's image, and those of other files, such as masks in `mask_file_name`. Raises
    `UserError` for a row without an image."""
    named = {
        key.removesuffix("file_name").rstrip("_") or "image": same_spelling(os.path.normpath(sheet.parent / value))
        for key, value in row.items()
        if key and key.endswith("file_name") and isinstance(value, str) and value
    }
    if image_column not in named:
        raise UserError(one_line(f"data.source: {sheet}: a row without file_name: {row}"))
    return named.pop(image_column), set(named.values())


def as_numbers(labels: list[Any]) -> list[Any]:
    """Return labels in a CSV file, which are text, as whole numbers if all are; an empty cell is no label."""
    labels = [None if label == "" else label for label in labels]
    whole = all(
        isinstance(label, int) or re.fullmatch(r"\d{1,18}", str(label)) for label in labels if label is not None
    )
    return [int(label) if whole and label is not None else label for label in labels]


def same_spelling(path: str) -> str:
    """Return a path with each accented letter as one character; some file systems write it as two."""
    return unicodedata.normalize("NFC", path)
