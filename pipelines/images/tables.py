"""Images in tables: parquet files, webdataset (.tar) files and data sets of the Hub.

`datasets` finds them, and copies them to Arrow files in its cache, which are memory-mapped and read in any order. Later
changes to the files do not affect a run. `read_parquet` and `read_tar` read files in sequence without a copy
(`streaming`).
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tokenizer.files import quote

from ..config import UserError, is_first_process, tell, user_errors
from .folder import IMAGE_SUFFIXES, files_below, read_objects
from .formats import MAX_FILE, Payload, read_image_file
from .hub import describe_error, offline_if_unreachable
from .origin import HUB_NAME, REMARK
from .sources import IMAGE, LABEL, Identity, Source, SourceSplits, hash_arrays, hash_bytes, hash_names

if TYPE_CHECKING:
    from .settings import DataConfig

PROTOCOLS = ("hf", "http", "https", "s3", "gs", "az")
KINDS = ".parquet and .tar (uncompressed)"
HASH = "hash"
TAR_VERSION = 1  # version of the rows that `read_tar` yields, because copies of them are cached


# Finding tables


def open_tables(config: DataConfig) -> SourceSplits:
    builder = find_tables(config)
    splits = files_of(builder) or builder.info.splits or ()  # offline, only the cached copy is known
    return {str(split): partial(table_rows, builder, str(split), config) for split in splits}


def find_tables(config: DataConfig) -> Any:
    """Return the builder of `datasets` for a parquet or tar file, a folder, pattern or URL of them, or a Hub id.

    Raises `UserError` for a missing source, for other formats, and for a card that names files elsewhere.
    """
    import datasets

    source, path = config.source, Path(os.path.expanduser(config.source))
    is_hub = re.fullmatch(HUB_NAME, source) is not None and not path.exists()
    check_place(source, path, is_hub)
    try:
        with quiet_datasets(), offline_if_unreachable() if is_hub else nullcontext():
            if is_hub or path.is_dir():
                builder = datasets.load_dataset_builder(source if is_hub else os.path.abspath(path))
            else:  # the suffixes of the files decide the format
                place = glob.escape(str(path)) if path.exists() else source if "://" in source else str(path)
                builder = datasets.load_dataset_builder("webdataset", data_files={"train": place})
                suffixes = set(map(url_suffix, files_of(builder)["train"]))
                if suffixes == {".parquet"} or path.is_file() and suffixes != {".tar"}:
                    builder = datasets.load_dataset_builder("parquet", data_files={"train": place})
                elif suffixes != {".tar"}:
                    raise UserError(f"data.source: {source}: files {', '.join(sorted(suffixes))}; supported: {KINDS}")
    except UserError:
        raise
    except Exception as error:  # anything from a lost network to a broken file
        reason = describe_error(error)
        if not is_hub:
            raise UserError(f"data.source: {source} cannot be read: {reason}") from error
        raise UserError(
            f"data.source={source}: no such folder ({path.absolute()}), and the Hub id '{source}' cannot be loaded: "
            f"{reason}"
        ) from error
    for file in chain.from_iterable(files_of(builder).values()) if is_hub or path.is_dir() else ():
        if not (file.startswith(f"hf://datasets/{source}@") if is_hub else is_own(file, str(path))):
            raise UserError(f"data.source: {source}: its card names a file outside it, {quote(file)}")
    if path.is_dir():
        report_unused(path, files_of(builder))
        if builder.name == "parquet":  # with a card, `datasets` would use an outdated copy
            files = {split: [glob.escape(file) for file in part] for split, part in files_of(builder).items()}
            builder = datasets.load_dataset_builder("parquet", data_files=files)
    return builder


def check_place(source: str, path: Path, is_hub: bool) -> None:
    """Raise `UserError` for a source that is not there, a file of another format, and an unknown protocol."""
    if path.is_dir():
        if glob.has_magic(place := os.path.abspath(path)):
            raise UserError(f"data.source: {place}: the path of a folder of tables cannot contain *, ? or [; rename it")
    elif path.exists():
        if path.suffix != ".tar" and path.open("rb").read(4) != b"PAR1":
            raise UserError(f"data.source: {path} is no parquet or .tar file; for images, pass their folder")
    elif "://" in source:
        if source.partition("://")[0] not in PROTOCOLS:
            raise UserError(f"data.source: {source}: unsupported URL; supported protocols: {', '.join(PROTOCOLS)}")
    elif source.startswith(REMARK) or not is_hub and not glob.glob(str(path), recursive=True):
        raise UserError(f"data.source: there is no file or folder {source}")


def url_suffix(file: str) -> str:
    return os.path.splitext(file.partition("?")[0] if "://" in file else file)[1]


def files_of(builder: Any) -> dict[str, list[str]]:
    return {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}


def is_own(file: str, source: str) -> bool:
    """Whether a file is below the folder of `source` or, for a Hub id, below the caches."""
    import datasets
    from huggingface_hub import constants

    path = os.path.expanduser(source)
    if os.path.exists(path):
        places = [path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))]
    else:
        places = [constants.HF_HOME, constants.HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE)]
    roots = {os.path.join(full(place), "") for place in places for full in (os.path.abspath, os.path.realpath)}
    return "://" not in file and os.path.abspath(file).startswith(tuple(roots))


def report_unused(root: Path, files: dict[str, list[str]]) -> None:
    """Print one line about tables below `root` that belong to no split; `datasets` assigns splits by file name."""
    used = {os.path.abspath(file) for each in files.values() for file in each}
    tables = (path for path in files_below(root) if path.suffix in (".parquet", ".tar"))
    left = sorted(path for path in tables if os.path.abspath(path) not in used)
    if left and is_first_process():
        more = f" and {len(left) - 1:,} more" if len(left) > 1 else ""
        splits = f"not named after a split (splits: {', '.join(files)})"
        tell(f"data.source: {root}: not used: {left[0].relative_to(root)}{more}, {splits}")


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the progress bars of `datasets` unless stderr is a terminal."""
    import sys

    import datasets

    silent = not (sys.stderr.isatty() and is_first_process()) and not datasets.are_progress_bars_disabled()
    if silent:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silent:
            datasets.enable_progress_bars()


# Random access, to a copy


def table_rows(builder: Any, split: str, config: DataConfig) -> Source:
    """Return one split, still encoded, of a copy in the cache of `datasets`. Raises `UserError`."""
    import datasets

    is_tar, table = builder.name == "webdataset", copy_table(builder, split, config)
    image, label = (IMAGE, config.label_column and LABEL) if is_tar else (config.image_column, config.label_column)
    if image not in table.column_names:
        raise UserError(f"data.image_column: no column {image!r}; there are {table.column_names}")
    labels, names = None, None
    if label is not None and label in table.column_names:
        labels = tar_labels(table, config) if is_tar else table[label][:]
        names = getattr(table.features[label], "names", None)
        local = [file for file in files_of(builder).get(split, []) if os.path.exists(file)]
        if names is not None and local:  # `datasets` applies the names of the first file to all
            classes = names_in(local[0], label)
            if other := [file for file in local if names_in(file, label) != classes]:
                raise UserError(f"data.label_column: {other[0]} and {local[0]} have different classes")
            names = list(classes) or None
    elif label not in (None, LABEL):
        raise UserError(f"data.label_column: no column {label!r}; there are {table.column_names}")
    objects = None
    if not is_tar and config.group in table.column_names:
        cells = table[config.group][:]
        objects = read_objects(cells, lambda row: f"row {row} of {split}", config.source, str(config.group))
    if config.key is not None and (is_tar or config.key not in table.column_names):
        there = "a .tar has no columns" if is_tar else f"there are {table.column_names}"
        raise UserError(f"data.key: no column {config.key!r}; {there}")
    facts = {"labels": labels, "class_names": names, "table": None if is_tar else table, "objects": objects}
    if dtype := array_type(table.features[image]):
        arrays = table.select_columns([image]).with_format("numpy", dtype=np.dtype(dtype))
        return Source(
            len(table),
            lambda rows: [array if np.ndim(array) else None for array in arrays[list(rows)][image]],
            lambda row: f"row {row} of {split}",
            identity=identify_rows(table, config.key, Identity("pixels", lambda: hash_arrays(arrays[image]))),
            **facts,
        )
    # pyarrow raises several types for a column that cannot be cast.
    with user_errors(Exception, prefix=f"data.image_column: {image!r} does not hold images: "):
        images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))

    def read(rows: Sequence[int]) -> list[Payload]:
        return [read_payload(value, config.source) for value in images[list(rows)][image]]

    def name(row: int) -> str:
        path = (images[row][image] or {}).get("path")
        return str(path) if is_tar else f"row {row} of {split}" + (f" ({path})" if path else "")

    own = Identity("bytes", lambda: hash_cells(images, image, config.source))
    return Source(len(table), read, name, identity=identify_rows(table, config.key, own), **facts)


def copy_table(builder: Any, split: str, config: DataConfig) -> Any:
    """Return the data set of a split. The first process to arrive copies it into the cache while the others wait."""
    import datasets

    try:
        with quiet_datasets():
            if builder.name != "webdataset":
                builder.download_and_prepare()
                return builder.as_dataset(split=split)
            # The builder of `datasets` requires equal suffixes in all samples, and numeric classes.
            features = datasets.Features({IMAGE: datasets.Image(decode=False), LABEL: datasets.Value("string")})
            given = {
                "files": files_of(builder)[split],
                "columns": (config.image_column, config.label_column),
                # The metadata are modification times or hashes of the files.
                "state": (TAR_VERSION, builder.config.data_files[split].origin_metadata),
            }
            return datasets.Dataset.from_generator(tar_table, features=features, gen_kwargs=given)
    except Exception as error:  # anything from a lost network to a full disk; `datasets` wraps our errors
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"data.source: {config.source} cannot be read: {describe_error(error)}") from error


def tar_labels(table: Any, config: DataConfig) -> list[Any] | None:
    """Return the labels of a copied tar; None if there are none. Raises `UserError` if other than the usual ones were
    wanted."""
    labels = [parse_label(label) for label in table[LABEL][:]]
    if any(label is not None for label in labels):
        return labels
    if config.label_column != LABEL:
        raise UserError(f"data.label_column: no sample has .{config.label_column}, or that key in its .json")
    return None


def identify_rows(table: Any, key: str | None, images: Identity) -> Identity:
    """Return what tells rows from one another: the column `data.key`, or without one their `images`."""

    def hash_keys() -> NDArray[np.uint64]:
        cells = table[key][:]
        if None in cells:
            raise UserError(f"data.key: row {cells.index(None)} has nothing in the column {key!r}")
        return hash_names(map(str, cells))

    return images if key is None else Identity("column", hash_keys)


def hash_cells(table: Any, column: str, source: str) -> NDArray[np.uint64]:
    """Return a hash of the encoded image in each row, which `datasets` computes once and keeps in its cache."""
    import datasets

    with quiet_datasets():
        hashed = table.map(
            hash_batch,
            batched=True,
            batch_size=64,
            fn_kwargs={"column": column, "source": source},
            remove_columns=[column],
            features=datasets.Features({HASH: datasets.Value("int64")}),
            desc="hashing images",
        )
    return np.asarray(hashed.with_format("numpy")[HASH][:], np.int64).view(np.uint64)


def hash_batch(batch: dict[str, list[Any]], column: str, source: str) -> dict[str, list[int]]:
    """Return hashes of encoded images, and of the names of those that cannot be read, which decoding reports."""
    found = []
    for value in batch[column]:
        payload = read_payload(value, source)
        try:
            data = read_image_file(payload) if isinstance(payload, Path) else payload
        except ValueError:
            data = str(payload)
        found.append(hash_bytes(data if isinstance(data, bytes) else os.fsencode(str(data))))
    return {HASH: np.array(found, np.uint64).view(np.int64).tolist()}  # Arrow infers signed numbers


def array_type(feature: Any) -> str | None:
    """Return the type of the numbers in a column of arrays or nested lists; None for other columns."""
    import datasets

    lists = (datasets.List, datasets.LargeList)
    if not isinstance(feature, (*lists, datasets.Array2D, datasets.Array3D)):
        return None
    while isinstance(feature, lists):
        feature = feature.feature
    dtype = getattr(feature, "dtype", "")
    return dtype if re.fullmatch(r"u?int\d+|float\d+", dtype) else None


def read_payload(value: dict[str, Any] | None, source: str) -> Payload:
    """Return the encoded image of a table cell, or its file if that belongs to the source."""
    data, path = (value or {}).get("bytes"), (value or {}).get("path")
    if data is not None or not path:
        return data
    return Path(path) if is_own(path, source) else f"names a file outside the data set, {path}"


def tar_table(files: list[str], columns: tuple[str, str | None], state: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a copy of tar files; `datasets` hashes the arguments to find it again in its cache."""
    for sample in chain.from_iterable(read_tar(file, *columns) for file in files):
        label = None if sample["label"] is None else str(sample["label"])
        yield {IMAGE: {"bytes": sample["data"], "path": sample["name"]}, LABEL: label}


# Sequential access, to the files

Sample = dict[str, Any]
"""`name` of the image for messages, `data` (the encoded image, or None), `label` (or None) and, if columns are read,
`cells`, their values by name."""


def read_parquet(
    file: str, image: str, label: str | None, columns: Sequence[str] = (), *, with_images: bool = True
) -> Iterator[Sample]:
    """Yield the rows of a parquet file. with_images: False reads only the other columns. Raises `UserError` for a
    missing column, and errors of pyarrow if it is damaged."""
    import pyarrow.parquet as pq

    with open_file(file) as source:
        table = pq.ParquetFile(source)
        names = table.schema_arrow.names
        needed = {"data.image_column": [image], "data.label_column": [label] if label not in (None, LABEL) else []}
        for setting, some in (needed | {"attributes": columns}).items():
            if absent := [name for name in some if name not in names]:
                raise UserError(f"{setting}: {file} has no column {absent[0]!r}; there are {names}")
        wanted = {*([image] if with_images else []), *(name for name in names if name == label), *columns}
        size = 64 if with_images else 1024
        batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=size, columns=sorted(wanted)))
        rows = chain.from_iterable(batches) if wanted else repeat({}, table.metadata.num_rows)
        for row, values in enumerate(rows):
            value = values.get(image) if with_images else None
            data = value.get("bytes") if isinstance(value, dict) else value
            if data is not None and not isinstance(data, bytes):
                raise UserError(f"data.image_column: {image!r} does not hold images: {str(value)[:100]}")
            yield make_sample(f"{file}: row {row}", data, values.get(label), values, columns)


def make_sample(name: str, data: bytes | None, label: Any, values: dict[str, Any], columns: Sequence[str]) -> Sample:
    cells = {"cells": {column: values.get(column) for column in columns}} if columns else {}
    return {"name": name, "data": data, "label": label, **cells}


def names_in(file: str, column: str | None) -> tuple[str, ...]:
    """Return the class names that a file stores for a column of `ClassLabel`s, or of lists of them, as written by
    `datasets`; empty for other columns and for a tar. Raises `UserError` for an unreadable file."""
    import datasets
    import pyarrow.parquet as pq

    if column is None or url_suffix(file) != ".parquet":
        return ()
    with naming(file), open_file(file) as source:
        feature = datasets.Features.from_arrow_schema(pq.read_schema(source)).get(column)
    return tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Name a shard that cannot be read in a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every file system and pyarrow raise errors of their own types
        raise UserError(f"{file}: cannot be read: {describe_error(error)}") from error


def read_tar(
    file: str, image: str, label: str | None, columns: Sequence[str] = (), *, with_images: bool = True
) -> Iterator[Sample]:
    """Yield the samples of a webdataset file. Neighbouring files in it with the same key, the name up to the first dot,
    form a sample.

    In `0001.jpg, 0001.cls` the image is the file with an image suffix (`image` chooses another one), and the label is
    the content of `.cls`, or `label` in `.json`; other columns are keys of `.json`. with_images: False passes over the
    contents of images. Raises `UserError` for a damaged tar or one without images.
    """
    suffixes = {suffix[1:] for suffix in IMAGE_SUFFIXES} if image == IMAGE else {image.lower()}
    sources = {"json", *([label.lower()] if label else []), *(["cls"] if label == LABEL else [])} if label else set()
    sources |= {"json"} if columns else set()
    number = 0
    try:
        for name, parts in tar_samples(file, suffixes | sources, set() if with_images else suffixes - sources):
            found = sorted(suffixes & set(parts))
            if len(found) > 1:
                raise UserError(f"{file}: {name} has {', '.join(found)}; data.image_column chooses one")
            if found:
                number += 1
                title, facts = f"{file}: {name}.{found[0]}", read_facts(parts)
                yield make_sample(title, parts[found[0]], read_label(parts, facts, label), facts, columns)
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        raise UserError(f"{file}: damaged tar file: {error}") from error
    if not number:
        suffix = "" if image == IMAGE else f" with the suffix .{image} (data.image_column)"
        raise UserError(f"{file}: no images{suffix}")


def tar_samples(
    file: str, suffixes: set[str], skipped: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Yield the key of each sample in a tar, and its files with these suffixes, by suffix; those of the suffixes
    `skipped` are not read. Nothing is extracted to the disk, so malicious paths, links and devices in a tar do no harm.
    Raises `TarError` for a damaged tar."""
    key, parts = "", dict[str, bytes | None]()
    with open_file(file) as source, tarfile.open(fileobj=source, mode="r:", errors="replace") as tar:
        while member := tar.next():
            tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all members
            folder, base = os.path.split(member.name)
            if not member.isreg() or base.startswith("."):
                continue
            stem, _, suffix = base.partition(".")
            if key != (next_key := os.path.join(folder, stem)):
                if parts:
                    yield key, parts
                key, parts = next_key, {}
            if (suffix := suffix.lower()) in suffixes:
                content = None if suffix in skipped or member.size > MAX_FILE else tar.extractfile(member)
                parts[suffix] = content.read() if content else None
        if parts:
            yield key, parts
        source.seek(tar.offset)  # `tarfile` takes a damaged header for the end of the archive
        if source.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no tar header at byte {tar.offset}")


def read_facts(parts: dict[str, bytes | None]) -> dict[str, Any]:
    """Return the object in the `.json` of a sample; empty if it is missing or holds something else."""
    try:
        facts = json.loads(parts.get("json") or b"null")
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def read_label(parts: dict[str, bytes | None], facts: dict[str, Any], column: str | None) -> Any:
    """Return the label of a sample, a whole number or a string, from the suffix `column` or that key of `facts`
    (default: `.cls`); None if it has no label."""
    if column is None:
        return None
    text = parts.get(column.lower()) or (parts.get("cls") if column == LABEL else None)
    if text is not None:
        return parse_label(text.decode("utf-8", "replace").strip() or None)
    value = facts.get(column, facts.get("cls") if column == LABEL else None)
    return value if isinstance(value, (int, str)) else None


def parse_label(text: str | None) -> Any:
    return int(text) if text is not None and re.fullmatch(r"-?\d{1,18}", text) else text


def open_file(file: str) -> BinaryIO:
    """Open a local or remote file; lost connections are retried. Raises `OSError`."""
    from datasets.utils.file_utils import xopen

    opened: BinaryIO = xopen(file, "rb")
    return opened
