"""Whether samples are of the class that was asked for, by a 1-nearest-neighbour classifier on pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def agreement(images: Tensor, wanted: Tensor, known: Tensor, labels: Tensor) -> float:
    """The share of `images` `(B, C, H, W)` that the classifier, on `known` `(n, C, H, W)` of `labels` `(n,)`, gives the
    class `wanted` `(B,)`."""
    return float((nearest_label(images, known, labels) == wanted).double().mean())


def nearest_label(images: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Label `(B,)` of the nearest of `known` `(n, C, H, W)` to each of `images` `(B, C, H, W)`, by squared error."""
    rows, known = images.flatten(1), known.flatten(1)
    squares, transposed = known.square().sum(1), known.t()
    found = [torch.addmm(squares, part, transposed, alpha=-2).argmin(1) for part in rows.split(256)]
    return labels[torch.cat(found)]
