"""The order of images that are read from shards: a function of (seed, step) that reads nearly in sequence.

An epoch takes the blocks of all shards in a random order, and delays each image by a random number of places below
`window`; images come in the order in which they are then due. So every image comes once, a block is needed while
`window` images pass, and new blocks begin at an even pace. The images of a step are found from its number alone: only
the images of two windows are looked at, and nothing before them.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from ...shuffling import DRAWS, samples_of, splitmix64, uniforms

KEPT_WINDOWS = 6  # whose order is kept
DELAY = DRAWS  # column of the random number for an image's delay, which no augmentation uses

Indices = NDArray[np.int64]


class ShardOrder:
    """The order of `n` images in blocks; block `k` holds the images from `starts[k]` up to `starts[k + 1]`."""

    def __init__(self, starts: Indices, window: int) -> None:
        self.starts, self.rows, self.window = starts, int(starts[-1]), window
        self.kept: OrderedDict[tuple[int, int, int], tuple[int, Indices]] = OrderedDict()

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[Indices, Indices]:
        """Indices and epochs, each `(batch_size,)`, of one step's global batch: a function of the arguments.

        Within a batch, images are sorted by a hash of their block. Processes take contiguous parts of the batch, so
        each reads its own share of the blocks, for any number of processes.
        """
        if self.window >= self.rows:
            indices, epochs = samples_of(self.rows, batch_size, seed, step)
        else:
            places = step * batch_size + np.arange(batch_size, dtype=np.int64)
            epochs, ranks = places // self.rows, places % self.rows
            indices = np.concatenate([self.at(ranks[epochs == epoch], seed, int(epoch)) for epoch in np.unique(epochs)])
        blocks = np.searchsorted(self.starts, indices, side="right").astype(np.uint64)
        shared = np.argsort(splitmix64(blocks), kind="stable")
        return indices[shared], epochs[shared]

    def at(self, ranks: Indices, seed: int, epoch: int) -> Indices:
        """The images that come at these ascending `ranks` of an epoch."""
        found, index = [], int(ranks[0]) // self.window  # or the window after: its images begin up to a window early
        while len(ranks):
            start, images = self.due_in_window(seed, epoch, index)
            here = ranks[ranks < start + len(images)]
            found.append(images[here - start])
            ranks, index = ranks[len(here) :], index + 1
        return np.concatenate(found)

    def due_in_window(self, seed: int, epoch: int, index: int) -> tuple[int, Indices]:
        """The rank of the first image that is due from `index * window` up to `(index + 1) * window`, and all images
        that are."""
        key = (seed, epoch, index)
        if key not in self.kept:
            begin, end = index * self.window, (index + 1) * self.window
            places = np.arange(max(0, begin - self.window), min(self.rows, end))
            due = places + self.window * uniforms(seed, epoch, places, [DELAY])[:, 0]
            here = np.flatnonzero((due >= begin) & (due < end))
            here = here[np.argsort(due[here], kind="stable")]
            first = max(0, begin - self.window) + int((due < begin).sum())
            self.kept[key] = first, self.image_at(places[here], seed, epoch)
            while len(self.kept) > KEPT_WINDOWS:
                self.kept.popitem(last=False)
        return self.kept[key]

    def image_at(self, places: Indices, seed: int, epoch: int) -> Indices:
        """The images at these places of an epoch with blocks in random order, and images in order within a block."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.starts) - 1)
        ends: Indices = np.cumsum(np.diff(self.starts)[order])
        nth = np.searchsorted(ends, places, side="right")
        found: Indices = self.starts[order[nth] + 1] - (ends[nth] - places)
        return found


def blocks_among(positions: Indices, blocks: Indices) -> Indices:
    """The index in ascending row numbers `positions` at which each block with any of them begins, and the end."""
    firsts = np.unique(np.searchsorted(positions, blocks))
    return firsts if len(firsts) else np.array([0])


def drawn_by_blocks(blocks: Indices) -> Indices:
    """The row numbers below `blocks[-1]`, whole blocks in a fixed random order: a part cut off at either end is read in
    sequence, and cuts at most one block."""
    sizes = np.diff(blocks)
    order = np.argsort(splitmix64(np.arange(len(sizes), dtype=np.uint64)), kind="stable")
    begins = np.cumsum(sizes[order]) - sizes[order]  # where each block begins in the result
    found: Indices = np.repeat(blocks[:-1][order] - begins, sizes[order]) + np.arange(blocks[-1])
    return found
