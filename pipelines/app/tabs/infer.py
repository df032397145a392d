"""The Infer tab: what an image says of a column."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from ...inference.posterior import Posterior, format_value
from ...inference.sheets import draw_evidence
from ..controls import (
    UNCONDITIONAL,
    condition_arguments,
    format_arguments,
    format_open,
    make_class_menu,
    make_condition_fields,
)
from ..parts import SampleGallery, make_code_field, make_gallery, make_image_picker, on_click
from ..served import Picked, ReportStep, Served, picked_image


def build_infer_tab(served: Served, samples: SampleGallery) -> None:
    """Build the tab, or a hint if the prior has no columns that can be inferred."""
    columns = [
        name for name, column in served.pipeline.columns.items() if column.list_values() is not None or column.span
    ]
    if not columns:
        gr.Markdown("This pipeline has no class and no column of flags, a number or an angle that could be inferred.")
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image, _ = make_image_picker(served, "infer-image", samples)
            column = gr.Dropdown(columns[::-1], value=columns[-1], label="Infer")
            label = make_class_menu(served.pipeline, several=False) if len(columns) > 1 else gr.State(UNCONDITIONAL)
            fields = make_condition_fields(served, "infer")
            button = gr.Button("Infer", variant="primary")
        with gr.Column(scale=2, min_width=300):
            facts = gr.Markdown(elem_id="infer-facts", min_height=80)
            drawn = gr.Image(format="png", elem_id="inferred", show_label=False, interactive=False)
            evidence = make_gallery("evidence", "large")
            line = make_code_field(served)

    on_click(served, [button], infer_upload, [image, column, label, *fields], [facts, drawn, evidence, line])


def infer_upload(
    served: Served, step: ReportStep, picked: Picked, column: str, label: Any = UNCONDITIONAL, *fields: Any
) -> Any:
    """Return the summary in Markdown, the probabilities, where the evidence lies, and Python code."""
    pipeline, batch = served.pipeline, picked_image(picked, served.spec)
    arguments = condition_arguments(pipeline, label, fields)
    labels, condition = arguments["labels"], dict(arguments.get("condition", {}))
    if labels is not None and labels[0] is not None:
        condition["label"] = labels[0]
    posterior = pipeline.infer(batch, column, condition=condition, groups=[served.spec.noun])
    pictures, tokenizer = [], pipeline.tokenizer
    if tokenizer.placed and not tokenizer.grid.scales and len(served.spec.shape) == 3:
        sheet = draw_evidence(pipeline, batch, posterior, condition)
        pictures = [(Image.fromarray(sheet), "what speaks for the first value (red) and for the second (blue)")]
    given = format_arguments({"condition": condition} if condition else {})
    lines = [
        f"image = {format_open('image', served.spec.shape[:-3], served.spec.channels)}",
        f"print(pipe.infer(image, {column!r}{given}).table())",
    ]
    return describe(posterior), posterior.plot(), pictures, served.code(*lines)


def describe(posterior: Posterior) -> str:
    """Describe the only row of a posterior in Markdown."""
    scale = posterior.scales[0]
    fitted = f"temperature {scale.temperature:.3g}" if scale.denser else "not calibrated, so too confident"
    found = {name: values[0] for name, values in posterior.columns().items()}
    lines = [f"- {name}: **{format_value(value)}**" for name, value in found.items()]
    if scale.denser:
        lines.append(f"- at 90 %: **{posterior.conformal(0.9)[0]}**")
    return "\n".join([*lines, f"\np({posterior.name}): {posterior.prior}; {fitted}"])
