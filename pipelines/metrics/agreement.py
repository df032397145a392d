"""How often a sample has the requested class, by a 1-nearest-neighbour classifier on pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..processes.group import ALONE, ProcessGroup

T = TypeVar("T")


def agreement(
    parts: Sequence[T],
    images_of: Callable[[T], Tensor],
    wanted: Tensor,
    known: Tensor,
    labels: Tensor,
    group: ProcessGroup = ALONE,
) -> float:
    """Return the share of images `(n, C, H, W)`, over all parts, that the classifier assigns to their class in `wanted`
    `(n,)`. Its training set is `known` `(m, C, H, W)` with `labels` `(m,)`."""
    found = group.map(lambda part: nearest_label(images_of(part), known, labels), parts)
    return float((torch.cat(found) == wanted).cpu().double().mean())


def nearest_label(images: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Return for each of `images` `(B, C, H, W)` the label of its nearest neighbour in `known`, by squared error."""
    rows, known = images.flatten(1), known.flatten(1)
    squares, transposed = known.square().sum(1), known.t()
    found = [torch.addmm(squares, part, transposed, alpha=-2).argmin(1) for part in rows.split(256)]
    return labels[torch.cat(found)]
