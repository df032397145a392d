"""Known tokens come first: what becomes of an order and of its blocks."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor


def known_first(walk: Tensor, keep: Tensor) -> Tensor:
    """`walk` as `(B, N)` with the tokens that are known, by bool `keep` (B, N) in raster order, before all others, so
    that these are conditioned on all of them; each part in the order that it had."""
    walk = walk.expand(keep.shape)
    return walk.gather(1, torch.argsort(~keep.gather(1, walk), dim=1, stable=True))


def after_known(blocks: tuple[int, ...], known: int) -> tuple[int, ...]:
    """`blocks` where the first so many tokens are known: these are the first block, the rest keeps its cuts."""
    cuts = [0, *([known] if known else []), *(cut for cut in accumulate(blocks) if cut > known)]
    return tuple(end - begin for begin, end in zip(cuts, cuts[1:], strict=False))
