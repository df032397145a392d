"""What the page is made for: a pipeline, its name, what visitors may ask of it, and the images that can be searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic.fields import FieldInfo
from torch import Tensor

from ..image_pipeline import ImagePipeline
from ..images import to_float
from ..images.dataset import ImageDataset
from ..images.pictures import convert_images
from .bounds import Bounds
from .jobs import Job, Jobs


@dataclass
class Served:
    """A pipeline for visitors. name: where it was loaded from, as a visitor may be told. described: the keys of
    `smalti generate`, which say what settings mean. train: what can be searched, or None, with the reason why."""

    pipeline: ImagePipeline
    name: str
    bounds: Bounds
    described: Mapping[str, FieldInfo]
    train: ImageDataset | None = None
    num_index: int | None = None
    why_no_search: str = ""
    jobs: Jobs = field(default_factory=Jobs)

    @property
    def title(self) -> str:
        """The last two parts of the name."""
        return "/".join(self.name.rstrip("/").split("/")[-2:])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.pipeline.tokenizer.image_shape

    def code(self, *lines: str) -> str:
        """Python that does what the page does."""
        head = ["from pipelines import ImagePipeline", "", f"pipe = ImagePipeline.from_pretrained({self.name!r})"]
        return "\n".join([*head, *lines])


def drawn(job: Job, call: Any, *arguments: Any, **settings: Any) -> Any:
    """What a call of a pipeline that samples returns, each step of which is shown and can be the last."""
    return call(*arguments, **settings, progress=False, callback_on_step_end=job.watch)


def as_pixels(images: Tensor) -> list[np.ndarray]:
    """uint8 (H, W, C) of each of float images `(B, C, H, W)`."""
    return list(convert_images(images, "np"))


def as_floats(pixels: Tensor) -> Tensor:
    """Float images in [-1, 1] of uint8 ones."""
    return to_float(pixels)


def keywords(settings: Mapping[str, Any]) -> str:
    """Arguments as they are written in a call, each after a comma."""
    return "".join(f", {name}={value!r}" for name, value in settings.items())
