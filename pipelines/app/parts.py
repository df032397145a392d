"""Widgets shared by several tabs: pictures, image pickers, buttons, and lines of Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr

from .served import Picked, Served

SIDES = {"tiny": 56, "small": 112, "medium": 168, "large": 224, "canvas": 336}
"""Width of a picture in screen pixels, before rounding to a whole multiple of its own width."""


class SampleGallery(NamedTuple):
    """The pictures of the first tab, and the index of the selected picture."""

    gallery: gr.Gallery
    selected: gr.State


def zoom(width: int, side: str) -> int:
    """Return the screen pixels per pixel for a picture of `width` pixels."""
    return max(1, round(SIDES[side] / width))


def make_gallery(name: str, side: str = "small") -> gr.Gallery:
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


def make_picker(served: Served, name: str, label: str, height: int = 140, visible: bool = True) -> gr.Gallery:
    """Make a field for uploading images. Unlike `gr.Image`, it leaves decoding to us."""
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
        visible=visible,
        buttons=[],
    )


def make_condition_picker(served: Served, tab: str, name: str) -> gr.Gallery:
    """Make a field, invisible at first, for the picture of the column `name`."""
    picked = make_picker(served, f"{tab}-{name}", name, visible=False)
    picked.upload(pick_last, picked, picked, queue=False)
    return picked


def make_image_picker(served: Served, name: str, samples: SampleGallery) -> tuple[gr.Gallery, list[Any]]:
    """Make a field for one image, and a button that fills it with the selected sample; also return both events."""
    picked = make_picker(served, name, "Image")
    use = gr.Button("Use the selected sample", size="sm")
    upload = picked.upload(pick_last, picked, picked, queue=False)
    return picked, [upload, use.click(pick_sample, [*samples], picked, queue=False)]


def pick_last(picked: Picked) -> Picked:
    return (picked or [])[-1:]


def pick_sample(samples: Picked, selected: int) -> Picked:
    return (samples or [])[selected:][:1]


def make_run_buttons(title: str) -> tuple[gr.Button, gr.Button]:
    """Make a start button and a stop button."""
    with gr.Row():
        start = gr.Button(title, variant="primary", min_width=120)
        return start, gr.Button("Stop", min_width=80, elem_classes="smalti-stop")


def on_click(
    served: Served,
    buttons: Sequence[gr.Button],
    work: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    page: gr.Blocks | None = None,
) -> None:
    """Let the first button start `work`, and the second, if any, stop it. Only one request runs at a time.

    page: also start `work` when this page is opened.
    """
    start, *stops = buttons
    options: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1, "show_progress_on": outputs[:1]}
    start.click(served.handler(work), inputs, outputs, **options)
    if page is not None:
        page.load(served.handler(work), inputs, outputs, **options)
    for stop in stops:
        stop.click(served.stop, None, None, queue=False)


def make_code_field(served: Served) -> gr.Code:
    """Make a field for the equivalent Python code."""
    title = "The same in Python"
    return gr.Code(
        served.code(), language="python", label=title, interactive=False, lines=4, max_lines=14, wrap_lines=True
    )
