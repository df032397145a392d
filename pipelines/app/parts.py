"""The parts that several tabs have: pictures in crisp pixels, a picker of images, buttons, and lines of Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr

from .served import Picked, Served

SIDES = {"tiny": 56, "small": 112, "medium": 168, "large": 224, "canvas": 336}
"""How many screen pixels a picture is wide, or the nearest whole multiple of its own width."""


class Samples(NamedTuple):
    """The pictures of the first tab, and the number of the one that a visitor has chosen."""

    gallery: gr.Gallery
    chosen: gr.State


def zoom(width: int, side: str) -> int:
    """How many screen pixels wide a pixel is, of a picture of `width` pixels."""
    return max(1, round(SIDES[side] / width))


def pictures(name: str, side: str = "small") -> gr.Gallery:
    """A place for pictures with captions."""
    return gr.Gallery(
        elem_id=name,
        elem_classes=["smalti", f"smalti-{side}"],
        format="png",
        interactive=False,
        allow_preview=False,
        show_label=False,
        container=False,
        buttons=[],
    )


def picker(served: Served, name: str, label: str, height: int = 140) -> gr.Gallery:
    """A place to which a visitor uploads images. Unlike `gr.Image`, it leaves it to us to decode them."""
    return gr.Gallery(
        elem_id=name,
        elem_classes=["smalti", "smalti-tiny", "smalti-picker"],
        label=f"{label}, at most {served.max_upload_mb:g} MB",
        format="png",
        type="filepath",
        file_types=["image"],
        sources=["upload", "clipboard"],
        interactive=True,
        allow_preview=False,
        height=height,
        buttons=[],
    )


def image_picker(served: Served, name: str, samples: Samples) -> tuple[gr.Gallery, list[Any]]:
    """A picker of one image, the last that was uploaded, with a button that takes the chosen sample; and the two events
    that fill it."""
    picked = picker(served, name, "Image")
    take = gr.Button("Take the chosen sample", size="sm")
    upload = picked.upload(last_picked, picked, picked, queue=False)
    return picked, [upload, take.click(chosen_sample, [*samples], picked, queue=False)]


def last_picked(picked: Picked) -> Picked:
    """The image that was uploaded last."""
    return (picked or [])[-1:]


def chosen_sample(samples: Picked, chosen: int) -> Picked:
    """The sample that a visitor has chosen, if there is one."""
    return (samples or [])[chosen:][:1]


def run_buttons(title: str) -> tuple[gr.Button, gr.Button]:
    """A button that starts, and one that stops."""
    with gr.Row():
        return gr.Button(title, variant="primary", min_width=120), gr.Button("Stop", min_width=80)


def on_click(
    served: Served, buttons: Sequence[gr.Button], work: Callable[..., Any], inputs: list[Any], outputs: list[Any]
) -> None:
    """Let the first button start `work`, and the second, if there is one, stop it. All work waits for each other."""
    start, *stops = buttons
    options: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1, "show_progress_on": outputs[:1]}
    start.click(served.handler(work), inputs, outputs, **options)
    for stop in stops:
        stop.click(served.stop, None, None, queue=False)


def code_widget(served: Served) -> gr.Code:
    """A place for the lines that do the same in Python, the first of which stand there from the start."""
    title = "The same in Python"
    return gr.Code(
        served.code(), language="python", label=title, interactive=False, lines=4, max_lines=14, wrap_lines=True
    )
