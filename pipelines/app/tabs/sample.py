"""Draw images."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from ..controls import (
    chosen_settings,
    classes_widget,
    cuts_orders,
    labels_for,
    order_for,
    orders_of,
    settings_of,
)
from ..elements import pictures, shown
from ..jobs import MODEL, Job
from ..served import Served, drawn, keywords, written_labels
from ..uploads import whole

LAST_SEED = 2**32 - 1


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
            with gr.Accordion("Settings", open=False):
                widgets = [setting.widget(len(pipeline.prior.grid)) for setting in settings]
            button, stop = run_buttons("Sample")
        with gr.Column(scale=2, min_width=300):
            gallery = pictures("samples")
            facts = gr.Markdown("Click a picture to choose it for the other tabs.", elem_id="sample-facts")
            line = gr.Code(language="python", label="The same images in Python", interactive=False)

    def work(job: Job, classes: Any, number: Any, seed: Any, order: Any, passes: Any, *values: Any) -> Any:
        count, first = whole(number, "the number of images", 1, most), whole(seed, "seed", 0, LAST_SEED)
        labels = labels_for(pipeline, classes, count)
        options = chosen_settings(settings, values, pipeline.prior.grid.vocab_size)
        if named := order_for(pipeline.prior, order, passes):
            options["order"] = named
        began = time.monotonic()
        out = drawn(job, pipeline, count, labels, seed=first, output_type="np", **options)
        told = f"{count} images in {time.monotonic() - began:.1f} s. Click a picture to choose it for the other tabs."
        call = f"out = pipe({count}, seed={first}{keywords(written_labels(labels) | options)})"
        return shown(list(out.images), captions(labels, first, count), chosen=0), told, served.code(call, "out.images")

    inputs = [classes, number, seed, order, passes, *widgets]
    run(served, button, stop, work, inputs, [gallery, facts, line], "sample")
    return gallery


def captions(labels: list[int | str | None] | None, seed: int, count: int) -> list[str]:
    """Of each image its class and its seed, by which it can be drawn alone."""
    named = ["" if labels is None or labels[k] is None else f"{labels[k]} · " for k in range(count)]
    return [f"{named[k]}seed {seed + k}" for k in range(count)]


# Parts that other tabs have too


def seed_widget() -> gr.Number:
    """A number that makes the same images again."""
    seed = gr.Number(0, precision=0, minimum=0, maximum=LAST_SEED, label="Seed", info="image k uses seed + k")
    other = gr.Button("Another seed", size="sm")
    other.click(None, None, seed, js="() => Math.floor(Math.random() * 1e6)", queue=False)
    return seed


def walk_widgets(served: Served) -> tuple[Any, Any]:
    """The order, where the prior takes one, and the number of passes, where that is a choice of blocks."""
    prior = served.pipeline.prior
    names = orders_of(prior)
    if not names:
        return gr.State(None), gr.State(None)
    choices = [(f"its own ({prior.config.order})", ""), *((name, name) for name in names)]
    order = gr.Dropdown(choices, value="", label="Order", info="in which the tokens are drawn")
    if not cuts_orders(prior):
        return order, gr.State(None)
    own, tokens = len(prior.blocks), len(prior.config.positions)
    about = f"0: as many as the order has ({own} of its own); fewer are quicker, and cost likelihood"
    return order, gr.Slider(0, tokens, value=0, step=1, label="Passes", info=about)


def run_buttons(title: str) -> tuple[gr.Button, gr.Button]:
    """A button that starts, and one that stops."""
    with gr.Row():
        return gr.Button(title, variant="primary", min_width=120), gr.Button("Stop", variant="stop", min_width=80)


def run(
    served: Served, button: gr.Button, stop: gr.Button | None, work: Any, inputs: list[Any], outputs: list[Any], name: str
) -> Any:
    """Let a button start a job, and the other end it; all jobs wait for each other."""
    event = button.click(
        served.jobs.handler(work),
        inputs,
        outputs,
        api_name=name,
        concurrency_id=MODEL,
        concurrency_limit=1,
        show_progress_on=outputs[:1],
    )
    if stop is not None:
        stop.click(served.jobs.stop, None, None, queue=False, api_visibility="private")
    return event
