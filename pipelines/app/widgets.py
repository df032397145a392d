"""Controls that several tabs have, and what happens when a button is clicked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from .controls import cuts_orders, orders_of
from .elements import TAKE_CHOSEN, picker
from .jobs import MODEL
from .served import Served

LAST_SEED = 2**32 - 1


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
        return gr.Button(title, variant="primary", min_width=120), gr.Button("Stop", variant="secondary", min_width=80)


def take_button(title: str, gallery: gr.HTML, into: gr.HTML, code: str = TAKE_CHOSEN) -> gr.Button:
    """A button that fills a picker from the pictures of a gallery, in the browser."""
    button = gr.Button(title, size="sm")
    button.click(None, gallery, into, js=code, queue=False)
    return button


def image_picker(served: Served, name: str, gallery: gr.HTML) -> gr.HTML:
    """A picker of one image, and a button that takes the chosen sample."""
    found = picker(name, served.bounds.max_upload)
    take_button("Take the chosen sample", gallery, found)
    return found


def on_click(
    served: Served,
    button: gr.Button,
    stop: gr.Button | None,
    work: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    name: str,
) -> None:
    """Let a button start a job, and the other end it. All jobs wait for each other, as they share the pipeline."""
    options: dict[str, Any] = {"concurrency_id": MODEL, "concurrency_limit": 1, "show_progress_on": outputs[:1]}
    button.click(served.jobs.handler(work), inputs, outputs, api_name=name, **options)
    if stop is not None:
        stop.click(served.jobs.stop, None, None, queue=False, api_visibility="private")


def code_widget(served: Served, title: str = "The same in Python") -> gr.Code:
    """A place for the lines that do the same in Python, the first of which stand there from the start."""
    return gr.Code(served.code(), language="python", label=title, interactive=False, lines=4, max_lines=14)
