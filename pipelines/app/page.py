"""The page of each pipeline: its description, and its tabs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from ..image_pipeline import ImagePipeline
from .parts import SIDES, zoom
from .served import Served
from .tabs.anomaly import build_anomaly_tab
from .tabs.canvas import build_canvas_tab
from .tabs.compare import build_compare_tab
from .tabs.complete import build_complete_tab
from .tabs.compress import build_compress_tab
from .tabs.infer import build_infer_tab
from .tabs.sample import build_sample_tab
from .tabs.search import build_search_tab

KEEP_SECONDS = 3600  # minimum time that uploads and pictures stay on disk


def build_page(served: Sequence[Served], queue: int = 8) -> gr.Blocks:
    """Build the page of each pipeline, the first at `/`. queue: maximum number of waiting requests."""
    first, *others = titles = [title_of(each) for each in served]
    names = ", ".join(titles)
    with gr.Blocks(
        title=f"Smalti: {names}", analytics_enabled=False, delete_cache=(KEEP_SECONDS // 10, KEEP_SECONDS)
    ) as page:
        fill_page(page, served[0], home=first if others else None)
    for title, each in zip(others, served[1:], strict=True):
        with page.route(title):
            fill_page(page, each, home=first)
    return page.queue(max_size=queue, api_open=False, default_concurrency_limit=1)


def title_of(served: Served) -> str:
    """Return the last two parts of the pipeline's name."""
    return "/".join(served.name.rstrip("/").split("/")[-2:])


def fill_page(page: gr.Blocks, served: Served, home: str | None) -> None:
    """Add the description and the tabs of a pipeline. home: title of the first page, if there are several."""
    tokenizer = served.pipeline.tokenizer
    if home is not None:
        gr.Navbar(main_page_name=home)
    with gr.Column(elem_classes=f"smalti-of-{served.spec.width}"):
        gr.Markdown(f"## {title_of(served)}\n{describe_pipeline(served.pipeline)}")
        with gr.Tab("Sample"):
            samples = build_sample_tab(served, page)
        with gr.Tab("Complete"):
            if tokenizer.placed and not tokenizer.grid.scales:
                build_complete_tab(served, samples)
            else:
                gr.Markdown("This pipeline cannot complete images, because its tokens have no position in the image.")
        with gr.Tab("Canvas"):
            build_canvas_tab(served)
        with gr.Tab("Compare"):
            build_compare_tab(served, samples)
        with gr.Tab("Infer"):
            build_infer_tab(served, samples)
        with gr.Tab("Anomaly"):
            build_anomaly_tab(served, samples)
        if served.train is not None:
            with gr.Tab("Search"):
                build_search_tab(served, samples, served.train)
        with gr.Tab("Compress"):
            build_compress_tab(served, samples)
    page.unload(served.stop)


def describe_pipeline(pipeline: ImagePipeline) -> str:
    """Describe a pipeline in two sentences."""
    grid, classes = pipeline.prior.grid, pipeline.prior.num_classes
    names = ", ".join(pipeline.prior.config.conditions)
    return (
        f"This pipeline generates {pipeline.spec.describe()}{f' in {classes} classes' * bool(classes)}"
        f"{f', given {names}' * bool(names)}. "
        f"Its tokenizer ({pipeline.tokenizer.name}) turns each {pipeline.spec.noun} into "
        f"{' × '.join(map(str, grid.shape))} tokens of a vocabulary of {grid.vocab_size:,}; "
        f"its prior ({pipeline.prior.name}) generates the tokens."
    )


def make_css(served: Sequence[Served]) -> str:
    """Return the style sheet, which scales pictures by whole numbers and puts captions below them."""
    widths = dict.fromkeys(each.spec.width for each in served)
    sides = [
        f".smalti-of-{width} .smalti-{side} {{ --side: {width * zoom(width, side)}px; }}"
        for width in widths
        for side in SIDES
    ]
    return "\n".join([*sides, Path(__file__).with_name("page.css").read_text(encoding="utf-8")])


def make_theme() -> gr.themes.Base:
    """Return a plain theme with system fonts, so that no font is downloaded."""
    mono = ("ui-monospace", "monospace")
    plain = gr.themes.Default(primary_hue="teal", font=("system-ui", "sans-serif"), font_mono=mono)
    return plain.set(block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400")
