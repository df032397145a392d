"""Whether held-out images have near duplicates in training: frames of one clip, photographs of one object.

Images are compared as 8x8 pixels of equal contrast. Frames of one sign and exposures of one tile are found more often
that way than by the vectors of a trained tokenizer, at a thousandth of the cost, and before it is trained.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.spec import to_float

from ..config import is_first_process, tell
from ..shuffling import random_rows
from .dataset import ImageDataset, Splits
from .formats import CHUNK
from .settings import UNIT_SETTINGS

HELD_OUT, TRAIN = 200, 2000
"""Number of images that are compared; in training, the images next to the held-out ones are added."""
SIDE, FLAT = 8, 0.2
"""Pixels along each side, and what is added to the norm of an image, since little contrast is mostly noise."""
LIKE, CLOSE = 20, 0.2
"""An image beyond this fraction of the distance to the 20th most similar one is not nearly the same."""
SHARE = 1 / 3
"""Share of held-out images with near duplicates below which nothing is said. Measured: 0 for digits and garments, 0.14
for emoji, 0.3 for sprites; for signs and magnetic tiles 0.65 and 0.69, and 0 and 0.08 with whole objects held out."""


def warn_about_duplicates(splits: Splits) -> None:
    """Print one line if many held-out images have near duplicates in training."""
    config = splits.train.config
    # Streams have no random access, and crops of near duplicates show different places.
    if not is_first_process() or config.is_stream or config.crop is not None:
        return
    rows, twins = find_duplicates(splits)
    count = min(HELD_OUT, len(splits.held_out))
    if len(rows) < SHARE * count:
        return
    pair = " and ".join(splits.held_out.names(rows[:1]) + splits.train.names(twins[:1]))
    key = next((key for key in reversed(UNIT_SETTINGS) if getattr(config, key)), None)
    remedy = "data.group=COLUMN or REGEX (or data.clips=true) holds it out whole"
    if not splits.is_carved:
        remedy = f"figures of {config.held_out or 'the held-out split'} say little about new ones"
    elif key is not None:
        remedy = f"data.{key} divides it, and data.group=COLUMN or REGEX of the whole does not"
    tell(
        f"warning: {len(rows)} of {count} held-out images have near duplicates in training, such as {pair}; if "
        f"they show one object or clip, {remedy}"
    )


def find_duplicates(splits: Splits) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of those of a sample of held-out images that have near duplicates in training, and the rows of
    these.

    A near duplicate is the most similar of the training images compared. It is also next to the held-out image in the
    source, as frames of a clip and photographs of an object are, or nearly the same.
    """
    train, held_out = splits.train.grey(), splits.held_out.grey()
    rows = np.sort(random_rows(len(held_out), HELD_OUT, 0).numpy())
    sample = random_rows(len(train), TRAIN, 0).numpy()
    after = np.searchsorted(train.origin[1], held_out.origin[1][rows]) if splits.is_carved else np.full(len(rows), -1)
    beside = np.stack([after - 1, after], 1)
    sample = np.union1d(sample, beside[(beside >= 0) & (beside < len(train))])
    distances = torch.cdist(shrink(held_out, rows), shrink(train, sample))
    nearest, index = distances.min(1)
    twins = sample[index.numpy()]
    is_same = nearest < CLOSE * distances.kthvalue(min(LIKE, len(sample)), 1).values
    found = (twins[:, None] == beside).any(1) | is_same.numpy()
    return rows[found], twins[found]


def shrink(images: ImageDataset, rows: NDArray[np.int64]) -> Tensor:
    """Return images as few pixels of equal contrast, (B, C * SIDE * SIDE)."""
    parts = (to_float(images.pixels(rows[start : start + CHUNK])) for start in range(0, len(rows), CHUNK))
    parts = (part.movedim(-3, 1).flatten(2, -2) for part in parts)  # the frames of a clip below one another
    pixels = torch.cat([F.adaptive_avg_pool2d(part, SIDE).flatten(1) for part in parts])
    pixels = pixels - pixels.mean(1, keepdim=True)
    return (pixels / (pixels.norm(dim=1, keepdim=True) + FLAT)).round(decimals=3)  # blank images become equal
