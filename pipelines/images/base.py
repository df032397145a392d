"""The configuration of an image data set, and the rows of a split."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..config import Config, is_first_process
from .augment import AugmentConfig
from .stamps import KnownFile

Side = Annotated[int, Field(ge=4, le=4096)]
Payload = bytes | Path | KnownFile | NDArray[np.uint8] | str | None
"""An encoded image, the file of one, pixels, or (a string) the reason why there is no image."""
MAX_FILE = 256 << 20  # bytes of an encoded image
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Number of threads that read and decode; most of that work does not hold Python's lock."""


class DataConfig(Config):
    """Which images, and in what shape."""

    # `default=` is written out: it is how a type checker knows, in a user's script, what may be left out.

    source: str = Field(
        default="digits",
        description="`digits` (5,000 MNIST digits), a folder of images or parquet, a parquet file, or a Hub id",
    )
    streaming: bool = Field(
        default=False,
        description="read images only when they are needed, from folders or from .parquet and .tar shards in a folder, "
        "a pattern, a URL or a Hub id; nothing is checked beforehand",
    )
    shuffle_window: int = Field(
        default=10_000,
        ge=1,
        description="images of shards are shuffled within a window of this many, which `cache_mb` should hold",
    )
    split: str = Field(
        default="train",
        description="the split to train on; in a folder of images, a folder of that name, or for `train` all of it",
    )
    held_out: str | None = Field(
        default=None,
        description="the split to evaluate on; null: `test`, or where there is none the only one of "
        "validation, val, valid, dev; where there is none of these either, part of `split` is held out",
    )
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1, description="the share of `split` that is held out")
    validation_fraction: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="the share of `split` that is kept from training to choose the best weights; null: a twentieth, if "
        "that is 10 images or more, but at most 2,000; 0: none, and the held-out images are used instead",
    )
    image_size: Side | tuple[Side, Side] = Field(
        default=28, description="height and width, one number or [height, width]; others are resized and cropped"
    )
    channels: Literal[1, 3] = Field(default=1, description="1 for grey, 3 for RGB")
    image_column: str = Field(default="image", description="the column that holds the images")
    label_column: str | None = Field(
        default="label", description="the column that holds the classes; null for no classes"
    )
    augment: AugmentConfig = Field(default=AugmentConfig(), description="random changes of the training images")
    on_error: Literal["skip", "fail"] = Field(
        default="fail",
        description="what to do about images that cannot be decoded; streaming replaces those that it skips",
    )
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="with `skip`, a larger share of bad images is an error"
    )
    limit: int | None = Field(default=None, ge=1, description="use at most this many images of each split")
    cache_mb: int = Field(
        default=2048, ge=0, description="keep decoded images, or parts of shards, in memory up to this many MiB"
    )

    @model_validator(mode="after")
    def _splits_differ(self) -> DataConfig:
        if self.split == self.held_out:
            raise ValueError(f"split and held_out are both {self.split!r}: evaluation needs images not trained on")
        return self

    @property
    def path(self) -> Path | None:
        """The path of the source on this machine; None for the digits, a Hub id or a URL."""
        path = Path(os.path.expanduser(self.source))
        return path if self.source != "digits" and path.exists() else None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        return (self.channels, *size)


@dataclass(frozen=True)
class Rows:
    """One split as its source gives it, still encoded. `read` returns (path or row, payload) for each requested row.

    If rows are read in blocks, `blocks` holds the first row of each block, and the end, and `row_bytes` the mean size
    of a row.
    """

    size: int
    read: Callable[[Sequence[int]], list[tuple[str, Payload]]]
    labels: list[Any] | None
    class_names: list[str] | None = None
    blocks: NDArray[np.int64] | None = None
    row_bytes: float = 0.0


SplitRows = dict[str, Callable[[], Rows]]
"""The splits of a source by name; calling one opens it."""


def show_progress() -> bool:
    """Whether to show a progress bar: only on a terminal, and only by the first process."""
    return is_first_process() and sys.stderr.isatty()
