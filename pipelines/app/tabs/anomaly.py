"""How unlike normal images an image is."""

from __future__ import annotations

import warnings
from typing import Any

import gradio as gr

from ...anomaly.calibration import Calibration
from ...anomaly.scores import METHODS
from ..elements import MEDIUM, pictures, shown
from ..jobs import Job
from ..served import Served, as_floats, as_pixels
from ..uploads import images_of
from ..widgets import code_widget, image_picker, on_click, run_buttons
from .compare import surprise_of


def build(served: Served, gallery: gr.HTML) -> None:
    """The tab; without a calibration, how to get one."""
    calibration = served.pipeline.calibration
    if calibration is None:
        gr.Markdown(
            "This pipeline does not know yet what is normal. Calibrate it with images that are, then start the app "
            f"again: `smalti calibrate pipeline={served.name}`",
            elem_id="not-calibrated",
        )
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = image_picker(served, "anomaly-image", gallery)
            methods = list(calibration.scores)
            method = gr.Dropdown(methods, value=methods[0], label="Score", info="what is measured")
            button, stop = run_buttons("Score")
        with gr.Column(scale=2, min_width=300):
            facts = gr.Markdown(elem_id="anomaly-facts", min_height=120)
            scored = pictures("scored")
            line = code_widget(served)

    def work(job: Job, value: Any, method: Any) -> Any:
        if method not in calibration.scores:
            raise ValueError(f"score should be one of {', '.join(calibration.scores)}")
        batch = as_floats(images_of(value, served.shape, served.bounds.max_upload))
        job.step(0, 2, "steps")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            score = float(served.pipeline.anomaly_score(batch, method))
            job.step(1, 2, "steps")
            p_value = float(served.pipeline.anomaly_score(batch, method, p_values=True))
        told = verdict(calibration, method, score, p_value, known=bool(said))
        panels, names = [as_pixels(batch)[0]], ["the image"]
        if surprise := surprise_of(served, batch, None):
            panels.append(surprise[0])
            names.append(surprise[1])
        lines = [
            "from PIL import Image",
            'image = Image.open("image.png")',
            f"pipe.anomaly_score(image, {method!r})",
            f"pipe.anomaly_score(image, {method!r}, p_values=True)",
        ]
        return told, shown(panels, names, side=MEDIUM), served.code(*lines)

    on_click(served, button, stop, work, [image, method], [facts, scored, line], "anomaly")


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
