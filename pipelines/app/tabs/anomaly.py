"""How unlike normal images an image is."""

from __future__ import annotations

import warnings
from typing import Any

import gradio as gr

from ...anomaly.calibration import Calibration
from ...anomaly.scores import METHODS
from ..parts import Samples, code_widget, image_picker, on_click, pictures
from ..served import Picked, Served, Step, as_picture, picked_image
from .compare import surprise_of


def build(served: Served, samples: Samples) -> None:
    """The tab; without a calibration, how to get one."""
    calibration = served.pipeline.calibration
    if calibration is None:
        gr.Markdown(
            "This pipeline does not know yet what is normal. Calibrate it with images that are, then start the app "
            f"again: `smalti calibrate pipeline={served.name}`"
        )
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image, _ = image_picker(served, "anomaly-image", samples)
            methods = list(calibration.scores)
            method = gr.Dropdown(methods, value=methods[0], label="Score", info="what is measured")
            button = gr.Button("Score", variant="primary")
        with gr.Column(scale=2, min_width=300):
            facts = gr.Markdown(elem_id="anomaly-facts", min_height=120)
            scored = pictures("scored", "medium")
            line = code_widget(served)

    on_click(served, [button], score, [image, method], [facts, scored, line])


def score(served: Served, step: Step, picked: Picked, method: str) -> Any:
    """What the score means in Markdown, the pictures with captions, and the lines of Python."""
    pipeline, batch = served.pipeline, picked_image(picked, served.shape)
    with warnings.catch_warnings(record=True) as known:
        warnings.simplefilter("always")
        found = float(pipeline.anomaly_score(batch, method))
        p_value = float(pipeline.anomaly_score(batch, method, p_values=True))
    images = [(as_picture(batch[0]), "the image"), *surprise_of(served, batch, None)]
    lines = [
        "from PIL import Image",
        'image = Image.open("image.png")',
        f"pipe.anomaly_score(image, {method!r})",
        f"pipe.anomaly_score(image, {method!r}, p_values=True)",
    ]
    assert pipeline.calibration is not None  # or there is no button
    return verdict(pipeline.calibration, method, found, p_value, bool(known)), images, served.code(*lines)


def verdict(calibration: Calibration, method: str, score: float, p_value: float, known: bool) -> str:
    """What a score means, in Markdown."""
    threshold = calibration.scores[method].threshold
    above = not score <= threshold
    lines = [
        f"### {'An anomaly' if above else 'Like the normal images'}",
        f"- {method}: {METHODS.get(method, '')}",
        f"- score: **{score:.4g}**, threshold {threshold:.4g} ({calibration.promise})",
        f"- p-value: **{p_value:.3g}**, the share of normal images that are at least as unusual",
    ]
    if above:
        lines.append("\nWhat a decoder has painted, a sample or a reconstruction, is found strange as well.")
    if known:
        lines.append("\nThe pipeline was calibrated with this very image, so that these figures hold no promise.")
    return "\n".join(lines)
