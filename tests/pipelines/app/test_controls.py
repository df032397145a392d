"""Values of the widgets become the arguments of a call."""

from __future__ import annotations

import pytest
import torch
from optional import Late, needs_gradio
from small_pipelines import LABELS, make_pipeline

from prior import Prior

controls, gr = Late("pipelines.app.controls"), Late("gradio")
pytestmark = needs_gradio


def pipeline(prior="gpt", **options):
    torch.manual_seed(0)
    return make_pipeline("pixels", prior, size=(4, 6), **options)


def arguments(pipe, classes=(), count=2, **changed):
    """The arguments after a visitor has changed some settings."""
    with gr.Blocks():
        values = [slider.value for slider in controls.make_sliders(pipe)]
    values = [changed.get(name, value) for name, value in zip(controls.get_slider_values(pipe), values, strict=True)]
    return controls.sampling_arguments(pipe, list(classes), count, 5, *values)


@pytest.mark.parametrize("kind", Prior.available())
def test_untouched_settings_are_the_pipelines_own(kind):
    if kind == "next_scale":
        pipe = make_pipeline("vqvae", kind, size=(8, 12))
    else:
        pipe = pipeline(kind, **({"order": "raster"} if kind == "blocks" else {}))
    assert {*arguments(pipe)} == {"seed", "labels"}
    if kind == "masked":
        assert arguments(pipe, steps=5)["steps"] == 5
        assert arguments(pipeline(kind, sampler={"steps": 5}), steps=0)["steps"] is None


@pytest.mark.parametrize(
    ("sampler", "changed", "same"),
    [
        ({}, {"temperature": 0.5, "top_k": 3}, {"temperature": 0.5, "top_k": 3}),
        ({"top_k": 3, "top_p": 0.5}, {"top_k": 5, "top_p": 1}, {}),
        ({"guidance_scale": 2.0, "guidance_end": 3.0}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0}),
    ],
)
def test_samples_are_drawn_with_the_settings_shown(sampler, changed, same):
    pipe, expected = pipeline(sampler=sampler), pipeline(sampler=same)
    drawn = [
        each(6, **options, progress=False).tokens
        for each, options in ((pipe, arguments(pipe, count=6, **changed)), (expected, arguments(expected, count=6)))
    ]
    assert torch.equal(*drawn)


def test_images_cycle_through_classes():
    pipe, bare = pipeline(), pipeline(labels=[], num_classes=3)
    assert controls.cycle_labels(pipe, [], 5) == [LABELS[k % 3] for k in range(5)]
    assert controls.cycle_labels(bare, [2, 0], 3) == [2, 0, 2]
    assert controls.cycle_labels(pipe, [1, controls.UNCONDITIONAL], 2) == [LABELS[1], None]
    assert controls.cycle_labels(pipe, [controls.UNCONDITIONAL], 2) is None
