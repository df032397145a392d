"""The controls are those that a prior declares, and their values become the arguments of a call."""

from __future__ import annotations

import pytest
import torch
from optional import Late, needs_gradio
from small_pipelines import LABELS, make_pipeline

from pipelines.generate import GenerateConfig
from prior import Prior

gr, controls = Late("gradio"), Late("pipelines.app.controls")
pytestmark = needs_gradio

DESCRIBED = GenerateConfig.model_fields


def pipeline(prior="gpt", **options):
    torch.manual_seed(0)
    return make_pipeline("pixels", prior, size=(4, 6), **options)


@pytest.mark.parametrize("kind", Prior.available())
def test_every_setting_that_a_prior_declares_has_a_control(kind):
    if kind == "next_scale":
        pipe = make_pipeline("vqvae", kind, size=(8, 12))
    else:
        pipe = pipeline(kind, **({"order": "raster"} if kind == "blocks" else {}))
    settings = controls.settings_of(pipe, DESCRIBED)
    assert [setting.name for setting in settings] == type(pipe.sampler).names()
    widgets = [setting.widget(len(pipe.prior.grid)) for setting in settings]
    assert all(isinstance(widget, gr.components.Component) and widget.label for widget in widgets)
    # As the page shows them at first, they ask for nothing but the pipeline's own.
    assert controls.chosen_settings(settings, [widget.value for widget in widgets], pipe.prior.grid.vocab_size) == {}


def values(settings, **changed):
    """The values of the widgets, some of them changed."""
    return [changed.get(setting.name, setting.widget(24).value) for setting in settings]


@pytest.mark.parametrize(
    ("sampler", "changed", "expected"),
    [
        ({}, {"temperature": 0.5, "top_k": "3"}, {"temperature": 0.5, "top_k": 3}),
        ({}, {"top_p": 0.9}, {"top_p": 0.9}),
        ({"top_k": 3, "top_p": 0.5}, {"top_k": "", "top_p": 1}, {"top_k": 5, "top_p": 1.0}),
        ({"guidance_scale": 2.0}, {"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        ({"guidance_scale": 2.0}, {"guidance_end": "3"}, {"guidance_scale": 2.0, "guidance_end": 3.0}),
        ({"guidance_scale": 2.0, "guidance_end": 3.0}, {"guidance_end": ""}, {"guidance_scale": 2.0}),
    ],
)
def test_what_differs_from_the_pipelines_own_is_asked_for(sampler, changed, expected):
    """Whatever is shown is what is drawn with."""
    from prior.sampling import DecodingOptions

    pipe = pipeline(sampler=sampler)
    settings = controls.settings_of(pipe, DESCRIBED)
    given = values(settings, **changed)
    found = controls.chosen_settings(settings, given, 5)
    assert found == expected
    drawn = pipe.choose_sampler(found, torch.tensor([0]), DecodingOptions())
    wanted = {
        setting.name: setting.read(value) for setting, value in zip(settings, values(settings, **changed), strict=True)
    }
    everything = {"top_k": 5, "top_p": 1.0}
    for name, value in wanted.items():
        assert getattr(drawn, name) in (value, everything.get(name, value)), name


def test_passes_of_a_masked_prior_are_its_steps():
    pipe = pipeline("masked")
    settings = controls.settings_of(pipe, DESCRIBED)
    slider = next(setting for setting in settings if setting.name == "steps").widget(24)
    assert (slider.label, slider.minimum, slider.maximum) == ("Passes", 0, 24)
    assert controls.chosen_settings(settings, values(settings, steps=5, schedule="linear"), 5) == {
        "steps": 5,
        "schedule": "linear",
    }
    assert not controls.cuts_orders(pipe.prior)


@pytest.mark.parametrize("value", ["three", [3], "1e999x"])
def test_a_setting_that_is_no_number(value):
    settings = controls.settings_of(pipeline(), DESCRIBED)
    with pytest.raises(ValueError, match="Top-k should be a number"):
        controls.chosen_settings(settings, values(settings, top_k=value), 5)


def test_a_prior_without_classes_has_no_guidance():
    pipe = pipeline(labels=[])
    assert [setting.name for setting in controls.settings_of(pipe, DESCRIBED)] == ["temperature", "top_k", "top_p"]
    assert controls.classes_widget(pipe, several=True) is None and controls.labels_for(pipe, None, 3) is None
    assert controls.labels_code(pipe, None) == ""


# Classes


@pytest.mark.parametrize("labels", [LABELS, []])
def test_classes_are_taken_in_turn(labels):
    pipe = pipeline(labels=labels, num_classes=3)
    names = labels or [0, 1, 2]
    assert controls.class_names(pipe) == list(map(str, names))
    assert controls.labels_for(pipe, [], 5) == [names[k % 3] for k in range(5)]
    assert controls.labels_for(pipe, [2, 0], 3) == [names[2], names[0], names[2]]
    assert controls.labels_for(pipe, 1, 2) == [names[1]] * 2
    assert controls.labels_for(pipe, [controls.UNCONDITIONAL], 2) is None
    assert controls.labels_for(pipe, [1, controls.UNCONDITIONAL], 2) == [names[1], None]


@pytest.mark.parametrize("chosen", [[3], [-2], ["cat"], [0.5], [True], {"a": 1}, "cat", None])
def test_a_class_that_there_is_not(chosen):
    with pytest.raises(ValueError, match="a class should be one of cat, dog, eel"):
        controls.labels_for(pipeline(), chosen, 2)


@pytest.mark.parametrize(
    "labels", [["cat"], ["cat"] * 4, LABELS, LABELS * 3, (LABELS * 2)[:5], ["dog", "eel"] * 2, ["dog", None, "dog"]]
)
def test_labels_as_python_writes_them(labels):
    pipe = pipeline()
    code = controls.labels_code(pipe, labels)
    assert code.startswith(", labels=") and len(code) < 60
    (found,) = [eval(code.removeprefix(", labels="), {"pipe": pipe})]
    assert found == labels or [found] * len(labels) == labels


# Orders


def test_a_prior_of_one_order_has_no_choice():
    prior = pipeline().prior
    assert controls.orders_of(prior) == [] and controls.order_for(prior, None, None) is None
    with pytest.raises(ValueError, match="order should be one of raster"):
        controls.order_for(prior, "column", None)


@pytest.mark.parametrize("kind", ["gpt", "blocks", "masked"])
def test_every_order_that_is_offered_can_be_sampled_in(kind):
    pipe = pipeline(kind, **({} if kind == "masked" else {"any_order": True}))
    names = controls.orders_of(pipe.prior)
    assert "halton" in names and ("dyadic" in names) == (kind != "gpt")
    for name in names:
        order = controls.order_for(pipe.prior, name, None)
        assert pipe(1, seed=0, order=order, progress=False).tokens.shape == (1, *pipe.prior.grid.shape)


@pytest.mark.sparse
@pytest.mark.parametrize("name", ["", "raster", "halton", "spread", "random:0", "hilbert", "column"])
@pytest.mark.parametrize("passes", [1, 3, 7, 8, 24])
def test_as_many_passes_as_were_asked_for(name, passes):
    """`NAME/K` has blocks of one size, so that there may be a few passes less."""
    from prior.orders import make_partition

    prior = pipeline("blocks", any_order=True).prior
    assert controls.cuts_orders(prior)
    found = make_partition(controls.order_for(prior, name, passes), prior.grid.shape)
    kind = name.partition(":")[0]
    assert len(found.blocks) == passes or (
        kind not in ("halton", "spread", "random") and passes - 2 <= len(found.blocks)
    )
    assert len(found.blocks) <= passes


def test_an_order_with_its_own_blocks_has_its_own_passes():
    with pytest.raises(ValueError, match="dyadic, which has its own"):
        controls.order_for(pipeline("blocks", any_order=True).prior, "dyadic", 3)


@pytest.mark.parametrize("passes", [0.5, -3, 25, 1e300, float("nan"), "x", [3], True])
def test_a_number_of_passes_that_there_cannot_be(passes):
    """The slider has none of these, but a request can."""
    with pytest.raises(ValueError, match="passes should be a whole number from 1 to 24"):
        controls.order_for(pipeline("blocks", any_order=True).prior, "raster", passes)


@pytest.mark.parametrize("order", ["no", "halton:3", "raster/2", 3, "../x"])
def test_an_order_that_is_not_offered(order):
    with pytest.raises(ValueError, match="order should be one of"):
        controls.order_for(pipeline("blocks", any_order=True).prior, order, None)
