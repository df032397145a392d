"""The Complete tab: paint over part of an image and regenerate it."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from .. import controls
from ..parts import Samples, make_code_field, make_gallery, make_image_picker, make_run_buttons, on_click, zoom
from ..served import Picked, Served, Step, as_picture, picked_image, report_tokens

MOST_DRAWS = 16
PAINT = "#FFF4E6D8"  # translucent white, with a tint that does not occur in grey images
TOOLBAR = 62  # height of the editor beyond its canvas, in screen pixels


def build(served: Served, samples: Samples) -> None:
    """Build the tab."""
    pipeline, (height, width) = served.pipeline, served.spec.size
    most, times = min(MOST_DRAWS, served.max_images), zoom(width, "canvas")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image, picks = make_image_picker(served, "complete-image", samples)
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
            inverted = gr.Checkbox(False, label="Keep the painted area and regenerate the rest")
        with gr.Column(scale=1, min_width=300):
            label = controls.make_class_menu(pipeline, several=False)
            fields = controls.make_condition_fields(served, "complete")
            draws = gr.Slider(1, most, value=min(4, most), step=1, label="Completions")
            seed = controls.make_seed_field()
            buttons = make_run_buttons("Complete")
            settings = [*controls.make_sliders(pipeline), *fields]
            completed = make_gallery("completed", "medium")
            line = make_code_field(served)
    for pick in picks:
        pick.then(served.handler(canvas), image, editor)
    inputs = [image, editor, inverted, label, draws, seed, *settings]
    on_click(served, buttons, complete, inputs, [completed, line])


def canvas(served: Served, step: Step, picked: Picked) -> np.ndarray | None:
    """Enlarge the image for the editor, so that it can be painted on."""
    if not picked:
        return None
    image = as_picture(picked_image(picked, served.spec)[0]).convert("RGB")
    times = zoom(image.width, "canvas")
    return np.asarray(image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST))


def painted(editor: Any, width: int, height: int) -> np.ndarray:
    """Return the pixels that are at least half painted, bool `(height, width)`. Raises `ValueError` if nothing is
    painted."""
    layers = (editor or {}).get("layers") or []
    found = np.zeros((height, width), dtype=bool)
    for layer in layers:
        alpha = Image.fromarray(layer[..., 3]).resize((width, height), Image.Resampling.BOX)
        found |= np.asarray(alpha) >= int(PAINT[-2:], 16) // 2
    if not found.any():
        raise ValueError("nothing is painted: paint over the area to regenerate")
    return found


def complete(
    served: Served,
    step: Step,
    picked: Picked,
    editor: Any,
    inverted: bool,
    label: Any,
    draws: Any,
    seed: Any,
    *values: Any,
) -> Any:
    """Return the mask and the completions with captions, and Python code."""
    pipeline, (height, width) = served.pipeline, served.spec.size
    pixels = picked_image(picked, served.spec)
    hidden = painted(editor, width, height) != bool(inverted)
    arguments = {"draws": int(draws), **controls.sampling_arguments(pipeline, label, 1, seed, values)}
    out = pipeline.complete(pixels, mask=hidden, **arguments, progress=False, callback_on_step_end=report_tokens(step))
    found = out.images if int(draws) == 1 else out.images[0]
    lines = [
        "from PIL import Image",
        "# the mask is the first picture above; the white area is regenerated",
        'image, mask = Image.open("image.png"), Image.open("mask.png")',
        f"out = pipe.complete(image, mask=mask{controls.format_arguments(arguments)})",
    ]
    images = [(Image.fromarray(hidden), "mask"), *((image, f"completion {k}") for k, image in enumerate(found, 1))]
    return images, served.code(*lines)
