"""The page: a description of the pipeline, and its tabs."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from ..image_pipeline import ImagePipeline
from .parts import SIDES, zoom
from .served import Served
from .tabs import anomaly, compare, complete, compress, sample, search

KEEP_SECONDS = 3600
"""Minimum time that uploads and pictures stay on disk."""


def build_page(served: Served, queue: int = 8) -> gr.Blocks:
    """Build the page of a pipeline. queue: maximum number of waiting requests."""
    tokenizer, title = served.pipeline.tokenizer, "/".join(served.name.rstrip("/").split("/")[-2:])
    with gr.Blocks(
        title=f"Smalti: {title}", analytics_enabled=False, delete_cache=(KEEP_SECONDS // 10, KEEP_SECONDS)
    ) as page:
        gr.Markdown(f"## {title}\n{describe_pipeline(served.pipeline)}")
        with gr.Tab("Sample"):
            samples = sample.build(served, page)
        with gr.Tab("Complete"):
            if tokenizer.placed and not tokenizer.grid.scales:
                complete.build(served, samples)
            else:
                gr.Markdown("This pipeline cannot complete images, because its tokens have no position in the image.")
        with gr.Tab("Compare"):
            compare.build(served, samples)
        with gr.Tab("Anomaly"):
            anomaly.build(served, samples)
        if served.train is not None:
            with gr.Tab("Search"):
                search.build(served, samples, served.train)
        with gr.Tab("Compress"):
            compress.build(served, samples)
        page.unload(served.stop)
    return page.queue(max_size=queue, api_open=False, default_concurrency_limit=1)


def describe_pipeline(pipeline: ImagePipeline) -> str:
    """Describe a pipeline in two sentences."""
    channels, height, width = pipeline.tokenizer.image_shape
    grid, classes = pipeline.prior.grid, pipeline.prior.num_classes
    names = ", ".join(pipeline.conditions)
    kind = {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")
    return (
        f"This pipeline generates {kind} images of {width} × {height} "
        f"pixels{f' in {classes} classes' * bool(classes)}"
        f"{f', given {names}' * bool(names)}. "
        f"Its tokenizer ({pipeline.tokenizer.name}) turns an image into {' × '.join(map(str, grid.shape))} tokens of "
        f"a vocabulary of {grid.vocab_size:,}; its prior ({pipeline.prior.name}) generates the tokens."
    )


def make_css(served: Served) -> str:
    """Return the style sheet, which scales pictures by whole numbers and puts captions below them."""
    width = served.shape[-1]
    sides = [f".smalti-{side} {{ --side: {width * zoom(width, side)}px; }}" for side in SIDES]
    return "\n".join([*sides, Path(__file__).with_name("page.css").read_text(encoding="utf-8")])


def make_theme() -> gr.themes.Base:
    """Return a plain theme with system fonts, so that no font is downloaded."""
    mono = ("ui-monospace", "monospace")
    plain = gr.themes.Default(primary_hue="teal", font=("system-ui", "sans-serif"), font_mono=mono)
    return plain.set(block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400")
