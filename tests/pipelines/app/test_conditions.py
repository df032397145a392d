"""Fields of columns: they give what the Python code says, and mistakes are one line.

Covers: pipelines/app/controls.py, pipelines/columns.py.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from optional import Late, needs_gradio
from PIL import Image
from small_pipelines import COLUMNS, as_pil, make_conditioned, pixels_for

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate

gr, served_ = Late("gradio"), Late("pipelines.app.served")
controls = Late("pipelines.app.controls")
sample, complete, compare, anomaly = (
    Late(f"pipelines.app.tabs.{name}") for name in ("sample", "complete", "compare", "anomaly")
)
pytestmark = needs_gradio
EMBEDDING = {"kind": "vector", "size": 4, "encoder": "other:function"}


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return make_conditioned("blocks", {**COLUMNS, "embedding": EMBEDDING, "wind": {"kind": "angle"}}, any_order=True)


@pytest.fixture
def served(pipe):
    return served_.Served(pipe, "conditioned", max_images=8)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "outline.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60), np.uint8)).save(path)
    return path


def quiet(done, total, unit):
    """A step without a display."""


def fields(served, given=(), **changed):
    """The values of all fields after a visitor has chosen columns and changed some."""
    with gr.Blocks() as page:
        chosen, *made = controls.make_condition_fields(served, "tab")
    labels = [field.label.partition(",")[0] for field in made]
    assert labels == ["view", "findings", "age", "motion 1", "motion 2", "text", "wind", "outline"]
    assert chosen.value == [] and not any(field.visible for field in made)
    (choose,) = [each for each in page.fns.values() if (chosen._id, "change") in each.targets]
    assert [each["visible"] for each in choose.fn(list(given))] == [label.split()[0] in given for label in labels]
    return [
        list(given),
        *(changed.get(label.replace(" ", "_"), field.value) for label, field in zip(labels, made, strict=True)),
    ]


def settings(pipe, guidance_scale=1.0, guidance_on=()):
    return [*{**controls.get_slider_values(pipe), "guidance_scale": guidance_scale}.values(), list(guidance_on)]


VALUES = {"view": "lateral", "findings": ["bone", "water"], "age": 63, "motion": [1.5, -1]}
VALUES |= {"text": "a hand", "wind": 350}
CHANGED = {**VALUES, "motion_1": 1.5, "motion_2": -1}


def run_code(code, pipe, monkeypatch, **files):
    """Run the Python code, whose files are these, and return its names."""
    monkeypatch.setattr(ImagePipeline, "from_pretrained", lambda name: pipe)
    names = {f"{name}_file": Image.open(path) for name, path in files.items()}
    exec(re.sub(r"Image.open\(.(\w+).png.\)", r"\1_file", code), names)
    return names


def arrays(images):
    return np.stack([np.asarray(image[0] if isinstance(image, tuple) else image) for image in images])


@pytest.mark.parametrize("given", [[], ["age"], [*VALUES, "outline"]])
def test_only_columns_that_are_chosen_are_given(served, pipe, picture, monkeypatch, given):
    values = fields(served, given, **CHANGED, outline=[(str(picture), None)])
    found = controls.condition_arguments(pipe, 1, values).get("condition", {})
    picked = found.pop("outline", None)
    assert found == {name: VALUES[name] for name in given if name in VALUES}
    assert (picked is not None) == ("outline" in given)
    images, _, code = sample.sample_images(served, quiet, [1], 3, 5, "", *settings(pipe), *values)
    out = run_code(code, pipe, monkeypatch, outline=picture)["out"]
    assert np.array_equal(arrays(images), arrays(out.images))
    expected = {name: VALUES.get(name, Image.open(picture)) for name in given}
    again = pipe(3, "dog", condition=expected or None, seed=5)
    assert torch.equal(out.tokens, again.tokens)


def test_guidance_applies_to_the_chosen_columns(served, pipe, monkeypatch):
    values = fields(served, ["age", "view"], age=80, view="lateral")
    images, _, code = sample.sample_images(served, quiet, [1], 4, 0, "", *settings(pipe, 4.0, ["age"]), *values)
    condition = {"age": 80, "view": "lateral"}
    drawn = [pipe(4, "dog", condition=condition, seed=0, guidance_scale=4.0, guidance_on=on) for on in (["age"], None)]
    assert np.array_equal(arrays(images), arrays(drawn[0].images)) and not torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert torch.equal(run_code(code, pipe, monkeypatch)["out"].tokens, drawn[0].tokens)


def test_an_image_is_completed_and_scored_given_its_condition(served, pipe, picture, tmp_path, monkeypatch):
    (image,) = as_pil(pixels_for(pipe, 1))
    image.save(tmp_path / "image.png")
    picked = [(str(tmp_path / "image.png"), None)]
    values = fields(served, ["age", "outline"], age=63, outline=[(str(picture), None)])
    alpha = np.kron(np.arange(8)[:, None] >= np.full(12, 4), np.full((28, 28), 216)).astype(np.uint8)
    editor = {"layers": [np.dstack([np.zeros((*alpha.shape, 3), np.uint8), alpha])]}
    (mask, *found), code = complete.complete_image(
        served, quiet, picked, editor, False, 1, 2, 3, *settings(pipe), *values
    )
    mask[0].save(tmp_path / "mask.png")
    files = {"image": tmp_path / "image.png", "mask": tmp_path / "mask.png", "outline": picture}
    assert np.array_equal(arrays(found), arrays(run_code(code, pipe, monkeypatch, **files)["out"].images[0]))
    _, facts, code = compare.compare_image(served, quiet, picked, 1, *values)
    bits = -float(pipe.log_prob(image, "dog", condition={"age": 63, "outline": Image.open(picture)})) / np.log(2)
    assert f"**{bits:.1f} bits" in facts
    assert "condition={'age': 63, 'outline': Image.open(\"outline.png\")}" in code


def test_an_image_is_scored_given_what_the_calibration_was_given(served, pipe, tmp_path, monkeypatch):
    calibrate(pipe, pixels_for(pipe, 43), condition={"age": [20 + number for number in range(43)], "label": "dog"})
    (image,) = as_pil(pixels_for(pipe, 1))
    image.save(tmp_path / "image.png")
    picked = [(str(tmp_path / "image.png"), None)]
    facts, _, code = anomaly.score_upload(served, quiet, picked, "nll", 1, *fields(served, ["age"], age=63))
    score = float(pipe.anomaly_score(image, "nll", "dog", condition={"age": 63}))
    assert f"score: **{score:.4g}**" in facts and "calibrated with" not in facts
    assert "'nll', labels='dog', condition={'age': 63})" in code
    with pytest.raises(ValueError, match="calibrated with age, label given, but now with label"):
        anomaly.score_upload(served, quiet, picked, "nll", 1, *fields(served))
