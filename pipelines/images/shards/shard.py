"""A shard of images: a file in blocks, its index, and reading that is tried again."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...config import UserError
from ..stamps import FileChanged, size_and_dates, stamp_told

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
    told = [getattr(error, name, None) for name in ("status", "code")]
    status = told[0] or told[1] or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    return not isinstance(error, (FileNotFoundError, PermissionError))


def printable(name: str) -> str:
    """A name out of a shard, safe to print: it is anything that somebody wrote there."""
    shown = name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return shown if len(shown) <= MAX_NAME else shown[: MAX_NAME - 3] + "..."


def lines_of(names: list[str]) -> NDArray[np.uint8]:
    """Names as the bytes of lines, which take a tenth of the memory of strings."""
    text = "".join(f"{printable(name)}\n" for name in names)
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)


def is_commit(url: str) -> bool:
    """Whether a URL names a commit on the Hub, whose files stay as they are."""
    return re.match(r"hf://[^@]*@[0-9a-f]{40}/", url) is not None
