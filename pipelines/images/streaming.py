"""Images that do not fit on the disk: shards (parquet, .tar) read in sequence from files, URLs or the Hub.

`datasets` shuffles the shards, shuffles images in a buffer of `data.shuffle_window`, and gives each process its part.
Shuffling is approximate, and a resumed run does not repeat the order. Whole shards are held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ..config import UserError, is_first_process, tell
from .checking import BadImage, list_bad
from .classes import WITHOUT
from .dataset import Epochs, ImageDataset, Indices
from .formats import Payload, decode_in_threads
from .settings import DataConfig, require_plain_data
from .sources import Identity, Source, hash_names
from .splits import MOST, Division, Inherited, SplitPart, divide_images, name_shards, require_single_images
from .tables import Sample, files_of, find_tables, names_in, naming, read_parquet, read_tar, url_suffix

FEW = 1000  # bad images are limited as if at least this many were read
MIXED = 2000  # size of the shuffle buffer for splits held in memory


def open_streamed_splits(
    config: DataConfig, stream: bool, inherited: Inherited | None = None
) -> tuple[Division, StreamedImages]:
    """Return up to 2,000 images of each split (with `stream`, except the training split), and the stream of training
    images. inherited: the division of training. Raises `UserError`."""
    if config.crop is not None:
        raise UserError("data.crop: needs random access; data.streaming=false copies the images to the disk")
    shards = divide_files(config, inherited)
    files = {name: [part.source.name(k) for k in part.positions.tolist()] for name, part in shards.parts.items()}
    classes = names_in(files["train"][0], config.label_column)
    for part in files.values():  # the other shards are checked when they are read
        require_same_classes(part[0], classes, config)
    if is_first_process():
        tell(
            "data.streaming: shuffling is approximate, and a resumed run does not repeat the order; evaluation uses at "
            f"most {MOST:,} images of a split{'' if stream else ', including train'}"
        )
    parts = dict[str, SplitPart]()
    for name in files:
        if name != "train" or not stream:
            some = read_some(files[name], config, classes)
            parts[name] = SplitPart(some, np.arange(some.size), np.arange(some.size, dtype=np.uint64))
    return replace(shards, parts=parts), StreamedImages(config, files["train"])


def divide_files(config: DataConfig, inherited: Inherited | None = None) -> Division:
    """Divide the shards into `train`, `held_out` and, if any, `validation`. Raises `UserError` for shards of other
    formats, if there are too few shards to hold one out, and for settings that streams do not follow."""
    require_single_images(config)
    require_plain_data(config)
    splits = files_of(find_tables(config))
    if not splits:
        raise UserError(f"data.streaming: {config.source} is unreachable; data.streaming=false reads the cached copy")
    if config.key is not None:
        raise UserError("data.key: with data.streaming, whole shards are held out; set one of them to null or false")

    def open_split(files: list[str]) -> Source:
        if strange := [file for file in sorted(files) if url_suffix(file) not in (".parquet", ".tar")]:
            raise UserError(f"data.source: {strange[0]}: data.streaming reads only .parquet and .tar; set it to false")
        identity = Identity("path", lambda: hash_names(name_shards(sorted(files), config)))
        return Source(len(files), lambda rows: [], sorted(files).__getitem__, identity=identity)

    return divide_images({name: partial(open_split, files) for name, files in splits.items()}, config, inherited)


def read_shards(
    files: Sequence[str],
    config: DataConfig,
    classes: tuple[str, ...] | None = None,
    columns: Sequence[str] = (),
    *,
    with_images: bool = True,
) -> Iterator[Sample]:
    """Yield the encoded images of shards in order, with the cells of these columns. with_images: False reads only the
    columns. Raises `UserError` for a shard that cannot be read, or whose classes are not `classes`, if given (a tuple,
    because `datasets` would split a list among processes)."""
    for file in files:
        read = read_tar if url_suffix(file) == ".tar" else read_parquet
        if classes is not None:
            require_same_classes(file, classes, config)
        with naming(file):
            yield from read(file, config.image_column, config.label_column, columns, with_images=with_images)


def require_same_classes(file: str, classes: tuple[str, ...], config: DataConfig) -> None:
    if names_in(file, config.label_column) != classes:
        raise UserError(f"data.label_column: {file} and the first shard have different classes; {WITHOUT}")


def shuffle_images(
    files: list[str], config: DataConfig, seed: int, window: int, classes: tuple[str, ...] | None = None
) -> Any:
    """Return a shuffled `IterableDataset` of the encoded images of shards; see `read_shards`."""
    import datasets

    options = {"files": files, "config": config, "classes": classes}
    images = datasets.IterableDataset.from_generator(read_shards, gen_kwargs=options)
    images = images if config.limit is None else images.take(config.limit)
    return images.shuffle(seed=seed, buffer_size=window)


def read_some(files: list[str], config: DataConfig, classes: tuple[str, ...]) -> Source:
    """Return up to 2,000 images of shards, in memory. Raises `UserError` without any."""
    names, labels, payloads = list[str](), list[Any](), list[Payload]()
    images = islice(shuffle_images(files, config, 0, MIXED, classes), MOST)
    while chunk := list(islice(images, 256)):
        decoded = decode_in_threads([image["data"] for image in chunk], config.spec)
        payloads += [i if isinstance(i, str) else np.ascontiguousarray(i.transpose(1, 2, 0).squeeze()) for i in decoded]
        names += [image["name"] for image in chunk]
        labels += [image["label"] for image in chunk]
    if not names:
        raise UserError(f"data.source: {config.source}: no images in {files[0]}")
    some = None if all(label is None for label in labels) else labels
    return Source(
        len(names), lambda rows: [payloads[row] for row in rows], names.__getitem__, some, list(classes) or None
    )


class StreamedImages(ImageDataset):
    """A stream of training images: indices are positions in the stream, and each process takes its own next images. Bad
    images end the run, or are skipped and counted.

    Attributes: `bad`, the images skipped by this process; `labels` is None.
    """

    def __init__(self, config: DataConfig, files: list[str]) -> None:
        nothing = SplitPart(Source(0, lambda rows: [], str), np.empty(0, np.int64), np.empty(0, np.uint64))
        super().__init__(config, nothing)
        self._files = files
        self._stream: Iterator[dict[str, Any]] | None = None
        self._next, self._seen, self._skipped = 0, 0, 0
        self._bad_names = set[str]()  # images recur in each epoch, but are listed once

    def __len__(self) -> int:
        raise UserError("data.streaming: the number of images is unknown; data.streaming=false copies them")

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the positions of one step's global batch, and zeros for the epochs."""
        if self._stream is None:
            self._stream = self._images(seed + step)
        positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
        return positions, np.zeros_like(positions)

    def examples(self, count: int, seed: int) -> Tensor:
        """Return the first `count` images of the stream; training sees them again."""
        stream = iter(shuffle_images(self._files, self.config, seed, min(self.config.shuffle_window, count)))
        return self.prepare(self._take(stream, count))

    def names(self, indices: Indices) -> list[str]:
        raise self._access_error()

    def _rows_of(self, indices: Indices) -> NDArray[np.int64]:
        return np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)

    def _read(self, rows: NDArray[np.int64], epochs: Epochs, seed: int) -> Tensor:
        """Return this process's next images. Raises `UserError` for positions that do not increase."""
        if not len(rows) or self._stream is None or rows[0] < self._next or (np.diff(rows) <= 0).any():
            raise self._access_error()
        self._next = int(rows[-1]) + 1
        return self._take(self._stream, len(rows))

    def _images(self, seed: int) -> Iterator[dict[str, Any]]:
        """Yield this process's images endlessly, in a new order each epoch."""
        from datasets.distributed import split_dataset_by_node

        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        images = shuffle_images(self._files, self.config, seed, self.config.shuffle_window)
        images = split_dataset_by_node(images, rank, world)
        for epoch in count():
            images.set_epoch(epoch)
            empty = True
            for image in images:
                yield image
                empty = False
            if empty:
                raise UserError(f"data.streaming: {self.config.source} has fewer images to train on than processes")

    def _take(self, stream: Iterator[dict[str, Any]], count: int) -> Tensor:
        """Return the next good images of a stream, uint8 (count, C, H, W), or fewer at its end."""
        good = list[NDArray[np.uint8]]()
        while len(good) < count and (chunk := list(islice(stream, count - len(good)))):
            images = decode_in_threads([example["data"] for example in chunk], self.spec)
            for image, example in zip(images, chunk, strict=True):
                self._seen += 1
                if isinstance(image, str):
                    self._skip(example["name"], image)
                else:
                    good.append(image)
        if not good:
            raise UserError(f"data.source: {self.config.source}: none of the training images can be decoded")
        return torch.from_numpy(np.stack(good))

    def _skip(self, name: str, reason: str) -> None:
        """Count a bad image. Raises `UserError` if it may not be skipped, and for too many bad images."""
        if self.config.on_error == "fail":
            raise UserError(f"{name}: {reason} (data.on_error=skip skips such images)")
        if not self.bad:
            tell(f"warning: {name}: {reason}; such images are skipped")
        if name not in self._bad_names:
            self._bad_names.add(name)
            self.bad.append(BadImage(name, self._seen - 1, reason))
        self._skipped += 1
        allowed = self.config.max_bad_fraction
        if self._skipped > allowed * max(FEW, self._seen) and allowed < 1:
            counted = f"{self._skipped} of {self._seen} images so far cannot be decoded"
            raise UserError(f"{counted}, more than data.max_bad_fraction={allowed} allows:", *list_bad(self.bad))

    def _access_error(self) -> UserError:
        return UserError(
            "data.streaming: images are read in sequence, each once, and cannot be indexed; data.streaming=false "
            "copies them for random access"
        )
