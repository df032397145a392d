"""The Anomaly tab: how far an image is from normal images."""

from __future__ import annotations

import warnings
from typing import Any

import gradio as gr

from ...anomaly.calibration import Calibration
from ...anomaly.scores import METHODS
from ..controls import (
    UNCONDITIONAL,
    condition_arguments,
    format_arguments,
    format_open,
    make_class_menu,
    make_condition_fields,
)
from ..parts import SampleGallery, make_code_field, make_gallery, make_image_picker, on_click
from ..served import Picked, ReportStep, Served, picked_image, to_gallery
from .compare import draw_surprise


def build_anomaly_tab(served: Served, samples: SampleGallery) -> None:
    """Build the tab, or a hint if the pipeline is not calibrated."""
    calibration = served.pipeline.calibration
    if calibration is None:
        gr.Markdown(
            f"This pipeline is not calibrated. Run `smalti calibrate pipeline={served.name}` with normal images, then "
            "restart the app."
        )
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image, _ = make_image_picker(served, "anomaly-image", samples)
            methods = list(calibration.scores)
            method = gr.Dropdown(methods, value=methods[0], label="Score", info=METHODS.get(methods[0]))
            method.change(lambda name: gr.Dropdown(info=METHODS.get(name)), method, method, queue=False)
            label = make_class_menu(served.pipeline, several=False) if calibration.labels else gr.State(UNCONDITIONAL)
            fields = make_condition_fields(served, "anomaly")
            button = gr.Button("Score", variant="primary")
        with gr.Column(scale=2, min_width=300):
            facts = gr.Markdown(elem_id="anomaly-facts", min_height=120)
            scored = make_gallery("scored", "medium")
            line = make_code_field(served)

    on_click(served, [button], score_upload, [image, method, label, *fields], [facts, scored, line])


def score_upload(
    served: Served, step: ReportStep, picked: Picked, method: str, label: Any = UNCONDITIONAL, *fields: Any
) -> Any:
    """Return the verdict in Markdown, pictures with captions, and Python code."""
    pipeline, batch = served.pipeline, picked_image(picked, served.spec)
    assert pipeline.calibration is not None  # otherwise there is no button
    given, marginal = condition_arguments(pipeline, label, fields), pipeline.calibration.marginal
    options = given if marginal is None else {**given, "marginal": marginal}
    with warnings.catch_warnings(record=True) as known:
        warnings.simplefilter("always")
        found = float(pipeline.anomaly_score(batch, method, **options))
        p_value = float(pipeline.anomaly_score(batch, method, p_values=True, **options))
    images = [(to_gallery(batch[0]), served.spec.noun), *draw_surprise(served, batch, **given)]
    others = format_arguments(options)
    lines = [
        f"image = {format_open('image', served.spec.shape[:-3], served.spec.channels)}",
        f"pipe.anomaly_score(image, {method!r}{others})",
        f"pipe.anomaly_score(image, {method!r}{others}, p_values=True)",
    ]
    is_known = any("calibrat" in str(warning.message) for warning in known)
    return format_verdict(pipeline.calibration, method, found, p_value, is_known), images, served.code(*lines)


def format_verdict(calibration: Calibration, method: str, score: float, p_value: float, known: bool) -> str:
    """Explain a score in Markdown."""
    threshold = calibration.scores[method].threshold
    above = p_value <= calibration.false_alarms if threshold is None else not score <= threshold
    limit = "" if threshold is None else f", threshold {threshold:.4g}"
    lines = [
        f"### {'Anomalous' if above else 'Normal'}",
        f"- {method}: {METHODS.get(method, '')}",
        f"- score: **{score:.4g}**{limit} ({calibration.promise})",
        f"- p-value: **{p_value:.3g}**, the share of normal images that score at least as high",
    ]
    if above:
        lines.append("\nSamples and reconstructions often look anomalous too, because they come from a decoder.")
    if known:
        lines.append("\nThe pipeline was calibrated with this image, so these figures are not valid for it.")
    return "\n".join(lines)
