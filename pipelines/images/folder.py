"""Images in a folder: one folder per class, folders of splits, or a sheet that lists each image with its class.

`datasets` is not used here: it mistakes a class called `train`, or `test.png`, for a split, and drops labels if one
folder is deeper than the others.
"""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import UserError, is_first_process, tell, user_errors
from .sources import IMAGE, LABEL, Source, SourceSplits, of_files

if TYPE_CHECKING:
    from .settings import DataConfig

READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
ARRAY_SUFFIXES = {".npy", ".npz"}  # of files that are images where there are no others
IMAGE_SUFFIXES = READ_SUFFIXES | {".heic", ".avif", ".jp2"}
"""Includes formats that cannot be decoded, so that such images are reported, not overlooked."""
SPLIT_FOLDERS = ("train", "training", "test", "testing", "held_out", "validation", "val", "valid", "dev")
SHEETS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
Find = Callable[[Path], list[str]]  # returns the paths of a folder's images or clips


# Walking


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield what `os.walk` yields. Raises `UserError` for an unreadable folder, whose files would otherwise be missing
    silently."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    return os.walk(folder, onerror=refuse)


def files_below(folder: Path) -> Iterator[Path]:
    return (Path(parent, name) for parent, _, files in walk(folder) for name in files)


def image_paths(folder: Path) -> list[str]:
    """Return the paths of all image files below a folder or, without any, of arrays, but no dotfiles, in the same order
    on every file system. Raises `UserError` for a link to a folder, which could form a cycle, and like `walk`."""
    found, arrays = list[str](), list[str]()
    for parent, folders, files in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                raise UserError(f"{os.path.join(parent, name)}: links to folders are not followed")
        files = [name for name in files if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if suffix_of(name) in IMAGE_SUFFIXES]
        arrays += [os.path.join(parent, name) for name in files if suffix_of(name) in ARRAY_SUFFIXES]
    return sorted(found or arrays, key=os.fsencode)


def match_names(entries: Mapping[str, Any], names: Sequence[str], where: str, what: str) -> list[Any]:
    """Return for each name, a path, the entry whose key is the longest end of it. Raises `ValueError` for a name
    without an entry, and for two names of one entry. where, what: for errors."""
    found, owners = [], dict[str, str]()
    for name in names:
        parts = Path(name).parts
        ends = ("/".join(parts[first:]) for first in range(len(parts)))
        key = next((end for end in ends if end in entries), None)
        if key is None:
            raise ValueError(f"{where} has no {what} {name}")
        if (owner := owners.setdefault(key, name)) != name:
            raise ValueError(f"{where}: {key} may belong to {owner} or to {name}; use longer paths")
        found.append(entries[key])
    return found


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def natural_key(path: str) -> list[int | str]:
    """Return a sort key that puts `2.png` before `10.png`."""
    parts = re.split(r"(\d+)", path)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def kinds_below(folder: Path) -> set[str]:
    """Return which of `image`, `sheet`, `.parquet` and `.tar` occur below a folder."""
    found = set()
    for _, _, files in walk(folder):
        for name in files:
            suffix = os.path.splitext(name)[1]
            if name in SHEETS:
                found.add("sheet")
            elif suffix in (".parquet", ".tar"):
                found.add(suffix)
            elif suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                found.add("image")
    return found


def holds_files(folder: Path) -> bool:
    kinds = kinds_below(folder)
    return ".parquet" not in kinds and ("image" in kinds or ".tar" not in kinds)


# Splits and classes


def open_folder(root: Path, config: DataConfig, find: Find) -> SourceSplits:
    """Return the splits of a folder of images or clips: its folders named after splits, if any. Classes come from
    sheets, if there are any, and otherwise from folder names. Raises `UserError` for a sheet beside the splits, and for
    a split that is itself a clip."""

    def find_separate(folder: Path) -> list[str]:
        found = find(folder)
        if str(folder) in found:
            raise UserError(f"data.frames: {folder} holds single images, not clips; put each clip into a folder")
        return found

    folders = split_folders(root, config)
    with_sheets = "sheet" in kinds_below(root)
    beside = [name for name in SHEETS if with_sheets and (root / name).exists() and root not in folders.values()]
    if beside:
        raise UserError(f"data.source: {root / beside[0]}: put one sheet into each split: {', '.join(folders)}")
    open_split = sheet_source if with_sheets else folder_source
    return {name: partial(open_split, folder, config, find_separate) for name, folder in folders.items()}


def split_folders(root: Path, config: DataConfig) -> dict[str, Path]:
    """Return the folders of the splits: those named in the configuration and, if `split` has a folder, all others that
    hold images and do not overlap with it. Without such folders, the whole folder is `train` and its folders are
    classes; raises `UserError` if these look like splits."""
    names = [config.split, config.held_out or "test"]
    if (root / config.split).is_dir():
        others = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        names += [*SPLIT_FOLDERS, *sorted(path.name for path in others if "image" in kinds_below(path))]
    found = {name: root / name for name in dict.fromkeys(names) if (root / name).is_dir()}
    own = root / config.split
    found = {name: path for name, path in found.items() if name == config.split or are_disjoint(path, own)}
    if not found:
        refuse_split_names(root)
    return found or {"train": root}


def are_disjoint(one: Path, other: Path) -> bool:
    """Whether neither folder contains the other. Nested splits would share images."""
    here, there = (os.path.join(os.path.realpath(path), "") for path in (one, other))
    return not here.startswith(there) and not there.startswith(here)


def refuse_split_names(root: Path) -> None:
    """Raise `UserError` if the folders of `root` look like splits, whose test images would be trained on: all have such
    names, which are capitalised (`Train`, `Test`), or each has class folders itself."""
    folders = sorted(name for name in next(walk(root))[1] if not name.startswith("."))
    if len(folders) < 2 or not {name.lower() for name in folders} <= set(SPLIT_FOLDERS):
        return

    def holds_classes(folder: Path) -> bool:
        inside = [Path(path).relative_to(folder).parts for path in image_paths(folder)]
        return all(len(parts) > 1 for parts in inside) and len({parts[0] for parts in inside}) > 1

    if any(name != name.lower() for name in folders) or all(holds_classes(root / name) for name in folders):
        raise UserError(f"{root}: {', '.join(folders)} look like splits, not classes; set data.split and data.held_out")


def folder_source(folder: Path, config: DataConfig, find: Find) -> Source:
    """Return a split whose top-level folders are classes. Raises `UserError` if it has no images."""
    paths = find(folder)
    if not paths:
        raise UserError(f"{folder}: no images here (suffixes: {', '.join(sorted(READ_SUFFIXES | ARRAY_SUFFIXES))})")
    start = len(os.path.join(folder, ""))
    inner = [path[start:].split(os.sep) for path in paths]
    labels = [parts[0] if len(parts) > 1 + config.clips else None for parts in inner]
    if config.label_column is None or all(label is None for label in labels):
        return of_files(paths)
    report_merged_classes(folder, inner)
    return of_files(paths, labels)


def report_merged_classes(folder: Path, inner: list[list[str]]) -> None:
    """Print one line about classes that merge several folders. inner: the parts of each image's path."""
    within: dict[str, set[str]] = {}
    for parts in inner:
        within.setdefault(parts[0], set()).add("/".join(parts[1:-1]))
    merged = {name: sorted(folders) for name, folders in within.items() if len(folders) > 1}
    if merged and is_first_process():
        name, folders = next(iter(merged.items()))
        some = ", ".join(f"{name}/{part}".rstrip("/") for part in folders[:3]) + (", ..." if len(folders) > 3 else "")
        more = f"; and {len(merged) - 1:,} more such classes" if len(merged) > 1 else ""
        tell(f"data.source: {folder}: only top-level folders are classes: {name!r} merges {some}{more}")


# Sheets


def read_sheet_rows(
    sheets: Sequence[Path], image_columns: Sequence[str], folder: Path | None = None, key: str = "data.source"
) -> Iterator[tuple[Path, str, set[str], dict[str, Any]]]:
    """Yield for each row of the sheets its sheet, the full path of its image, those of its other files, such as masks
    in `mask_file_name`, and all cells. image_columns: the first that names an image counts. folder: to which paths are
    relative; None: that of each sheet. key: the setting that names the sheets. Raises `ValueError` for a row without an
    image, and `UserError` for a sheet that cannot be read."""
    for sheet in sheets:
        for cells in read_sheet(sheet, key):
            files = {
                name: full_path((folder or sheet.parent) / value)
                for name, value in cells.items()
                if name and name.endswith("file_name") and isinstance(value, str) and value
            }
            named = next((name for name in image_columns if name in files), None)
            if named is None:
                if "file_name" in cells or sheet.suffix == ".jsonl":  # whose rows need not have the same columns
                    raise ValueError(f"{sheet}: a row has no file_name: {cells}")
                raise ValueError(f"{sheet} has no column file_name; it has {', '.join(map(str, cells))}")
            yield sheet, files.pop(named), set(files.values()), cells


def find_sheets(folder: Path) -> list[Path]:
    return sorted(path for path in files_below(folder) if path.name in SHEETS)


def sheet_source(folder: Path, config: DataConfig, find: Find) -> Source:
    """Return the images listed in the sheets below `folder`, as one split. Raises `UserError` for images without a row,
    and for rows without an image in the folder."""
    sheets, found = find_sheets(folder), {full_path(path): path for path in find(folder)}
    rows, others, columns = dict[str, dict[str, Any]](), set[str](), dict[str, None]()
    label, group = config.label_column, config.group
    own = "file_name" if config.image_column == IMAGE else f"{config.image_column}_file_name"
    with user_errors(ValueError, prefix="data.source: "):
        for sheet, image, further, cells in read_sheet_rows(sheets, [f"{config.image_column}_file_name", own]):
            columns |= dict.fromkeys(cells)
            if image not in found:
                raise ValueError(f"{sheet}: lists {image}, which is not an image in {folder}")
            before = rows.setdefault(image, cells)
            if label is not None and before.get(label) != cells.get(label):
                classes = f"{before.get(label)!r} and {cells.get(label)!r}"
                raise ValueError(f"{sheet}: {image} has two classes, {classes}")
            rows[image] = {name: cells.get(name) for name in (label, group) if name is not None}
            others |= further
    paths = [path for key, path in found.items() if key in rows]
    missing = [path for key, path in found.items() if key not in rows and key not in others]
    if missing or not paths:
        name = sheets[0].relative_to(folder) if sheets else "a sheet (metadata.jsonl or metadata.csv) like other splits"
        count = f"{len(missing):,} of {len(found):,} images have no row" if missing else "no images have a row"
        first = f", the first is {os.path.relpath(missing[0], folder)}" if missing else ""
        raise UserError(f"data.source: {folder}: {count} in {name}{first}; add rows, or remove all sheets")
    listed = [rows[key] for key in found if key in rows]
    labels: list[Any] | None = None
    objects: list[str] | None = None
    if label is not None and label in columns:
        labels = [cells[label] for cells in listed]
        labels = parse_labels(labels) if sheets[0].suffix == ".csv" else labels
    elif label is not None:
        missing_label = f"no column {label!r}; columns: {', '.join(columns)}"
        if label != LABEL:
            raise UserError(f"data.label_column: {missing_label}")
        if is_first_process():
            tell(f"data.label_column: {sheets[0]} has {missing_label}, so there are no classes")
    if group is not None and group in columns:
        objects = read_objects([cells[group] for cells in listed], paths.__getitem__, str(sheets[0]), group)
    return replace(of_files(paths, labels), objects=objects)


def read_objects(cells: list[Any], name: Callable[[int], str], table: str, column: str) -> list[str]:
    """Return the objects in the column `data.group`, and print where they come from. name: that of a row. Raises
    `UserError` for an empty cell."""
    if (empty := next((row for row, cell in enumerate(cells) if cell in (None, "")), None)) is not None:
        raise UserError(f"data.group: {name(empty)} has nothing in the column {column!r} of {table}")
    if is_first_process():
        tell(f"data.group: the column {column!r} of {table} names the object of each image")
    return [str(cell) for cell in cells]


def read_sheet(sheet: Path, key: str = "data.source") -> Iterator[dict[str, Any]]:
    """Yield the rows of a sheet. key: the setting that names it. Raises `UserError`."""
    kinds = OSError, ValueError, csv.Error, RecursionError  # most errors of pyarrow are ValueErrors
    with user_errors(*kinds, prefix=f"{key}: {sheet} cannot be read: "):
        if sheet.suffix in (".csv", ".tsv"):
            with sheet.open(newline="", encoding="utf-8-sig") as file:
                yield from csv.DictReader(file, delimiter="\t" if sheet.suffix == ".tsv" else ",")
        elif sheet.suffix == ".jsonl":
            with sheet.open(encoding="utf-8") as file:
                for line in filter(str.strip, file):
                    if not isinstance(row := json.loads(line), dict):
                        raise ValueError("a line is not a JSON object")
                    yield row
        else:
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(sheet).iter_batches(1024):
                yield from batch.to_pylist()


def parse_labels(labels: list[Any]) -> list[Any]:
    """Convert the labels of a CSV file to whole numbers if all are numbers; an empty cell means no label."""
    labels = [None if label == "" else label for label in labels]
    whole = all(re.fullmatch(r"\d{1,18}", str(label)) for label in labels if label is not None)
    return [int(label) if whole and label is not None else label for label in labels]


def normalize_path(path: str) -> str:
    """Return a path in Unicode form NFC; some file systems decompose accented letters."""
    return unicodedata.normalize("NFC", path)


def full_path(path: Path | str) -> str:
    return normalize_path(os.path.abspath(path))
