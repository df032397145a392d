"""The page: what the pipeline is, and a tab for each thing that it can do."""

from __future__ import annotations

import html

import gradio as gr

from ..image_pipeline import ImagePipeline
from .served import Served
from .tabs import anomaly, compare, complete, compress, sample, search

FONTS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")


def build_page(served: Served) -> gr.Blocks:
    """The page of a pipeline, not yet served."""
    tokenizer = served.pipeline.tokenizer
    with gr.Blocks(title=f"Smalti: {served.title}", analytics_enabled=False, fill_width=False) as page:
        gr.HTML(heading(served))
        with gr.Tab("Sample"):
            gallery = sample.build(served)
        with gr.Tab("Complete"):
            if tokenizer.placed and not tokenizer.grid.scales:
                complete.build(served, gallery)
            else:
                gr.Markdown("A token of this pipeline belongs to no part of the image, so that no part can be kept.")
        with gr.Tab("Compare"):
            compare.build(served, gallery)
        with gr.Tab("Anomaly"):
            anomaly.build(served, gallery)
        if served.train is not None:
            with gr.Tab("Search"):
                search.build(served, gallery, served.train)
        with gr.Tab("Compress"):
            compress.build(served, gallery)
        page.unload(served.jobs.stop)
    return page.queue(max_size=served.bounds.queue, api_open=False, default_concurrency_limit=1)


def heading(served: Served) -> str:
    """The name of the pipeline, and a line about it."""
    return f"<h2>{html.escape(served.title)}</h2><p>{html.escape(about(served.pipeline))}</p>"


def about(pipeline: ImagePipeline) -> str:
    """What a pipeline is made of, in a line."""
    channels, height, width = pipeline.tokenizer.image_shape
    grid, classes = pipeline.prior.grid, pipeline.prior.num_classes
    kind = {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")
    return (
        f"{pipeline.tokenizer.name} and {pipeline.prior.name}: {kind} images of {width} x {height} pixels as "
        f"{' x '.join(map(str, grid.shape))} tokens of {grid.vocab_size} ids, {classes or 'no'} classes"
    )


def theme() -> gr.themes.Base:
    """Plain, with the fonts of the visitor's system: none is fetched."""
    plain = gr.themes.Default(primary_hue="teal", font=FONTS, font_mono=MONO)
    return plain.set(block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400")
