"""The Complete tab: paint over part of an image and regenerate it, or continue a clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from torch import Tensor

from tokenizer.spec import to_float

from .. import controls
from ..parts import SampleGallery, make_code_field, make_gallery, make_image_picker, make_run_buttons, on_click, zoom
from ..served import Picked, ReportStep, Served, picked_image, report_tokens, to_gallery

MOST_DRAWS = 16
PAINT = "#FFF4E6D8"  # translucent white, with a tint that does not occur in grey images
TOOLBAR = 62  # height of the editor beyond its canvas, in screen pixels


def build_complete_tab(served: Served, samples: SampleGallery) -> None:
    pipeline, most = served.pipeline, min(MOST_DRAWS, served.max_images)
    work, make_fields = (complete_image, make_editor) if pipeline.frames == 1 else (continue_clip, make_frames_field)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image, picks = make_image_picker(served, "complete-image", samples)
            area = make_fields(served, image, picks)
        with gr.Column(scale=1, min_width=300):
            label = controls.make_class_menu(pipeline, several=False)
            fields = controls.make_condition_fields(served, "complete")
            draws = gr.Slider(1, most, value=min(4, most), step=1, label="Completions")
            seed = controls.make_seed_field()
            buttons = make_run_buttons("Complete")
            settings = [*controls.make_sliders(pipeline), *fields]
            completed = make_gallery("completed", "medium")
            line = make_code_field(served)
    on_click(served, buttons, work, [image, *area, label, draws, seed, *settings], [completed, line])


def make_editor(served: Served, image: gr.Gallery, picks: Sequence[Any]) -> list[Any]:
    """Make the fields for the area to regenerate. image: the picker; picks: the events that fill it."""
    height, width = served.spec.size
    times = zoom(width, "canvas")
    editor = gr.ImageEditor(
        elem_id="painting",
        elem_classes="smalti",
        label="Paint over the area to regenerate",
        placeholder="Choose an image above",  # replaces gradio's hint to select a tool
        canvas_size=(width * times, height * times),
        height=height * times + TOOLBAR,
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=3 * times, colors=[PAINT], default_color=PAINT, color_mode="fixed"),
        eraser=gr.Eraser(default_size=3 * times),
        format="png",
        buttons=[],
    )
    for pick in picks:
        pick.then(served.handler(enlarge_image), image, editor)
    return [editor, gr.Checkbox(False, label="Keep the painted area and regenerate the rest")]


def make_frames_field(served: Served, image: gr.Gallery, picks: Sequence[Any]) -> list[Any]:
    last = served.pipeline.frames - 1
    about = "from the start; the others are sampled"
    return [gr.Slider(1, last, value=max(1, last // 4), step=1, label="Frames to keep", info=about)]


def enlarge_image(served: Served, step: ReportStep, picked: Picked) -> np.ndarray | None:
    """Enlarge the image for the editor, so that it can be painted on."""
    if not picked:
        return None
    image, times = to_float(picked_image(picked, served.spec)[0]), zoom(served.spec.width, "canvas")
    pixels = served.spec.picture(image)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).repeat(times, 0).repeat(times, 1)


def find_painted(editor: Any, width: int, height: int) -> np.ndarray:
    """Return the pixels that are at least half painted, bool `(height, width)`."""
    found = np.zeros((height, width), dtype=bool)
    for layer in (editor or {}).get("layers") or []:
        alpha = Image.fromarray(layer[..., 3]).resize((width, height), Image.Resampling.BOX)
        found |= np.asarray(alpha) >= int(PAINT[-2:], 16) // 2
    if not found.any():
        raise ValueError("nothing is painted: paint over the area to regenerate")
    return found


def complete_image(
    served: Served, step: ReportStep, picked: Picked, editor: Any, inverted: bool, label: Any, draws: Any, *values: Any
) -> Any:
    """Return the mask and the completions with captions, and Python code."""
    height, width = served.spec.size
    pixels = picked_image(picked, served.spec)
    hidden = find_painted(editor, width, height) != bool(inverted)
    found, others = complete_area(served, step, pixels, {"mask": hidden}, label, draws, values)
    lines = [
        "# the mask is the first picture above; the white area is regenerated",
        'image, mask = Image.open("image.png"), Image.open("mask.png")',
        f"out = pipe.complete(image, mask=mask{others})",
    ]
    return [(Image.fromarray(hidden), "mask"), *found], served.code(*lines)


def continue_clip(
    served: Served, step: ReportStep, picked: Picked, frames: Any, label: Any, draws: Any, *values: Any
) -> Any:
    """Return the clip and its completions with captions, and Python code."""
    pixels = picked_image(picked, served.spec)
    found, others = complete_area(served, step, pixels, {"frames": int(frames)}, label, draws, values)
    lines = [
        f"clip = {controls.format_open('clip', served.spec.shape[:-3], served.spec.channels)}",
        f"out = pipe.complete(clip, frames={int(frames)}{others})",
    ]
    return [(to_gallery(pixels[0]), "clip"), *found], served.code(*lines)


def complete_area(
    served: Served,
    step: ReportStep,
    pixels: Tensor,
    area: dict[str, Any],
    label: Any,
    draws: Any,
    values: Sequence[Any],
) -> tuple[list[tuple[Any, str]], str]:
    """Return the completions with captions, and the arguments as Python source. area: argument for what to sample."""
    arguments = {"draws": int(draws), **controls.sampling_arguments(served.pipeline, label, 1, *values)}
    options: dict[str, Any] = {"progress": False, "callback_on_step_end": report_tokens(step)}
    out = served.pipeline.complete(pixels, **area, **arguments, **options)
    found = out.images if int(draws) == 1 else out.images[0]
    images = [(to_gallery(image), f"completion {k}") for k, image in enumerate(found, 1)]
    return images, controls.format_arguments(arguments)
