"""Images in a folder: one folder per class, or folders of splits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenizer.files import one_line

from ..config import UserError, is_first_process
from ..config.terminal import tell
from .base import WORKERS, DataConfig, Payload, Rows, SplitRows
from .stamps import KnownFile, Stamp, stamp_at

DEEPEST = 100  # folders within folders
STAMPED = 4096  # files whose stamps a thread takes at a time
READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SUFFIXES = READ_SUFFIXES | {".heic", ".avif", ".jp2", ".ppm"}
"""More formats than are decoded, so that an image of another format is reported, not overlooked."""
STREAM = "; data.streaming=true reads .tar shards, patterns and URLs"
SPLIT_FOLDERS = ("train", "training", "test", "testing", "held_out", "validation", "val", "valid", "dev")


def image_folder(root: Path, config: DataConfig) -> SplitRows:
    """The splits of a folder of images: folders named after splits, if any, each with one folder per class.

    `datasets` is not used: it takes `test.png` for a whole split, and drops labels if one folder is deeper than the
    others.
    """
    return {name: partial(folder_rows, folder, config) for name, folder in split_folders(root, config).items()}


def split_folders(root: Path, config: DataConfig) -> dict[str, Path]:
    """The folders of the splits: those that the configuration names and, if there is a folder for `split`, all others
    that hold images. A folder without such folders is `train` as a whole: its folders are classes. Raises `UserError`
    if these are called as splits are, but for capitals."""
    names = [config.split, config.held_out or "test"]
    if (root / config.split).is_dir():
        others = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        names += [*SPLIT_FOLDERS, *sorted(path.name for path in others if has_images(path))]
    found = {name: root / name for name in dict.fromkeys(names) if (root / name).is_dir()}
    if not found:
        require_classes(root)
    return found or {"train": root}


def require_classes(root: Path) -> None:
    """Raise `UserError` if all folders of `root` are called as splits are, but for capitals, as `Train` and `Test`:
    taken for classes, test images would be trained on."""
    folders = sorted(name for name in next(walk(root))[1] if not name.startswith("."))
    capitals = any(name != name.lower() for name in folders)
    if capitals and len(folders) > 1 and {name.lower() for name in folders} <= set(SPLIT_FOLDERS):
        raise UserError(
            f"{root}: {', '.join(folders)} are folders of splits, it seems, and not of classes; call them train, test "
            "and validation, or say data.split= and data.held_out="
        )


def folder_rows(folder: Path, config: DataConfig) -> Rows:
    """One split in a folder. Raises `UserError` for one without images."""
    paths = sorted(find_images(folder), key=os.fsencode)  # the same order on every file system
    if not paths:
        hint = STREAM if any(path.suffix == ".tar" for path in files_below(folder)) else ""
        raise UserError(f"{folder}: no images here (looked for {', '.join(sorted(READ_SUFFIXES))}){hint}")
    inner = [path.relative_to(folder).parts for path in paths]
    labels = [parts[0] if len(parts) > 1 else None for parts in inner]
    has_classes = config.label_column is not None and any(label is not None for label in labels)
    if has_classes:
        tell_merged(folder, inner)
    read = partial(read_paths, paths, stamps_at(paths))
    return Rows(len(paths), read, labels if has_classes else None)


def tell_merged(folder: Path, inner: list[tuple[str, ...]]) -> None:
    """Print one line about classes that take in images of several folders. inner: the parts of each image's path."""
    within: dict[str, set[str]] = {}
    for parts in inner:
        within.setdefault(parts[0], set()).add("/".join(parts[1:-1]))
    merged = {name: sorted(folders) for name, folders in within.items() if len(folders) > 1}
    if merged and is_first_process():
        name, folders = next(iter(merged.items()))
        some = ", ".join(f"{name}/{part}".rstrip("/") for part in folders[:3]) + (", ..." if len(folders) > 3 else "")
        more = f"; and {len(merged) - 1:,} more such classes" if len(merged) > 1 else ""
        line = f"data.source: {folder}: only its own folders are classes: {name!r} is all of {some}{more}"
        tell(one_line(line))


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """What `os.walk` gives. Raises `UserError` for folders in folders without end, before Python or the system does,
    and for one that cannot be read, whose files would be missing without a word."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    top = str(folder).count(os.sep)
    for parent, folders, files in os.walk(folder, onerror=refuse):
        if parent.count(os.sep) - top > DEEPEST:
            raise UserError(f"{folder}: folders are nested more than {DEEPEST} deep in it")
        yield parent, folders, files


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and those in it. Raises `UserError` as `walk` does."""
    return (Path(parent, name) for parent, _, files in walk(folder) for name in files)


def find_images(folder: Path) -> list[Path]:
    """All files with the name of an image, except dotfiles. Raises `UserError` for a link to a folder, which may lead
    in circles, and as `walk` does."""
    found = []
    for parent, folders, files in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise UserError(f"{Path(parent) / name}: links to folders are not followed; use the folder itself")
        found += [Path(parent) / name for name in files if not name.startswith(".") and is_image_name(name)]
    return found


def has_images(folder: Path) -> bool:
    """Whether there is a file with the name of an image in a folder or below it."""
    return any(not path.name.startswith(".") and is_image_name(path.name) for path in files_below(folder))


def is_image_name(name: str) -> bool:
    """Whether a file has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def stamps_at(paths: Sequence[Path | str]) -> NDArray[np.int64]:
    """The stamp of each file, `(n, 3)`, see `stamps`. This takes about 3 us a file in a local folder.

    Stamps are taken when files are found, not when they are first read: later, a link to an older file, or a folder
    that got another one's name, could not be told by its dates from one that has always been there.
    """

    def stamps(start: int) -> list[Stamp]:
        return [stamp_at(path) for path in paths[start : start + STAMPED]]

    with ThreadPoolExecutor(WORKERS) as pool:  # a network file system answers several requests at once
        parts = pool.map(lambda start: np.array(stamps(start), np.int64), range(0, len(paths), STAMPED))
        return np.concatenate([np.empty((0, 3), np.int64), *parts])


def known_file(path: Path, stamp: NDArray[np.int64]) -> KnownFile:
    """The file at `path`, which should have this stamp `(3,)`."""
    size, written, changed = stamp.tolist()
    return KnownFile(path, (size, written, changed))


def read_paths(paths: list[Path], stamps: NDArray[np.int64], indices: Sequence[int]) -> list[tuple[str, Payload]]:
    """(path, file) of each requested image."""
    return [(str(paths[i]), known_file(paths[i], stamps[i])) for i in indices]
