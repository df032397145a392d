"""Images in shards, parquet or tar, here or on a server: an index of each, and reading rows a block at a time.

A block is what is read in one go: a row group of a parquet file, or neighbouring samples of a tar. The index of a shard
says how many rows it has, what its blocks are and what its labels are; it is made once, from footers or headers, and
kept in `HF_HOME/smalti/shards`, under a name made of the shard's path, size and dates or ETag.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from huggingface_hub import constants
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from .config import UserError
from .sources import WORKERS, DataConfig, Payload, Rows, show_progress
from .stamps import FileChanged, size_and_dates, stamp_told

VERSION = 1  # of the index
RETRIES, FIRST_PAUSE = 4, 1.0  # of a read from a server; the pauses double
MAX_NAME = 200  # characters of a name inside a shard that are told

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One file. `files` is the fsspec file system of a server, None for this machine; `stamp` changes when it does."""

    path: str
    size: int
    stamp: str = ""
    files: Any = None
    url: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.url or self.path

    @property
    def is_tar(self) -> bool:
        return self.path.endswith(".tar")

    def open(self, ahead: int = 0) -> BinaryIO:
        """To be read; from a server what is asked for, and `ahead` bytes more each time."""
        if self.files is None:
            return open(self.path, "rb")
        options: dict[str, Any] = {"cache_type": "readahead", "block_size": ahead} if ahead else {"cache_type": "none"}
        return self.files.open(self.path, "rb", **options)

    @contextmanager
    def reading(self, ahead: int = 0) -> Iterator[BinaryIO]:
        """The open file, see `open`. Raises `FileChanged` unless it is the one that was found, at the beginning of the
        block and at its end, whether what was read in it made sense or not."""
        with self.open(ahead) as file:
            if self.files is None:
                self.check(file)
            try:
                yield file
            except Exception:
                self.check(file)
                raise
            self.check(file)

    def check(self, file: BinaryIO) -> None:
        """Raise `FileChanged` if the file is another one by now.

        Over http that was seen in each answer, and a commit on the Hub does not change. Other servers (s3, gs, az) are
        asked once more after each block, which is a request for its headers; what is changed, and back, is not told.
        """
        if self.files is None:
            found = size_and_dates(os.fstat(file.fileno()))
        elif self.url.startswith("http") or is_commit(self.url):
            return
        else:
            self.files.invalidate_cache(self.path)  # each of them keeps listings, and has another way to ask anew
            info = self.files.info(self.path, refresh=True)
            found = int(info["size"]), stamp_told(info, self.url)
        if found != (self.size, self.stamp):
            raise FileChanged(self.name)


@dataclass(frozen=True)
class Index:
    """What is in a shard. Block `k` holds the rows from `starts[k]` to `starts[k + 1]` and takes `weights[k]` bytes.

    Of a tar's image `row`, the `sizes[row]` bytes begin at `offsets[row]`. `names` are its names, each on a line.
    """

    starts: NDArray[np.int64]
    weights: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    names: NDArray[np.uint8]
    labels: list[Any] | None
    class_names: list[str] | None

    @property
    def rows(self) -> int:
        return int(self.starts[-1])


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
    """Rows by their numbers, through a cache of the blocks that were read last, `data.cache_mb` of them."""

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
        """(shard and row, encoded image or the reason why there is none) of each row asked for."""
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
        return f"{shard.name}: {line.tobytes().decode()}"

    def fetch(self, numbers: list[int]) -> dict[int, list[Payload]]:
        """Blocks by number, from the cache or read at the same time."""
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
        """Read a block and keep it, in place of the ones that were not asked for longest."""
        owner = int(self.owners[number])
        shard, index = self.shards[owner], self.indices[owner]
        block = int(np.searchsorted(index.starts, self.blocks[number] - self.firsts[owner], side="right")) - 1
        payloads = attempt(shard, partial(format_of(shard).read_block, shard, index, block, self.column))
        with self.lock:
            self.cache[number] = payloads
            while len(self.cache) > 1 and int(self.weights[list(self.cache)].sum()) > self.room:
                self.cache.popitem(last=False)
        return payloads


def is_commit(url: str) -> bool:
    """Whether a URL names a commit on the Hub, whose files stay as they are."""
    return re.match(r"hf://[^@]*@[0-9a-f]{40}/", url) is not None


def format_of(shard: Shard) -> Any:
    """The module that reads this kind of file."""
    from . import parquet_shards, tar_shards

    return tar_shards if shard.is_tar else parquet_shards


def attempt(shard: Shard, read: Callable[[], T]) -> T:
    """What `read` returns; from a server it is tried again a few times. Raises `UserError` naming the shard."""
    for number in range(RETRIES + 1):
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # each file system and pyarrow have their own
            if shard.files is None or number == RETRIES or not may_pass(error):
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(f"{shard.name}: can not be read: {reason}") from error
            time.sleep(FIRST_PAUSE * 2**number)
    raise AssertionError("unreachable")


def may_pass(error: Exception) -> bool:
    """Whether a failed request is worth another one: not if a server says that the fault is ours."""
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    return not isinstance(error, (FileNotFoundError, PermissionError))


# the index ----------------------------------------------------------------------------------------


def index_all(shards: list[Shard], config: DataConfig) -> list[Index]:
    """The index of each shard, kept or made now. Processes begin at different shards, and find each other's work."""
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
    """The kept index of this very file, or a new one, which is kept if the file has a stamp."""
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
    """The index in a file, or None if there is none that can be read."""
    try:
        arrays = load_file(path)
        facts = json.loads(arrays.pop("facts").tobytes())
        return Index(**arrays, labels=facts["labels"], class_names=facts["class_names"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def save_index(path: Path, index: Index) -> None:
    """Write an index that appears whole or not at all; where it can not be written, it is made again next time."""
    facts = json.dumps({"labels": index.labels, "class_names": index.class_names}).encode()
    arrays = {
        name: np.ascontiguousarray(getattr(index, name)) for name in ("starts", "weights", "offsets", "sizes", "names")
    }
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({**arrays, "facts": np.frombuffer(facts, np.uint8)}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


# names --------------------------------------------------------------------------------------------


def printable(name: str) -> str:
    """A name out of a shard, safe to print: it is anything that somebody wrote there."""
    shown = name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return shown if len(shown) <= MAX_NAME else shown[: MAX_NAME - 3] + "..."


def lines_of(names: list[str]) -> NDArray[np.uint8]:
    """Names as the bytes of lines, which take a tenth of the memory of strings."""
    text = "".join(f"{printable(name)}\n" for name in names)
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
