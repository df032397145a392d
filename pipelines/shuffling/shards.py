"""The order of images that are read from shards: a function of (seed, step) that reads nearly in sequence.

An epoch takes the blocks of all shards in a random order, and delays each image by a random number of places below
`window`; images come in the order in which they are then due. So every image comes once, a block is needed while
`window` images pass, and new blocks are begun at an even pace. Where a step's images lie is found from its number, by
looking at the images of two windows and at nothing before them.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from .epochs import samples_of
from .hashing import DRAWS, splitmix64, uniforms

PAGES = 6  # windows whose order is kept
DELAY = DRAWS  # the draw of an image's delay, which no augmentation uses

Indices = NDArray[np.int64]


class ShardOrder:
    """The order of `n` images in blocks, of which block `k` holds the images from `starts[k]` to `starts[k + 1]`."""

    def __init__(self, starts: Indices, window: int) -> None:
        self.starts, self.rows, self.window = starts, int(starts[-1]), window
        self.pages: OrderedDict[tuple[int, int, int], tuple[int, Indices]] = OrderedDict()

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[Indices, Indices]:
        """Indices and epochs, each `(batch_size,)`, of one step's global batch: a function of the arguments.

        Inside a batch, images stand by a hash of their block. As processes take contiguous parts of it, each reads
        its own share of the blocks, however many processes there are.
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
        found, number = [], int(ranks[0]) // self.window  # or the page after: a page begins up to a window early
        while len(ranks):
            start, images = self.page(seed, epoch, number)
            here = ranks[ranks < start + len(images)]
            found.append(images[here - start])
            ranks, number = ranks[len(here) :], number + 1
        return np.concatenate(found)

    def page(self, seed: int, epoch: int, number: int) -> tuple[int, Indices]:
        """The images that are due from `number * window` to `(number + 1) * window`, and the rank of the first one."""
        key = (seed, epoch, number)
        if key not in self.pages:
            begin, end = number * self.window, (number + 1) * self.window
            places = np.arange(max(0, begin - self.window), min(self.rows, end))
            due = places + self.window * uniforms(seed, epoch, places, [DELAY])[:, 0]
            here = np.flatnonzero((due >= begin) & (due < end))
            here = here[np.argsort(due[here], kind="stable")]
            first = max(0, begin - self.window) + int((due < begin).sum())
            self.pages[key] = first, self.image_at(places[here], seed, epoch)
            while len(self.pages) > PAGES:
                self.pages.popitem(last=False)
        return self.pages[key]

    def image_at(self, places: Indices, seed: int, epoch: int) -> Indices:
        """The images at these places of an epoch in which blocks are in a random order, and images in theirs."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.starts) - 1)
        ends: Indices = np.cumsum(np.diff(self.starts)[order])
        nth = np.searchsorted(ends, places, side="right")
        found: Indices = self.starts[order[nth] + 1] - (ends[nth] - places)
        return found


def blocks_among(positions: Indices, blocks: Indices) -> Indices:
    """Where among ascending row numbers `positions` each block begins that has any, and the end."""
    firsts = np.unique(np.searchsorted(positions, blocks))
    return firsts if len(firsts) else np.array([0])


def drawn_by_blocks(blocks: Indices) -> Indices:
    """The row numbers below `blocks[-1]`, whole blocks in an order that is drawn at random but always alike: whatever
    is cut off at either end is read in sequence, and cuts one block at most."""
    sizes = np.diff(blocks)
    order = np.argsort(splitmix64(np.arange(len(sizes), dtype=np.uint64)), kind="stable")
    begins = np.cumsum(sizes[order]) - sizes[order]  # where each block comes to stand
    found: Indices = np.repeat(blocks[:-1][order] - begins, sizes[order]) + np.arange(blocks[-1])
    return found
