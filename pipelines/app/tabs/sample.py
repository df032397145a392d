"""The Sample tab: generate images."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from ...config.table import count_of
from .. import controls
from ..parts import SampleGallery, make_code_field, make_gallery, make_run_buttons, on_click
from ..served import ReportStep, Served, report_tokens, to_gallery

CLICK_HINT = "Click a picture to use it in the other tabs."


def build_sample_tab(served: Served, page: gr.Blocks) -> SampleGallery:
    """Build the tab, which samples when the page is opened, and return its pictures for the other tabs."""
    pipeline, most = served.pipeline, served.max_images
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            classes = controls.make_class_menu(pipeline, several=True)
            fields = controls.make_condition_fields(served, "sample")
            number = gr.Slider(1, most, value=min(16, most), step=1, label=f"{served.spec.noun.capitalize()}s")
            seed = controls.make_seed_field()
            order = controls.make_order_menu(pipeline.prior)
            buttons = make_run_buttons("Sample")
            settings = [*controls.make_sliders(pipeline), *fields]
        with gr.Column(scale=2, min_width=300):
            gallery, selected = make_gallery("samples"), gr.State(0)
            facts = gr.Markdown(CLICK_HINT, elem_id="sample-facts")
            line = make_code_field(served)
    inputs, outputs = [classes, number, seed, order, *settings], [gallery, selected, facts, line]
    on_click(served, buttons, sample_and_select, inputs, outputs, page)
    gallery.select(find_clicked, None, selected, queue=False)
    return SampleGallery(gallery, selected)


def find_clicked(event: gr.SelectData) -> int:
    return int(event.index)


def sample_and_select(served: Served, step: ReportStep, *values: Any) -> Any:
    """Return the outputs of the tab, with the first picture selected."""
    images, facts, code = sample_images(served, step, *values)
    return gr.Gallery(images, selected_index=0), 0, facts, code


def sample_images(
    served: Served, step: ReportStep, classes: Any, number: Any, seed: Any, order: Any, *values: Any
) -> Any:
    """Return images with captions, a line of facts, and Python code."""
    pipeline, count = served.pipeline, int(number)
    arguments = controls.sampling_arguments(pipeline, classes, count, seed, *values)
    if order:
        arguments["order"] = order
    began = time.monotonic()
    out = pipeline(count, **arguments, progress=False, callback_on_step_end=report_tokens(step))
    facts = f"{count_of(count, served.spec.noun)} in {time.monotonic() - began:.1f} s. {CLICK_HINT}"
    labels = arguments["labels"] or [None] * count
    names = ["" if label is None else f"{label} · " for label in labels]
    images = [(to_gallery(image), f"{names[k]}seed {arguments['seed'] + k}") for k, image in enumerate(out.images)]
    lines = [f"out = pipe({count}{controls.format_arguments(arguments)})", "out.images"]
    return images, facts, served.code(*lines)
