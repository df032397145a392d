"""The Compress tab: images to a small file, and back."""

from __future__ import annotations

import base64
import importlib.util
from typing import Any

import gradio as gr
import torch

from ...compression.coding import read_exact
from ...config.table import count_of
from ...images.formats import WEB_FORMATS
from ..parts import SampleGallery, make_gallery, make_picker, on_click
from ..served import Picked, ReportStep, Served, picked_images, to_gallery

STREAM = "images.smalti"
LOSSY = "only the tokens are stored, which decompress to reconstructions"


def build_compress_tab(served: Served, samples: SampleGallery) -> None:
    """Build the tab, or a hint if the coder is not installed."""
    if importlib.util.find_spec("constriction") is None:
        gr.Markdown('Compression needs the package constriction on the server: `pip install "smalti[compress]"`')
        return
    tokenizer, noun, (height, width) = served.pipeline.tokenizer, served.spec.noun, served.spec.size
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            images = make_picker(
                served, "compress-images", f"{noun.capitalize()}s of {width} x {height} pixels", height=200
            )
            use = gr.Button("Use all samples", size="sm")
            can_keep = tokenizer.reversible or tokenizer.has_likelihood
            about = f"otherwise {LOSSY}"
            lossless = gr.Checkbox(False, label="Lossless: store every pixel", info=about, visible=can_keep)
            if not can_keep:
                gr.Markdown(f"Lossy: {LOSSY}.")
            button = gr.Button("Compress", variant="primary")
            link = gr.HTML(elem_id="stream-link", min_height=60)
        with gr.Column(scale=1, min_width=280):
            stream = gr.File(label=f"Compressed file, such as {STREAM}", type="binary", height=140, elem_id="stream")
            back = gr.Button("Decompress", variant="primary")
            facts = gr.Markdown(elem_id="stream-facts")
            found = make_gallery("decompressed")
    use.click(lambda picked: picked, samples.gallery, images, queue=False)

    on_click(served, [button], compress_images, [images, lossless], [link])
    on_click(served, [back], decompress_stream, [stream], [facts, found])


def compress_images(served: Served, step: ReportStep, picked: Picked, lossless: Any) -> str:
    """Return a download link for the stream and its size, in HTML."""
    images, noun, batch = picked_images(picked, served.max_images, served.spec), served.spec.noun, []
    for number, image in enumerate(images, 1):
        step(number - 1, len(images), f"{noun}s")
        try:
            batch.append(read_exact(image, served.spec, bool(lossless), WEB_FORMATS))
        except Exception as error:  # damaged files make Pillow raise almost anything
            raise ValueError(f"{noun} {number}: {error}") from error
    data, count = served.pipeline.compress(torch.stack(batch), lossless=bool(lossless), progress=False), len(batch)
    stored = "every pixel is stored" if lossless else LOSSY
    facts = (
        f"{count_of(count, noun)}: {len(data):,} bytes, {len(data) / count:.1f} per {noun}, "
        f"{8 * len(data) / torch.stack(batch).numel():.3f} bits per dim; {stored}"
    )
    address = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    return f'<a download="{STREAM}" href="{address}">Save {STREAM}</a><p>{facts}</p>'


def decompress_stream(served: Served, step: ReportStep, data: bytes | None) -> Any:
    """Return a summary of a stream, and its images with their numbers. Raises `StreamError` for too many."""
    if not data:
        raise ValueError("choose a file first")
    images = served.pipeline.decompress(data, max_images=served.max_images, progress=False)
    noun, each = served.spec.noun, len(data) / max(1, len(images))
    facts = f"{count_of(len(images), noun)} from {len(data):,} bytes, {each:.1f} per {noun}"
    return facts, [(to_gallery(image), str(number)) for number, image in enumerate(images, 1)]
