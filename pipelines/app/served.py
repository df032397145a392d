"""A pipeline for visitors: what they may ask of it, how their clicks run it, and the images that they upload."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from tokenizer.files import one_line

from ..config import UserError
from ..image_pipeline import ImagePipeline
from ..images.dataset import ImageDataset
from ..images.decoding import WEB_FORMATS, open_image, try_decode

BETWEEN = 0.4  # seconds between two reports, each of which makes the browser look at the whole page
BROKEN = "Something went wrong on the server; its log says what."
Picked = Sequence[tuple[str, str | None]] | None
"""What a gallery passes on: the file and the caption of each image."""
Step = Callable[[int, int, str], None]
"""Shows how many units of how many are done. Raises `Stopped` once the visitor has clicked Stop."""


class Stopped(Exception):
    """The visitor has clicked Stop."""


@dataclass
class Served:
    """A pipeline for visitors. name: where it was loaded from; train: the images that can be searched, if any."""

    pipeline: ImagePipeline
    name: str
    max_images: int = 64
    max_upload_mb: float = 8
    train: ImageDataset | None = None
    num_index: int | None = None
    stopping: set[str] = field(default_factory=set)
    """The sessions whose visitor has clicked Stop."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.pipeline.tokenizer.image_shape

    def code(self, *lines: str) -> str:
        """Python that does what the page does."""
        head = ["from pipelines import ImagePipeline", "", f"pipe = ImagePipeline.from_pretrained({self.name!r})"]
        return "\n".join([*head, *lines])

    def handler(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """What gradio calls for `work`, which takes this, a `Step` and the values on the page. Errors become one
        line."""

        def handle(request: gr.Request, progress: gr.Progress = gr.Progress(), *values: Any) -> Any:  # noqa: B008 (gradio's way to ask for one)
            session = str(request.session_hash)
            self.stopping.discard(session)

            shown = -math.inf

            def step(done: int, total: int, unit: str) -> None:
                nonlocal shown
                if session in self.stopping:
                    raise Stopped(f"stopped after {done:,} of {total:,} {unit}")
                if time.monotonic() - shown > BETWEEN:
                    progress((done, total), unit=unit)
                    shown = time.monotonic()

            try:
                return work(self, step, *values)
            except Stopped as stopped:
                gr.Info(str(stopped), title="Stopped")
                return gr.skip()
            except Exception as error:
                mistake = isinstance(error, (ValueError, UserError))
                line = one_line(" ".join(str(error).split())) if mistake else BROKEN
                # The page would obey markup, which may come from a file or a pipeline.
                raise gr.Error(html.escape(line), print_exception=not mistake) from error

        return handle

    def stop(self, request: gr.Request) -> None:
        """End this visitor's work at its next step."""
        self.stopping.add(str(request.session_hash))


def watch(step: Step) -> Any:
    """A `callback_on_step_end` that shows how many tokens are drawn."""

    def show(pipeline: Any, number: int, rank: int, tensors: dict[str, Tensor]) -> None:
        known = tensors["known"]
        step(int(known.sum()), known.numel(), "tokens")

    return show


# Images that visitors upload


def picked_files(picked: Picked, most: int) -> list[Path]:
    """The files of up to `most` images. Raises `ValueError`."""
    if not picked:
        raise ValueError("pick an image first")
    if len(picked) > most:
        raise ValueError(f"{len(picked)} images; at most {most} are taken at once")
    return [Path(path) for path, _ in picked]


def picked_image(picked: Picked, shape: tuple[int, int, int]) -> Tensor:
    """The image that was picked, uint8 `(1, C, H, W)`, resized and cropped to `shape`. Raises `ValueError` for a file
    that is no image, and before it is decoded for one of too many pixels."""
    (file,) = picked_files(picked, 1)
    pixels = try_decode(file, shape, WEB_FORMATS)
    if isinstance(pixels, str):
        raise ValueError(f"the image cannot be read: {pixels}")
    return torch.from_numpy(pixels.copy())[None]


def picked_images(picked: Picked, most: int) -> list[Image.Image]:
    """Up to `most` images of any size, opened but not decoded. Raises `ValueError` as `picked_image` does."""
    images = []
    for number, file in enumerate(picked_files(picked, most), 1):
        try:
            images.append(open_image(file, WEB_FORMATS))
        except Exception as error:  # damaged files make Pillow raise almost anything
            raise ValueError(f"image {number} cannot be read: {error}") from error
    return images


def as_picture(pixels: Tensor) -> Image.Image:
    """uint8 `(C, H, W)` as a PIL image."""
    return Image.fromarray(pixels.movedim(0, -1).squeeze(-1).cpu().numpy())
