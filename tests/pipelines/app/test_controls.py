"""The controls are those that a prior declares, and their values become the arguments of a call."""

from __future__ import annotations

import pytest
import torch
from optional import Late, needs_gradio
from small_pipelines import LABELS, make_pipeline

from prior import Prior

controls = Late("pipelines.app.controls")
pytestmark = needs_gradio


def pipeline(prior="gpt", **options):
    torch.manual_seed(0)
    return make_pipeline("pixels", prior, size=(4, 6), **options)


@pytest.mark.parametrize("kind", Prior.available())
def test_every_setting_that_a_prior_declares_has_a_control(kind):
    if kind == "next_scale":
        pipe = make_pipeline("vqvae", kind, size=(8, 12))
    else:
        pipe = pipeline(kind, **({"order": "raster"} if kind == "blocks" else {}))
    settings = controls.settings_of(pipe)
    assert [setting.name for setting in settings] == type(pipe.sampler).names()
    assert all(setting.widget(24).label for setting in settings)
    # As the page shows them at first, they ask for nothing but the pipeline's own.
    assert controls.chosen_settings(pipe, values(pipe)) == {}


def values(pipe, **changed):
    """The values of the widgets, some of them changed."""
    return [changed.get(setting.name, setting.widget(24).value) for setting in controls.settings_of(pipe)]


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
    pipe = pipeline(sampler=sampler)
    assert controls.chosen_settings(pipe, values(pipe, **changed)) == expected
    given = {setting.name: changed.get(setting.name, setting.own) for setting in controls.settings_of(pipe)}
    shown = {name: None if value == "" else float(value) for name, value in given.items() if value is not None}
    if shown.get("top_k") is not None:
        shown["top_k"] = int(shown["top_k"])
    same = pipeline(sampler=shown)
    drawn = [each(6, 1, seed=0, progress=False, **options).tokens for each, options in ((pipe, expected), (same, {}))]
    assert torch.equal(*drawn)


def test_passes_of_a_masked_prior_are_its_steps():
    pipe = pipeline("masked")
    assert controls.chosen_settings(pipe, values(pipe, steps=5, schedule="linear")) == {
        "steps": 5,
        "schedule": "linear",
    }


@pytest.mark.parametrize("value", ["three", [3], "1e999x"])
def test_a_setting_that_is_no_number(value):
    pipe = pipeline()
    with pytest.raises(ValueError, match="Top k should be a number"):
        controls.chosen_settings(pipe, values(pipe, top_k=value))
    with pytest.raises(ValueError, match="temperature needs a value"):
        controls.chosen_settings(pipe, values(pipe, temperature=""))


def test_a_prior_without_classes_has_no_guidance():
    pipe = pipeline(labels=[])
    assert [setting.name for setting in controls.settings_of(pipe)] == ["temperature", "top_k", "top_p"]
    assert controls.labels_for(pipe, None, 3) is None and controls.labels_code(pipe, None) == ""


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


# Orders and numbers


def test_a_prior_of_one_order_has_no_choice():
    assert controls.orders_of(pipeline().prior) == []


@pytest.mark.parametrize("kind", ["gpt", "blocks", "masked"])
def test_every_order_that_is_offered_can_be_sampled_in(kind):
    pipe = pipeline(kind, **({} if kind == "masked" else {"any_order": True}))
    names = controls.orders_of(pipe.prior)
    assert "halton" in names and ("dyadic" in names) == (kind != "gpt")
    for name in names:
        assert pipe(1, seed=0, order=name, progress=False).tokens.shape == (1, *pipe.prior.grid.shape)


@pytest.mark.parametrize("value", [None, "3", 0, 9, 2.5, True, float("nan"), float("inf"), -1, 10**400, [3]])
def test_a_number_that_is_out_of_range(value):
    with pytest.raises(ValueError, match="seed should be a whole number from 1 to 8"):
        controls.whole(value, "seed", 1, 8)
