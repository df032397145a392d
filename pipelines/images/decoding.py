"""Splits of a source, still encoded, and decoding all of their images in threads."""

from __future__ import annotations

import hashlib
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tokenizer.spec import ImageSpec, ValueType

from ..config import is_first_process
from .formats import Payload, Pixels, good_values, try_decode

CHUNK = 64  # images that a thread reads and decodes at a time
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that read and decode, mostly without holding the GIL."""
IMAGE, LABEL = "image", "label"  # default columns


def hash_bytes(data: bytes) -> int:
    """Return a hash below 2^64."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def hash_names(names: Iterable[str]) -> NDArray[np.uint64]:
    """Return the hash of each name."""
    known: dict[str, int] = {}
    for name in (names := list(names)):
        if name not in known:
            known[name] = hash_bytes(unicodedata.normalize("NFC", name).encode("utf-8", "surrogatepass"))
    return np.fromiter((known[name] for name in names), np.uint64, len(names))


class Identity(NamedTuple):
    """What an image without a path, or a shard (by its path), is known by, and the function that returns a hash of it
    for every row."""

    by: Literal["column", "bytes", "pixels", "path"]
    hashes: Callable[[], NDArray[np.uint64]]


@dataclass(frozen=True)
class Rows:
    """One split of a source, still encoded. `read` returns the payloads of rows, `name` the name of a row for messages.
    `labels` are the source's own: indices into `class_names`, if it has class names. `paths` are those of image files,
    `table` is the data set of `datasets` with all columns. `objects` are those in the column `data.group`, and
    `identity` tells images without paths from one another."""

    size: int
    read: Callable[[Sequence[int]], list[Payload]]
    name: Callable[[int], str]
    labels: list[Any] | None
    class_names: list[str] | None = None
    paths: list[str] | None = None
    table: Any = None
    objects: list[str] | None = None
    identity: Identity | None = None


SplitRows = dict[str, Callable[[], Rows]]
"""The splits of a source by name; a call opens the split."""


class BadImage(NamedTuple):
    """An image that cannot be decoded: its path or name, its row in the split, and the reason."""

    path: str
    row: int
    reason: str


@dataclass(frozen=True)
class Decoded:
    """The good images of a split (rows, and pixels (n, C, H, W) if held in memory) and the bad ones."""

    positions: NDArray[np.int64]
    pixels: Tensor | None
    bad: list[BadImage]


def decode_all(
    rows: Rows,
    positions: NDArray[np.int64],
    spec: ImageSpec,
    room: int,
    together: bool = False,
) -> Decoded:
    """Decode the images at `positions`; keep the pixels if they fit in `room` bytes, and list bad images.

    together: all processes call this with the same arguments. If pixels are not kept, each process checks a share.
    """
    keep = len(positions) * int(np.prod(spec.shape)) * spec.stored_type.itemsize <= room
    share = together and not keep and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    store = np.empty((len(positions) if keep else 0, *spec.shape), dtype=spec.stored_type)
    starts = range(rank * CHUNK, len(positions), world * CHUNK)
    chunks = [positions[start : start + CHUNK].tolist() for start in starts]
    found: list[tuple[int, BadImage]] = []
    hidden = not sys.stderr.isatty() or not is_first_process()
    bar = tqdm(total=sum(map(len, chunks)), desc="checking images", unit="image", leave=False, disable=hidden)
    with bar, ThreadPoolExecutor(WORKERS) as pool:
        for start, images in zip(starts, pool.map(lambda chunk: decode_rows(rows, spec, chunk), chunks), strict=True):
            for k, image in enumerate(images, start=start):
                if isinstance(image, str):
                    row = int(positions[k])
                    found.append((k, BadImage(rows.name(row), row, image)))
                elif keep:
                    store[k] = image
            bar.update(len(images))
    if share:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, found)
        found = sorted(chain.from_iterable(parts))
    good = np.ones(len(positions), dtype=bool)
    good[[k for k, _ in found]] = False
    if found and keep:
        store = store[good]
    return Decoded(positions[good], torch.from_numpy(store) if keep else None, [bad for _, bad in found])


def decode_rows(rows: Rows, spec: ImageSpec, indices: list[int]) -> list[Pixels | str]:
    """Return the pixels `spec.shape` of each row, or the reason why it cannot be decoded."""
    return [try_decode(payload, spec) for payload in rows.read(indices)]


def decode_in_threads(payloads: Sequence[Payload], spec: ImageSpec) -> list[Pixels | str]:
    """Return the pixels `spec.shape` of each encoded image, or the reason why it cannot be decoded."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(partial(try_decode, spec=spec), payloads))


def measure_range(
    rows: Rows, positions: NDArray[np.int64], channels: int, dtype: ValueType
) -> tuple[float, float] | None:
    """Return the smallest and the largest value of the images or clips at `positions` that have this type; None without
    any."""

    def bounds(chunk: list[int]) -> list[tuple[float, float]]:
        arrays = (good_values(payload, channels, dtype) for payload in rows.read(chunk))
        return [(float(array.min()), float(array.max())) for array in arrays if array is not None]

    chunks = [positions[start : start + CHUNK].tolist() for start in range(0, len(positions), CHUNK)]
    with ThreadPoolExecutor(WORKERS) as pool:
        found = [pair for pairs in pool.map(bounds, chunks) for pair in pairs]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None
