"""Images to a small file, and back."""

from __future__ import annotations

import base64
import html
import importlib.util
from typing import Any

import gradio as gr
import torch

from ...compression.coding import exact_pixels
from ..elements import TAKE_ALL, picker, pictures, shown
from ..jobs import Job
from ..served import Served, as_floats, as_pixels
from ..uploads import files_of, pictures_of
from ..widgets import on_click, run_buttons, take_button

STREAM = "images.smalti"


def build(served: Served, gallery: gr.HTML) -> None:
    """The tab; without the coder, how to get it."""
    if importlib.util.find_spec("constriction") is None:
        gr.Markdown('Compression needs the package constriction where the app runs: `pip install "smalti[compress]"`')
        return
    pipeline, bounds = served.pipeline, served.bounds
    _, height, width = served.shape
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            what = f"images of {width} x {height} pixels"
            images = picker("compress-images", bounds.max_upload, bounds.max_images, what)
            take_button("Take all samples", gallery, images, TAKE_ALL)
            can_keep = pipeline.tokenizer.reversible or pipeline.tokenizer.has_likelihood
            lossless = gr.Checkbox(False, label="Keep every pixel", visible=can_keep)
            button, stop = run_buttons("Compress")
            link = gr.HTML(elem_id="stream-link", min_height=60)
        with gr.Column(scale=1, min_width=280):
            stream = picker("stream", bounds.max_upload, 1, f"a file such as {STREAM}", accept="")
            back, stop_back = run_buttons("Decompress")
            told = gr.Markdown(elem_id="stream-facts")
            found = pictures("decompressed")

    def compress(job: Job, value: Any, lossless: Any) -> str:
        files = files_of(value, bounds.max_upload, bounds.max_images)
        batch = []
        for number, image in enumerate(pictures_of(value, bounds.max_upload, bounds.max_images), 1):
            job.step(number - 1, len(files), "images")
            try:
                batch.append(exact_pixels(image, served.shape, bool(lossless)))
            except ValueError as error:
                raise ValueError(f"image {number}: {error}") from error
        data = pipeline.compress(as_floats(torch.stack(batch)), lossless=bool(lossless), progress=False)
        return link_to(data, len(files), sum(map(len, files)), served)

    def decompress(job: Job, value: Any) -> Any:
        (data,) = files_of(value, bounds.max_upload, 1)
        job.step(0, 1, "files")
        images = pipeline.decompress(data, output_type="pt", max_images=bounds.max_images, progress=False)
        pixels = as_pixels(images)
        sizes = f"{len(data):,} bytes, {len(data) / max(1, len(pixels)):.1f} an image"
        return f"{len(pixels)} images from {sizes}", shown(pixels, [str(number + 1) for number in range(len(pixels))])

    on_click(served, button, stop, compress, [images, lossless], [link], "compress")
    on_click(served, back, stop_back, decompress, [stream], [told, found], "decompress")


def link_to(data: bytes, count: int, before: int, served: Served) -> str:
    """A link that saves the stream, and how large it is."""
    pixels = served.shape[0] * served.shape[1] * served.shape[2]
    facts = (
        f"{count} images: {len(data):,} bytes, {len(data) / count:.1f} an image and "
        f"{8 * len(data) / (count * pixels):.3f} bits per dim (before: {before:,} bytes)"
    )
    address = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    return f'<a download="{STREAM}" href="{address}">Save {STREAM}</a><p>{html.escape(facts)}</p>'
