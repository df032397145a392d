"""A pipeline as the app serves it: limits, event handlers, and uploaded images."""

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
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from PIL.Image import Image as PILImage
from torch import Tensor

from tokenizer.files import one_line
from tokenizer.spec import ImageSpec, draw_pictures

from ..config import UserError
from ..image_pipeline import ImagePipeline
from ..images.animations import animated_png
from ..images.dataset import ImageDataset
from ..images.formats import MAX_PIXELS, WEB_FORMATS, Payload, open_image, try_decode
from ..options import open_files

REPORT_SECONDS = 0.4  # minimum time between progress reports, because each one updates the page
BROKEN = "Something went wrong on the server; see its log."
Picked = Sequence[tuple[str, str | None]] | None
"""The value of a gallery: file and caption of each image."""
ReportStep = Callable[[int, int, str], None]
"""Reports progress: units done, total, name of the unit. Raises `Stopped` after the visitor has clicked Stop."""


class Stopped(Exception):
    """The visitor has clicked Stop."""


@dataclass
class Served:
    """A pipeline and the limits for visitors. name: where it was loaded from; train: the images to search, if any."""

    pipeline: ImagePipeline
    name: str
    max_images: int = 64
    max_upload_mb: float = 8
    train: ImageDataset | None = None
    num_index: int | None = None
    stopping: set[str] = field(default_factory=set)  # sessions whose visitor has clicked Stop

    @property
    def spec(self) -> ImageSpec:
        return self.pipeline.spec

    def code(self, *lines: str) -> str:
        """Return Python code that loads the pipeline, followed by `lines`, with the imports that they need."""
        text = "\n".join(lines)
        names = [name for name in ("Image", "ImageSequence") if f"{name}." in text]
        imports = ["import numpy as np"] * ("np." in text) + [f"from PIL import {', '.join(names)}"] * bool(names)
        load = f"pipe = ImagePipeline.from_pretrained({self.name!r})"
        return "\n".join([*imports, "from pipelines import ImagePipeline", "", load, *lines])

    def handler(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return an event handler that calls `work(served, step, *values)` and shows errors in one line."""

        def handle(request: gr.Request, progress: gr.Progress = gr.Progress(), *values: Any) -> Any:  # noqa: B008 (gradio requires it)
            session = str(request.session_hash)
            self.stopping.discard(session)
            last_report = -math.inf

            def step(done: int, total: int, unit: str) -> None:
                nonlocal last_report
                if session in self.stopping:
                    raise Stopped(f"stopped after {done:,} of {total:,} {unit}")
                if time.monotonic() - last_report > REPORT_SECONDS:
                    progress((done, total), unit=unit)
                    last_report = time.monotonic()

            try:
                return work(self, step, *values)
            except Stopped as stopped:
                gr.Info(str(stopped), title="Stopped")
                return gr.skip()
            except Exception as error:
                mistake = isinstance(error, (ValueError, UserError))
                line = one_line(" ".join(str(error).split())) if mistake else BROKEN
                # The message may contain markup from a file or a pipeline.
                raise gr.Error(html.escape(line), print_exception=not mistake) from error

        return handle

    def stop(self, request: gr.Request) -> None:
        """Stop this visitor's work at its next step."""
        self.stopping.add(str(request.session_hash))


def report_tokens(step: ReportStep) -> Any:
    """Return a `callback_on_step_end` that reports the number of sampled tokens."""

    def report(pipeline: Any, number: int, rank: int, tensors: dict[str, Tensor]) -> None:
        known = tensors["known"]
        step(int(known.sum()), known.numel(), "tokens")

    return report


# Images and clips that visitors upload


def picked_files(picked: Picked, most: int) -> list[Path]:
    """Return the files of up to `most` images. Raises `ValueError`."""
    if not picked:
        raise ValueError("choose an image first")
    if len(picked) > most:
        raise ValueError(f"{len(picked)} images; the limit is {most}")
    return [Path(path) for path, _ in picked]


def picked_image(picked: Picked, spec: ImageSpec) -> Tensor:
    """Read the image, or the first frames of the clip, uint8 `(1, *spec.shape)`, resized and cropped. Raises
    `ValueError` for a file that cannot be read and, before decoding, for one with too many pixels."""
    (file,) = picked_files(picked, 1)
    try:
        pixels = try_decode(list_payloads(file, spec)[0], spec, WEB_FORMATS)
    except Exception as error:  # damaged files make Pillow raise almost anything
        pixels = str(error)
    if isinstance(pixels, str):
        raise ValueError(f"the {spec.noun} cannot be read: {pixels}")
    return torch.from_numpy(pixels.copy())[None]


def picked_images(picked: Picked, most: int, spec: ImageSpec) -> list[Payload]:
    """Open up to `most` images, or clips in all files, without decoding them. Raises `ValueError`."""
    payloads = list[Payload]()
    for number, file in enumerate(picked_files(picked, most), 1):
        try:
            payloads += list_payloads(file, spec)
        except Exception as error:  # as in `picked_image`
            raise ValueError(f"{spec.noun} {number} cannot be read: {error}") from error
    if len(payloads) > most:
        raise ValueError(f"{len(payloads)} {spec.noun}s; the limit is {most}")
    return payloads


def list_payloads(file: Path, spec: ImageSpec) -> list[Payload]:
    """Return the image of a file, or the windows of a clip, not decoded. Raises whatever Pillow raises."""
    image = open_image(file, WEB_FORMATS)
    sides = *spec.shape[:-3], *image.size
    if math.prod(sides) > MAX_PIXELS:
        raise ValueError(f"{' x '.join(map(str, sides))} pixels; the limit is {MAX_PIXELS}")
    source = open_files([str(file)], spec)
    payloads = source.payloads(range(source.size))
    for payload in payloads:
        if isinstance(payload, str):
            raise ValueError(payload)
    return payloads


def to_gallery(image: Tensor | PILImage | list[PILImage]) -> PILImage | str:
    """Convert an image, uint8 `(..., C, H, W)` or PIL, for a gallery; a clip to the path of an animated PNG."""
    found = draw_pictures(image.movedim(-3, -1).cpu().numpy()) if isinstance(image, Tensor) else image
    if not isinstance(found, list):
        return found
    return save_bytes_to_cache(animated_png(found), "clip.png", get_upload_folder())
