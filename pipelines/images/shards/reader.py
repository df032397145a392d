"""Images in shards, parquet or tar, here or on a server: an index of each, and rows, read a block at a time.

A block is read at once: it is a row group of a parquet file, or neighbouring samples of a tar. The index of a shard
holds its number of rows, its blocks and its labels; it is made once, from the footer or the headers, and kept in
`HF_HOME/smalti/shards`, under a name made from the shard's path, size and dates or ETag.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from tokenizer.files import fsync

from ...config import UserError
from ..base import WORKERS, DataConfig, Payload, Rows, show_progress
from .shard import VERSION, Index, Shard, attempt


def shard_rows(shards: list[Shard], config: DataConfig) -> Rows:
    """The rows of one split, in the order of the shards. Raises `UserError` for a shard that is damaged."""
    indices = index_all(shards, config)
    class_names = indices[0].class_names
    for shard, index in zip(shards, indices, strict=True):
        if index.class_names != class_names:
            raise UserError(f"{shard.name}: its classes are other than those of {shards[0].name}")
    known = [index.labels for index in indices]
    labels = [label for part in known for label in part or []] if all(part is not None for part in known) else None
    if labels is None and any(part is not None for part in known):
        without = shards[known.index(None)]
        raise UserError(f"data.label_column: {without.name} has no labels, though others have; null uses none")
    reader = ShardReader(shards, indices, config)
    return Rows(int(reader.firsts[-1]), reader.read, labels, class_names, reader.blocks, reader.row_bytes)


class ShardReader:
    """Rows by number, through a cache of the blocks that were read last, `data.cache_mb` MiB of them."""

    def __init__(self, shards: list[Shard], indices: list[Index], config: DataConfig) -> None:
        self.shards, self.indices, self.column = shards, indices, config.image_column
        self.firsts = np.cumsum([0, *(index.rows for index in indices)])
        starts = [first + index.starts[:-1] for first, index in zip(self.firsts, indices, strict=False)]
        self.blocks = np.concatenate([*starts, self.firsts[-1:]])
        self.owners = np.repeat(np.arange(len(shards)), [len(index.weights) for index in indices])
        self.weights = np.concatenate([index.weights for index in indices])
        self.row_bytes = float(self.weights.sum() / max(1, self.firsts[-1]))
        self.room = config.cache_mb * 2**20
        self.cache: OrderedDict[int, list[Payload]] = OrderedDict()
        self.lock = threading.Lock()
        self.line_ends: dict[int, NDArray[np.int64]] = {}

    def read(self, rows: Sequence[int]) -> list[tuple[str, Payload]]:
        """For each row: its name, see `name_of`, and the encoded image or the reason why there is none."""
        wanted = np.asarray(rows, dtype=np.int64)
        numbers = np.searchsorted(self.blocks, wanted, side="right") - 1
        blocks = self.fetch(np.unique(numbers).tolist())
        return [
            (self.name_of(row), blocks[number][row - int(self.blocks[number])])
            for row, number in zip(wanted.tolist(), numbers.tolist(), strict=True)
        ]

    def name_of(self, row: int) -> str:
        """`shard.tar: name`, or `shard.parquet: row 12`."""
        owner = int(np.searchsorted(self.firsts, row, side="right")) - 1
        shard, index, place = self.shards[owner], self.indices[owner], row - int(self.firsts[owner])
        if not shard.is_tar:
            return f"{shard.name}: row {place}"
        if owner not in self.line_ends:
            self.line_ends[owner] = np.flatnonzero(index.names == ord("\n"))
        ends = self.line_ends[owner]
        line = index.names[ends[place - 1] + 1 if place else 0 : ends[place]]
        return f"{shard.name}: {line.tobytes().decode(errors='replace')}"

    def fetch(self, numbers: list[int]) -> dict[int, list[Payload]]:
        """Blocks by number, from the cache or read in parallel."""
        with self.lock:
            found = {number: self.cache[number] for number in numbers if number in self.cache}
            for number in found:
                self.cache.move_to_end(number)
        missing = [number for number in numbers if number not in found]
        if len(missing) == 1:
            found[missing[0]] = self.load(missing[0])
        elif missing:
            with ThreadPoolExecutor(WORKERS) as pool:
                found |= dict(zip(missing, pool.map(self.load, missing), strict=True))
        return found

    def load(self, number: int) -> list[Payload]:
        """Read a block and keep it in place of those that were used least recently."""
        owner = int(self.owners[number])
        shard, index = self.shards[owner], self.indices[owner]
        block = int(np.searchsorted(index.starts, self.blocks[number] - self.firsts[owner], side="right")) - 1
        payloads = attempt(shard, partial(format_of(shard).read_block, shard, index, block, self.column))
        with self.lock:
            self.cache[number] = payloads
            while len(self.cache) > 1 and int(self.weights[list(self.cache)].sum()) > self.room:
                self.cache.popitem(last=False)
        return payloads


def format_of(shard: Shard) -> Any:
    """The module that reads this kind of file."""
    from . import parquet as parquet_shards
    from . import tar as tar_shards

    return tar_shards if shard.is_tar else parquet_shards


# The index


def index_all(shards: list[Shard], config: DataConfig) -> list[Index]:
    """The index of each shard, kept or made now. Processes begin at different shards, and find what others made."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first = rank * len(shards) // max(1, world)
    order = [*range(first, len(shards)), *range(first)]
    found: dict[int, Index] = {}
    bar = tqdm(total=len(shards), desc="indexing shards", unit="shard", leave=False, disable=not show_progress())
    with bar, ThreadPoolExecutor(WORKERS) as pool:
        for number, index in zip(order, pool.map(lambda k: index_of(shards[k], config), order), strict=True):
            found[number] = index
            bar.update(1)
    return [found[number] for number in range(len(shards))]


def index_of(shard: Shard, config: DataConfig) -> Index:
    """The kept index of this very file, or a new one, which is saved if the file has a stamp."""
    facts = [VERSION, shard.name, shard.size, shard.stamp, config.image_column, config.label_column]
    path = cache_folder() / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"
    if shard.stamp and (kept := load_index(path)):
        return kept
    index = attempt(shard, partial(format_of(shard).make_index, shard, config))
    if shard.stamp:
        save_index(path, index)
    return index


def cache_folder() -> Path:
    """Where indices are kept; `HF_HOME` moves it."""
    return Path(constants.HF_HOME) / "smalti" / "shards"


def load_index(path: Path) -> Index | None:
    """The index in a file, or None for a file that is missing, cannot be read, or is no index."""
    try:
        arrays = load_file(path)
        facts = json.loads(arrays.pop("facts").tobytes())
        index = Index(**arrays, labels=facts["labels"], class_names=facts["class_names"])
        return index if is_whole(index) else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


def is_whole(index: Index) -> bool:
    """Whether the parts of an index fit each other: as many of each as there are rows or blocks, none negative."""
    numbers = (index.starts, index.weights, index.offsets, index.sizes)
    if any(part.ndim != 1 or part.dtype != np.int64 for part in numbers) or index.names.dtype != np.uint8:
        return False
    rows, of_rows = index.rows, (len(index.offsets), len(index.sizes), int((index.names == ord("\n")).sum()))
    return (
        index.starts[0] == 0
        and bool((np.diff(index.starts) >= 0).all())
        and len(index.weights) == len(index.starts) - 1
        and of_rows in ((rows,) * 3, (0,) * 3)
        and all(bool((part >= 0).all()) for part in numbers)
        and (index.labels is None or isinstance(index.labels, list) and len(index.labels) == rows)
        and (index.class_names is None or isinstance(index.class_names, list))
    )


def save_index(path: Path, index: Index) -> None:
    """Write an index, whole or not at all; where it cannot be written, it is made again next time."""
    facts = json.dumps({"labels": index.labels, "class_names": index.class_names}).encode()
    arrays = {
        name: np.ascontiguousarray(getattr(index, name)) for name in ("starts", "weights", "offsets", "sizes", "names")
    }
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({**arrays, "facts": np.frombuffer(facts, np.uint8)}, temporary)
        fsync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
