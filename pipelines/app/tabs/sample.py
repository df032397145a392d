"""Draw images."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from ..controls import chosen_settings, classes_widget, labels_code, labels_for, order_for, settings_of
from ..elements import pictures, shown
from ..jobs import Job
from ..served import Served, drawn, keywords
from ..uploads import whole
from ..widgets import LAST_SEED, code_widget, on_click, run_buttons, seed_widget, walk_widgets


def build(served: Served) -> gr.HTML:
    """The tab; returns its pictures, of which a visitor chooses one for the other tabs."""
    pipeline, most = served.pipeline, served.bounds.max_images
    settings = settings_of(pipeline, served.described)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            classes = classes_widget(pipeline, several=True) or gr.State(None)
            number = gr.Slider(1, most, value=min(16, most), step=1, label="Images", elem_id="number")
            seed = seed_widget()
            order, passes = walk_widgets(served)
            button, stop = run_buttons("Sample")
            with gr.Accordion("Settings", open=False):
                widgets = [setting.widget(len(pipeline.prior.grid)) for setting in settings]
        with gr.Column(scale=2, min_width=300):
            gallery = pictures("samples")
            facts = gr.Markdown("Click a picture to choose it for the other tabs.", elem_id="sample-facts")
            line = code_widget(served, "The same images in Python")

    def work(job: Job, classes: Any, number: Any, seed: Any, order: Any, passes: Any, *values: Any) -> Any:
        count, first = whole(number, "the number of images", 1, most), whole(seed, "seed", 0, LAST_SEED)
        labels = labels_for(pipeline, classes, count)
        options = chosen_settings(settings, values, pipeline.prior.grid.vocab_size)
        if named := order_for(pipeline.prior, order, passes):
            options["order"] = named
        began = time.monotonic()
        out = drawn(job, pipeline, count, labels, seed=first, output_type="np", **options)
        told = f"{count} images in {time.monotonic() - began:.1f} s. Click a picture to choose it for the other tabs."
        call = f"out = pipe({count}, seed={first}{labels_code(pipeline, labels)}{keywords(options)})"
        return shown(list(out.images), captions(labels, first, count), chosen=0), told, served.code(call, "out.images")

    inputs = [classes, number, seed, order, passes, *widgets]
    on_click(served, button, stop, work, inputs, [gallery, facts, line], "sample")
    return gallery


def captions(labels: list[int | str | None] | None, seed: int, count: int) -> list[str]:
    """Of each image its class and its seed, by which it can be drawn alone."""
    named = ["" if labels is None or labels[k] is None else f"{labels[k]} · " for k in range(count)]
    return [f"{named[k]}seed {seed + k}" for k in range(count)]
