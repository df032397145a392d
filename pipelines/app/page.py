"""The page: what the pipeline is, and a tab for each thing that it can do."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from ..image_pipeline import ImagePipeline
from .parts import SIDES, zoom
from .served import Served
from .tabs import anomaly, compare, complete, compress, sample, search

KEPT = 3600
"""Seconds for which the files of a visitor, uploads and pictures, are kept at least."""


def build_page(served: Served, queue: int = 8) -> gr.Blocks:
    """The page of a pipeline, not yet served. queue: how many requests may wait."""
    tokenizer, title = served.pipeline.tokenizer, "/".join(served.name.rstrip("/").split("/")[-2:])
    with gr.Blocks(title=f"Smalti: {title}", analytics_enabled=False, delete_cache=(KEPT // 10, KEPT)) as page:
        gr.Markdown(f"## {title}\n{about(served.pipeline)}")
        with gr.Tab("Sample"):
            samples = sample.build(served)
        with gr.Tab("Complete"):
            if tokenizer.placed and not tokenizer.grid.scales:
                complete.build(served, samples)
            else:
                gr.Markdown("A token of this pipeline belongs to no part of the image, so that no part can be kept.")
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


def about(pipeline: ImagePipeline) -> str:
    """What a pipeline is made of, in a line."""
    channels, height, width = pipeline.tokenizer.image_shape
    grid, classes = pipeline.prior.grid, pipeline.prior.num_classes
    kind = {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")
    return (
        f"{pipeline.tokenizer.name} and {pipeline.prior.name}: {kind} images of {width} x {height} pixels as "
        f"{' x '.join(map(str, grid.shape))} tokens of {grid.vocab_size} ids, {classes or 'no'} classes"
    )


def css(served: Served) -> str:
    """Pictures in whole screen pixels a pixel, and their captions below them."""
    width = served.shape[-1]
    sides = [f".smalti-{side} {{ --side: {width * zoom(width, side)}px; }}" for side in SIDES]
    return "\n".join([*sides, Path(__file__).with_name("page.css").read_text(encoding="utf-8")])


def theme() -> gr.themes.Base:
    """Plain, with the fonts of the visitor's system: none is fetched."""
    mono = ("ui-monospace", "monospace")
    plain = gr.themes.Default(primary_hue="teal", font=("system-ui", "sans-serif"), font_mono=mono)
    return plain.set(block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400")
