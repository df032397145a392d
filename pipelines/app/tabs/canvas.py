"""The Canvas tab: images larger than the model, and a brush that repaints a part."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ...canvas import find_patch
from ...config.table import count_of
from ...images.formats import flatten
from .. import controls
from ..parts import make_code_field, make_run_buttons, on_click
from ..served import ReportStep, Served, report_tokens
from .complete import PAINT, TOOLBAR, find_painted

LARGEST, SHOWN = 8, 512  # windows along a side, and pixels of the editor's canvas


def build_canvas_tab(served: Served) -> None:
    """Build the tab, or a hint if the prior cannot continue a canvas."""
    pipeline = served.pipeline
    if not (pipeline.prior.any_order and pipeline.prior.exact and pipeline.tokenizer.placed and pipeline.frames == 1):
        gr.Markdown("Images larger than the model need a prior that is trained for any order, and tokens with a place.")
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            label = controls.make_class_menu(pipeline, several=False)
            sides = [
                gr.Slider(side, LARGEST * side, value=3 * side, step=by, label=name)
                for side, by, name in zip(served.spec.size, find_patch(pipeline), ("Height", "Width"), strict=True)
            ]
            wrap = gr.Checkbox(False, label="Wrap", info="opposite borders continue each other, for textures")
            seed = controls.make_seed_field()
            draw = make_run_buttons("Draw")
            repaint = make_run_buttons("Repaint")
            settings = controls.make_sliders(pipeline)
        with gr.Column(scale=2, min_width=300):
            drawn = gr.State(None)
            editor = gr.ImageEditor(
                elem_id="canvas",
                elem_classes="smalti",
                label="Paint over a part, and repaint it",
                placeholder="Draw an image first",
                canvas_size=(SHOWN, SHOWN),
                height=SHOWN + TOOLBAR,
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=24, colors=[PAINT], default_color=PAINT, color_mode="fixed"),
                eraser=gr.Eraser(default_size=24),
                format="png",
                buttons=[],
            )
            facts = gr.Markdown(elem_id="canvas-facts")
            line = make_code_field(served)
    inputs, outputs = [label, *sides, wrap, seed, *settings], [editor, drawn, facts, line]
    on_click(served, draw, draw_canvas, inputs, outputs)
    on_click(served, repaint, repaint_canvas, [editor, drawn, *inputs], outputs)


def draw_canvas(
    served: Served, step: ReportStep, label: Any, height: Any, width: Any, wrap: bool, seed: Any, *values: Any
) -> Any:
    """Return the picture for the editor, the picture, a line of facts, and Python code."""
    arguments = controls.sampling_arguments(served.pipeline, label, 1, seed, *values)
    arguments |= {"size": (int(height), int(width)), **({"wrap": True} if wrap else {})}
    out, seconds = run_timed(served.pipeline, step, 1, **arguments)
    code = [f"out = pipe(1{controls.format_arguments(arguments)})", "out.images[0]"]
    return show(out, seconds, served.code(*code))


def repaint_canvas(
    served: Served,
    step: ReportStep,
    editor: Any,
    drawn: np.ndarray | None,
    label: Any,
    height: Any,
    width: Any,
    wrap: bool,
    seed: Any,
    *values: Any,
) -> Any:
    """Draw the painted part again, given the rest; see `draw_canvas`."""
    if drawn is None:
        raise ValueError("draw an image first")
    mask = find_painted(editor, drawn.shape[1], drawn.shape[0])
    arguments = controls.sampling_arguments(served.pipeline, label, 1, seed, *values)
    arguments |= {"size": drawn.shape[:2], **({"wrap": True} if wrap else {})}
    out, seconds = run_timed(served.pipeline.complete, step, drawn[None], mask=mask, **arguments)
    code = [
        "# the white area of the mask is drawn again",
        'image, mask = Image.open("image.png"), Image.open("mask.png")',
        f"out = pipe.complete(image, mask=mask{controls.format_arguments(arguments)})",
    ]
    return show(out, seconds, served.code(*code))


def run_timed(draw: Any, step: ReportStep, *inputs: Any, **arguments: Any) -> tuple[Any, float]:
    began = time.monotonic()
    options = {"output_type": "np", "progress": False, "callback_on_step_end": report_tokens(step)}
    return draw(*inputs, **arguments, **options), time.monotonic() - began


def show(out: Any, seconds: float, code: str) -> Any:
    """Return the outputs of the tab."""
    image, plan = out.images[0], out.canvas.chain.plan_waves(out.canvas.known[0].flatten())
    picture = flatten(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)).convert("RGB")
    times = max(1, SHOWN // max(picture.size))
    large = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    waves = f"{count_of(sum(map(len, plan)), 'window')} in {count_of(len(plan), 'wave')}"
    return np.asarray(large), image, f"{picture.height} x {picture.width} pixels, {waves}, {seconds:.1f} s", code
