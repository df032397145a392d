"""Images to a small file, and back."""

from __future__ import annotations

import base64
import importlib.util
from typing import Any

import gradio as gr
import torch

from ...compression.coding import exact_pixels
from ..parts import Samples, on_click, picker, pictures
from ..served import Picked, Served, Step, picked_images

STREAM = "images.smalti"


def build(served: Served, samples: Samples) -> None:
    """The tab; without the coder, how to get it."""
    if importlib.util.find_spec("constriction") is None:
        gr.Markdown('Compression needs the package constriction where the app runs: `pip install "smalti[compress]"`')
        return
    tokenizer, (_, height, width) = served.pipeline.tokenizer, served.shape
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            images = picker(served, "compress-images", f"Images of {width} x {height} pixels", height=200)
            take = gr.Button("Take all samples", size="sm")
            can_keep = tokenizer.reversible or tokenizer.has_likelihood
            lossless = gr.Checkbox(False, label="Keep every pixel", visible=can_keep)
            button = gr.Button("Compress", variant="primary")
            link = gr.HTML(elem_id="stream-link", min_height=60)
        with gr.Column(scale=1, min_width=280):
            stream = gr.File(label=f"A file such as {STREAM}", type="binary", height=140, elem_id="stream")
            back = gr.Button("Decompress", variant="primary")
            facts = gr.Markdown(elem_id="stream-facts")
            found = pictures("decompressed")
    take.click(lambda picked: picked, samples.gallery, images, queue=False)

    on_click(served, [button], compress, [images, lossless], [link])
    on_click(served, [back], decompress, [stream], [facts, found])


def compress(served: Served, step: Step, picked: Picked, lossless: Any) -> str:
    """A link that saves the stream, and how large it is, in HTML."""
    images = picked_images(picked, served.max_images)
    batch = []
    for number, image in enumerate(images, 1):
        step(number - 1, len(images), "images")
        try:
            batch.append(exact_pixels(image, served.shape, bool(lossless)))
        except Exception as error:  # damaged files make Pillow raise almost anything
            raise ValueError(f"image {number}: {error}") from error
    data = served.pipeline.compress(torch.stack(batch), lossless=bool(lossless), progress=False)
    count = len(batch)
    facts = (
        f"{count} images: {len(data):,} bytes, {len(data) / count:.1f} an image and "
        f"{8 * len(data) / torch.stack(batch).numel():.3f} bits per dim"
    )
    address = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    return f'<a download="{STREAM}" href="{address}">Save {STREAM}</a><p>{facts}</p>'


def decompress(served: Served, step: Step, data: bytes | None) -> Any:
    """How many images a stream holds, and the images with their numbers. Raises `StreamError` for too many."""
    if not data:
        raise ValueError("pick a file first")
    images = served.pipeline.decompress(data, max_images=served.max_images, progress=False)
    facts = f"{len(images)} images from {len(data):,} bytes, {len(data) / max(1, len(images)):.1f} an image"
    return facts, [(image, str(number)) for number, image in enumerate(images, 1)]
