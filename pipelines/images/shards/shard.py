"""A shard of images: a file in blocks, its index, and reads that are retried."""

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

from tokenizer.files import one_line

from ...config import UserError
from ..stamps import FileChanged, size_and_dates, stamp_told

VERSION = 1  # of the index
RETRIES = 4  # of a read from a server
FIRST_PAUSE = 1.0  # seconds before the first retry; each pause is twice the one before
MAX_NAME = 200  # characters of a name inside a shard that messages show
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One file. `files` is the fsspec file system of a server, None for this machine; `stamp` changes when the file
    does."""

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
        """The file, opened for reading. From a server each read fetches `ahead` bytes more than it asks for."""
        if self.files is None:
            return open(self.path, "rb")
        options: dict[str, Any] = {"cache_type": "readahead", "block_size": ahead} if ahead else {"cache_type": "none"}
        return self.files.open(self.path, "rb", **options)

    @contextmanager
    def reading(self, ahead: int = 0) -> Iterator[BinaryIO]:
        """The open file, see `open`. Raises `FileChanged` unless it is the one that was found, at the beginning of the
        block and at its end, whether or not what was read made sense."""
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

        Over http each answer was checked already, and a commit on the Hub does not change. Other servers (s3, gs, az)
        are asked for the file's headers after each block; a change that is undone meanwhile goes unnoticed.
        """
        if self.files is None:
            found = size_and_dates(os.fstat(file.fileno()))
        elif self.url.startswith("http") or is_commit(self.url):
            return
        else:
            self.files.invalidate_cache(self.path)  # all of them keep listings, and each asks anew in its own way
            info = self.files.info(self.path, refresh=True)
            found = int(info["size"]), stamp_told(info, self.url)
        if found != (self.size, self.stamp):
            raise FileChanged(self.name)


@dataclass(frozen=True)
class Index:
    """What is in a shard. Block `k` holds the rows from `starts[k]` to `starts[k + 1]` and takes `weights[k]` bytes.

    In a tar, image `row` is the `sizes[row]` bytes from `offsets[row]`, and `names` are all names, one a line.
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


class Unable(OSError):
    """A server does not do what reading a file in parts takes."""


def attempt(shard: Shard, read: Callable[[], T]) -> T:
    """What `read` returns; a read from a server is retried a few times. Raises `UserError`, which names the shard."""
    for number in range(RETRIES + 1):
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # each file system has errors of its own, and so has pyarrow
            if shard.files is None or number == RETRIES or not may_pass(error):
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(one_line(f"{shard.name}: cannot be read: {reason}")) from error
            time.sleep(FIRST_PAUSE * 2**number)
    raise AssertionError("unreachable")


def may_pass(error: Exception) -> bool:
    """Whether a failed request is worth a retry: not if the server says that the fault is ours, cannot do what we ask
    of it, or leads to what is no web server (`ValueError`, of aiohttp)."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if status is None:
        status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    return not isinstance(error, (FileNotFoundError, PermissionError, ValueError, Unable))


def printable(name: str) -> str:
    """A name in a shard, safe to print: anybody may have written anything there."""
    shown = name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return shown if len(shown) <= MAX_NAME else shown[: MAX_NAME - 3] + "..."


def lines_of(names: list[str]) -> NDArray[np.uint8]:
    """Names as the bytes of lines, which take a tenth of the memory of strings."""
    text = "".join(f"{printable(name)}\n" for name in names)
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)


def is_commit(url: str) -> bool:
    """Whether a URL names a commit on the Hub, whose files never change."""
    return re.match(r"hf://[^@]*@[0-9a-f]{40}/", url) is not None
