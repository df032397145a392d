"""Images that are read only when they are needed; a bad image always has the same replacement."""

from __future__ import annotations

import sys
import threading

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.files import one_line

from ..config import UserError, is_first_process
from ..shuffling import positions_of
from .bad import Problem, Report, listed
from .base import DataConfig, Rows
from .dataset import ImageDataset, Indices
from .decoding import Decoded
from .shards.order import ShardOrder, blocks_among

TRIED = 8  # images that are read at a time to find a good one
FEW = 1000  # images before which the share of bad ones does not count


class StreamedImages(ImageDataset):
    """Images of one shape with optional labels, none of which is read beforehand.

    A bad image is replaced by the next good one of the same class in the order of the rows, which wraps around: a
    function of the data alone. With `on_error=fail` the first bad image raises `UserError`; with `skip`, a share above
    `max_bad_fraction` of the images that this process has read, counted as at least 1,000.
    """

    finds_alone = True

    def __init__(
        self,
        config: DataConfig,
        rows: Rows,
        positions: NDArray[np.int64],
        labels: NDArray[np.int64] | None,
        class_names: list[str],
    ) -> None:
        super().__init__(config, rows, Decoded(positions, None, Report(0, [])), labels, class_names)
        self._config, self._seen, self._lock = config, 0, threading.RLock()
        self._problems: dict[int, Problem] = {}
        self._stand_ins: dict[int, int] = {}
        self._order = (
            None if rows.blocks is None else ShardOrder(blocks_among(positions, rows.blocks), config.shuffle_window)
        )
        window = min(config.shuffle_window, len(positions))
        needed = int(window * rows.row_bytes / 2**20)
        if needed > config.cache_mb and is_first_process():
            print(
                f"warning: data.shuffle_window: {window} of these images take {needed} MiB, more than "
                f"data.cache_mb={config.cache_mb}; shards are read again and again",
                file=sys.stderr,
            )

    @property
    def report(self) -> Report:
        """The images and problems that this process has met so far."""
        with self._lock:
            return Report(min(self._seen, len(self)), list(self._problems.values()))

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `ShardOrder.samples`; single files are shuffled as a whole."""
        if self._order is None:
            return super().samples(batch_size, seed, step)
        return self._order.samples(batch_size, seed, step)

    def pixels(self, indices: Indices) -> Tensor:
        """See `ImageDataset.pixels`."""
        self._seen += len(positions_of(indices, len(self)))
        return super().pixels(indices)

    def _replaced(self, index: int, name: str, image: NDArray[np.uint8] | str) -> NDArray[np.uint8]:
        """The image, or its replacement."""
        if not isinstance(image, str):
            return image
        with self._lock:
            known = self._stand_ins.get(index)
            if known is not None:
                return self._good(known)
            self._note(index, Problem(name, int(self._positions[index]), image))
            found, other, pixels = self._next_good(index)
            self._stand_ins[index] = found
            self._problems[index] = self._problems[index]._replace(replaced_by=other)
            self._judge()
            return pixels

    def _good(self, index: int) -> NDArray[np.uint8]:
        ((name, image),) = self._decoded(np.array([index]))
        if isinstance(image, str):
            raise UserError(f"{name}: {image}; it could be decoded before")
        return image

    def _next_good(self, index: int) -> tuple[int, str, NDArray[np.uint8]]:
        """Index, name and pixels of the next good image of the same class. Raises `UserError` if there is none."""
        alike = (
            np.arange(len(self))
            if self.labels is None
            else np.flatnonzero(self.labels.numpy() == int(self.labels[index]))
        )
        alike = np.roll(alike, -int(np.searchsorted(alike, index)))[1:]  # those after it, then those before
        alike = alike[~np.isin(alike, list(self._problems))]
        while len(alike):
            some, alike = alike[:TRIED], alike[TRIED:]
            for candidate, (name, image) in zip(some.tolist(), self._decoded(some), strict=True):
                if not isinstance(image, str):
                    return candidate, name, image
                self._seen += 1
                self._note(candidate, Problem(name, int(self._positions[candidate]), image))
                self._judge()
        problem = self._problems[index]
        raise UserError(
            one_line(f"{problem.path}: {problem.reason}; and no other image of its class can take its place")
        )

    def _note(self, index: int, problem: Problem) -> None:
        if index in self._problems:
            return
        self._problems[index] = problem
        if self._config.on_error == "fail":
            told = f"{problem.path}: {problem.reason} (data.on_error=skip replaces it by another image)"
            raise UserError(one_line(told))
        if len(self._problems) == 1:
            told = f"warning: {problem.path}: {problem.reason}; bad images are replaced by others"
            print(one_line(told), file=sys.stderr)

    def _judge(self) -> None:
        count, allowed = len(self._problems), self._config.max_bad_fraction
        if count > allowed * max(FEW, min(self._seen, len(self))) and allowed < 1:
            raise UserError(
                f"{count} of {min(self._seen, len(self))} images so far cannot be decoded, more than "
                f"data.max_bad_fraction={allowed} allows:{listed(list(self._problems.values()))}"
            )
