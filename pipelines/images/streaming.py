"""Images that do not fit on the disk: shards (parquet, .tar) that are read in sequence, from files, URLs or the Hub.

`datasets` shuffles the shards, and images among `data.shuffle_window`, and gives each process its part. The order is
approximate, and a run that is continued does not repeat it. Whole shards are held out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.files import one_line

from ..config import UserError, is_first_process, tell
from .augment import draw_changes
from .dataset import (
    MOST,
    SHARE,
    WITHOUT,
    DataConfig,
    ImageDataset,
    Indices,
    carve,
    choose_held_out,
    list_bad,
    require_split,
    say_splits,
)
from .decoding import BadImage, Decoded, Payload, Rows, decode_in_threads
from .hub import reason_of
from .tables import Sample, classes_in_parquet, files_of, find_tables, read_parquet, read_tar, suffix_of

FEW = 1000  # images before which the share of bad ones does not count
MIXED = 2000  # images among which those in memory are chosen


def open_stream(config: DataConfig, stream: bool) -> tuple[dict[str, Rows], StreamedImages]:
    """Return up to 2,000 images of each split that is not trained on, and without `stream` also of the one that is, and
    the stream of images to train on. Raises `UserError`."""
    files = divide_files(config)
    classes = names_in(files["train"][0], config)
    for part in files.values():  # others are compared as they are read
        require_classes(part[0], classes, config)
    if is_first_process():
        tell(
            "data.streaming: the order of images is approximate, and a run that is continued does not repeat it; "
            f"figures use at most {MOST:,} images of a split{'' if stream else ', of train as well'}"
        )
    parts = {name: read_some(files[name], config, classes) for name in files if name != "train" or not stream}
    return parts, StreamedImages(config, files["train"])


def divide_files(config: DataConfig) -> dict[str, list[str]]:
    """Return the shards of `train`, `held_out` and, if there are any, `validation`, which are divided in a fixed random
    way. Raises `UserError` for shards of other formats, and for too few to hold one out."""
    splits = files_of(find_tables(config))
    if not splits:
        raise UserError(f"data.streaming: {config.source} cannot be reached; data.streaming=false reads the copy of it")
    require_split(splits, config)
    found = choose_held_out(splits, config)
    part = f"{100 * config.held_out_fraction:.3g}% of the shards of {config.split!r}"
    say_splits(splits, config, found, part, "held out")
    files, other = sorted(splits[config.split]), sorted(splits.get(found or "", []))
    if strange := [file for file in [*files, *other] if suffix_of(file) not in (".parquet", ".tar")]:
        raise UserError(f"data.source: {strange[0]}: data.streaming reads .parquet and .tar; false reads others")
    held_out = 0 if found is not None else max(1, round(config.held_out_fraction * len(files)))
    fraction = SHARE if config.validation_fraction is None else config.validation_fraction
    validation = max(round(fraction * len(files)), int(bool(config.validation_fraction)))
    if held_out + validation >= len(files):
        raise UserError(
            f"data.streaming: {config.source} has {len(files)} shards in {config.split!r}, and {held_out + validation} "
            "would be kept from training; make more and smaller ones, or a split 'test'"
        )
    parts = {name: [files[k] for k in part] for name, part in carve(len(files), held_out, validation).items()}
    return {name: part for name, part in {**parts, "held_out": parts["held_out"] or other}.items() if part}


def read_files(files: Sequence[str], config: DataConfig, classes: tuple[str, ...] | None = None) -> Iterator[Sample]:
    """Yield the images of shards in their order, encoded. Raises `UserError` for a shard that cannot be read, and for
    one that names other classes than `classes`, if these are given (a tuple: `datasets` divides lists)."""
    for file in files:
        read = read_tar if suffix_of(file) == ".tar" else read_parquet
        try:
            if classes is not None:
                require_classes(file, classes, config)
            yield from read([file], config.image_column, config.label_column)
        except UserError:
            raise
        except Exception as error:  # each file system has errors of its own, and so has pyarrow
            raise UserError(one_line(f"{file}: cannot be read: {reason_of(error)}")) from error


def names_in(file: str, config: DataConfig) -> tuple[str, ...]:
    """Return the names of the classes that a shard has; none in a tar, and without labels."""
    is_table = config.label_column is not None and suffix_of(file) == ".parquet"
    return tuple(classes_in_parquet(file, config.label_column) or ()) if is_table else ()


def require_classes(file: str, classes: tuple[str, ...], config: DataConfig) -> None:
    """Raise `UserError` for a shard that names other classes."""
    if names_in(file, config) != classes:
        raise UserError(f"data.label_column: {file} has other classes than the first shard; {WITHOUT}")


def shuffled(
    files: list[str], config: DataConfig, seed: int, window: int, classes: tuple[str, ...] | None = None
) -> Any:
    """Return an `IterableDataset` of the images of shards, encoded; see `read_files`."""
    import datasets

    options = {"files": files, "config": config, "classes": classes}
    images = datasets.IterableDataset.from_generator(read_files, gen_kwargs=options)
    images = images if config.limit is None else images.take(config.limit)
    return images.shuffle(seed=seed, buffer_size=window)


def read_some(files: list[str], config: DataConfig, classes: tuple[str, ...]) -> Rows:
    """Return up to 2,000 images of shards, in memory. Raises `UserError` where there is none."""
    names, labels, payloads = list[str](), list[Any](), list[Payload]()
    images = islice(shuffled(files, config, 0, MIXED, classes), MOST)
    while chunk := list(islice(images, 256)):
        decoded = decode_in_threads([image["data"] for image in chunk], config.image_shape)
        payloads += [i if isinstance(i, str) else np.ascontiguousarray(i.transpose(1, 2, 0).squeeze()) for i in decoded]
        names += [image["name"] for image in chunk]
        labels += [image["label"] for image in chunk]
    if not names:
        raise UserError(f"data.source: {config.source}: no images in {files[0]}")
    some = None if all(label is None for label in labels) else labels
    return Rows(
        len(names), lambda rows: [payloads[row] for row in rows], names.__getitem__, some, list(classes) or None
    )


class StreamedImages(ImageDataset):
    """Images to train on that come in sequence: indices are positions in the stream, and each process takes its own
    next images. Bad ones end the run, or are skipped and counted.

    Attributes: `bad`, the images skipped by this process; no `labels`.
    """

    def __init__(self, config: DataConfig, files: list[str]) -> None:
        rows = Rows(0, lambda rows: [], str, None)
        super().__init__(config, rows, Decoded(np.empty(0, np.int64), None, []), None, [])
        self._files, self._config = files, config
        self._stream: Iterator[dict[str, Any]] | None = None
        self._next, self._seen, self._skipped = 0, 0, 0
        self._bad_names = set[str]()  # an image comes once an epoch, and is listed once
        self._lock = threading.Lock()

    def __len__(self) -> int:
        raise UserError("data.streaming: how many images there are is not known; data.streaming=false copies them")

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the positions of one step's global batch, and zeros in the place of epochs."""
        if self._stream is None:
            self._stream = self._images(seed + step)
        positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
        return positions, np.zeros_like(positions)

    def examples(self, count: int, seed: int) -> Tensor:
        """Return the first `count` images of the stream, which come again in training."""
        stream = iter(shuffled(self._files, self._config, seed, min(self._config.shuffle_window, count)))
        return self.prepare(self._take(stream, count))

    def names(self, indices: Indices) -> list[str]:
        """Raise `UserError`."""
        raise self._refusal()

    def pixels(self, indices: Indices) -> Tensor:
        """Return this process's next images. Raises `UserError` for positions before the last ones."""
        wanted = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
        with self._lock:
            if not len(wanted) or self._stream is None or wanted[0] < self._next or (np.diff(wanted) <= 0).any():
                raise self._refusal()
            self._next = int(wanted[-1]) + 1
            return self._take(self._stream, len(wanted))

    def raw_batch(
        self, indices: Indices, epochs: NDArray[np.int64] | int, seed: int, *, augment: bool = True
    ) -> tuple[Tensor, ...]:
        """See `ImageDataset.raw_batch`."""
        pixels = self.pixels(indices)
        changes = draw_changes(np.asarray(indices), epochs, self._augment, seed) if augment else None
        return (pixels,) if changes is None else (pixels, changes)

    def _images(self, seed: int) -> Iterator[dict[str, Any]]:
        """Yield this process's images without end, in another order in every epoch."""
        from datasets.distributed import split_dataset_by_node

        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        images = shuffled(self._files, self._config, seed, self._config.shuffle_window)
        images = split_dataset_by_node(images, rank, world)
        for epoch in count():
            images.set_epoch(epoch)
            empty = True
            for image in images:
                yield image
                empty = False
            if empty:
                raise UserError(f"data.streaming: {self._config.source} has fewer images to train on than processes")

    def _take(self, stream: Iterator[dict[str, Any]], count: int) -> Tensor:
        """Return the next good images of a stream, uint8 (count, C, H, W); fewer at its end."""
        good = list[NDArray[np.uint8]]()
        while len(good) < count and (chunk := list(islice(stream, count - len(good)))):
            images = decode_in_threads([example["data"] for example in chunk], self.image_shape)
            checked = zip(images, chunk, strict=True)
            good += [i for i, e in checked if self._is_good(i, e["name"]) and not isinstance(i, str)]
        if not good:
            raise UserError(f"data.source: {self._config.source}: no image to train on can be decoded")
        return torch.from_numpy(np.stack(good))

    def _is_good(self, image: NDArray[np.uint8] | str, name: str) -> bool:
        """Count an image, and return whether it was decoded. Raises `UserError` if it was not and may not be skipped,
        or if these are too many."""
        self._seen += 1
        if not isinstance(image, str):
            return True
        if self._config.on_error == "fail":
            raise UserError(one_line(f"{name}: {image} (data.on_error=skip leaves such images out)"))
        if not self.bad:
            tell(one_line(f"warning: {name}: {image}; such images are left out"))
        if name not in self._bad_names:
            self._bad_names.add(name)
            self.bad.append(BadImage(name, self._seen - 1, image))
        self._skipped += 1
        allowed = self._config.max_bad_fraction
        if self._skipped > allowed * max(FEW, self._seen) and allowed < 1:
            raise UserError(
                f"{self._skipped} of {self._seen} images so far cannot be decoded, more than "
                f"data.max_bad_fraction={allowed} allows:{list_bad(self.bad)}"
            )
        return False

    def _refusal(self) -> UserError:
        return UserError(
            "data.streaming: images come in sequence, each once, and not by their number; data.streaming=false copies "
            "them, and reads them in any order"
        )
