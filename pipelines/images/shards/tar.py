"""Images in tar files, as webdataset lays them out: neighbouring files with one key, up to the first dot, are a sample.

In a sample `0001.jpg, 0001.cls` the image is the file with the suffix of one (`data.image_column` chooses another
suffix), and the label is the content of `.cls`, or `data.label_column` of `.json`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any, BinaryIO

import numpy as np

from ...config import UserError
from ..base import MAX_FILE, DataConfig, Payload
from ..folders import SUFFIXES
from ..stamps import FileChanged
from .shard import Index, Shard, lines_of, printable
from .tar_index import Member, TarError, scan

BLOCK_BYTES = 4 << 20  # read at once; more only for an image that is larger
SCAN_AHEAD = 4 << 20  # read at a time from a server, where indexing reads a whole tar once
MAX_LABEL = 1 << 20  # bytes
IMAGE = "image"  # the default of `data.image_column`
LABEL = "label"  # the default of `data.label_column`

Sample = tuple[Member, Any]


def make_index(shard: Shard, config: DataConfig) -> Index:
    """Offsets, names and labels of the images. Raises `UserError` for a tar that is damaged or has no images."""
    try:
        with shard.reading(SCAN_AHEAD) as file:
            samples = list(samples_of(file, shard, config))
    except TarError as error:
        raise UserError(f"{shard.name}: not a whole tar file: {error}") from error
    if not samples:
        raise UserError(
            f"{shard.name}: no images in it"
            + ("" if config.image_column == IMAGE else f" with the suffix .{config.image_column} (data.image_column)")
        )
    offsets, sizes = (np.array([getattr(m, name) for m, _ in samples], np.int64) for name in ("offset", "size"))
    starts = block_starts(offsets, sizes)
    ends = (offsets + sizes)[starts[1:] - 1]
    labels: list[Any] | None = [label for _, label in samples]
    if all(label is None for label in labels or []):
        labels = None
        if config.label_column not in (None, LABEL):
            raise UserError(f"data.label_column: no sample of {shard.name} has .{config.label_column}, or it in .json")
    names = lines_of([member.name for member, _ in samples])
    return Index(starts, ends - offsets[starts[:-1]], offsets, sizes, names, labels, None)


def read_block(shard: Shard, index: Index, block: int, column: str) -> list[Payload]:
    """The encoded images of neighbouring samples, read at once. Raises `OSError`, or `FileChanged`."""
    first, end = int(index.starts[block]), int(index.starts[block + 1])
    if end - first == 1 and index.sizes[first] > MAX_FILE:
        return [f"a file of {index.sizes[first]} bytes; the limit is {MAX_FILE}"]
    offsets, sizes = index.offsets[first:end].tolist(), index.sizes[first:end].tolist()
    begin, size = offsets[0], offsets[-1] + sizes[-1] - offsets[0]
    with shard.reading() as file:
        file.seek(begin)
        data = file.read(size)
    if len(data) != size:
        raise FileChanged(shard.name)
    return [data[offset - begin : offset - begin + size] for offset, size in zip(offsets, sizes, strict=True)]


def block_starts(offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The first image of each block, and the end. A block holds as many neighbours as fit; an image that is too large
    to be read has one of its own."""
    starts = [0]
    for row in range(1, len(offsets)):
        too_large = sizes[row] > MAX_FILE or sizes[row - 1] > MAX_FILE
        if too_large or offsets[row] + sizes[row] - offsets[starts[-1]] > BLOCK_BYTES:
            starts.append(row)
    return np.array([*starts, len(offsets)], np.int64)


def samples_of(file: BinaryIO, shard: Shard, config: DataConfig) -> Iterator[Sample]:
    """(image, label or None) of each sample that has an image."""
    for key, members in groupby(scan(file, shard.size), lambda member: split_name(member.name)[0]):
        parts: dict[str, Member] = {}
        for member in members:
            suffix = split_name(member.name)[1]
            if len(parts) < 100 and not os.path.basename(member.name).startswith("."):
                parts[suffix] = member
        wanted = config.image_column.lower()
        found = [suffix for suffix in parts if (f".{suffix}" in SUFFIXES if wanted == IMAGE else suffix == wanted)]
        if len(found) > 1:
            raise UserError(
                f"{shard.name}: {printable(key)} has the images {', '.join(sorted(found))}; data.image_column "
                "chooses one"
            )
        if found:
            yield parts[found[0]], label_of(file, parts, config)


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix: `a/b.seg.png` is `a/b` and `seg.png`."""
    folder, base = os.path.split(name)
    key, _, suffix = base.partition(".")
    return f"{folder}/{key}" if folder else key, suffix.lower()


def label_of(file: BinaryIO, parts: dict[str, Member], config: DataConfig) -> Any:
    """The content of `.cls`, or what `label_column` names, a suffix or a key of `.json`: a whole number or a string; or
    None."""
    column = config.label_column
    if column is None:
        return None
    member = parts.get(column.lower()) or (parts.get("cls") if column == LABEL else None)
    if member is not None:
        text = read_text(file, member).strip()
        return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text or None
    if "json" not in parts:
        return None
    try:
        facts = json.loads(read_text(file, parts["json"]))
    except (ValueError, RecursionError):
        return None
    value = facts.get(column, facts.get("cls") if column == LABEL else None) if isinstance(facts, dict) else None
    return value if isinstance(value, (int, str)) else None


def read_text(file: BinaryIO, member: Member) -> str:
    """The text of a small file in the tar; "" for a large one."""
    if member.size > MAX_LABEL:
        return ""
    file.seek(member.offset)
    return file.read(member.size).decode("utf-8", "replace")
