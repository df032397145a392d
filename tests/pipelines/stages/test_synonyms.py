"""Names from other libraries: taken, or told by the error."""

from __future__ import annotations

import pytest
import torch
from small_pipelines import make_pipeline, pixels_for


def test_names_of_diffusers_are_taken():
    pipe = make_pipeline()
    assert pipe(class_labels=[1, 0], seed=0).tokens.equal(pipe(labels=[1, 0], seed=0).tokens)
    images, mask = pixels_for(pipe, 2), torch.zeros(8, 12)
    mask[4:] = 1
    wanted = pipe.complete(images, mask == 0, [1, 0], draws=2, seed=0).tokens
    given = {"class_labels": [1, 0], "mask_image": mask, "num_images_per_prompt": 2}
    assert pipe.complete(images, **given, seed=0).tokens.equal(wanted)
    assert pipe.complete(images, class_labels=[1, 0], mask=mask, draws=2, seed=0).tokens.equal(wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": 1, "class_labels": 1}, "class_labels is another name of labels"),
        ({"num_images_per_label": 1, "num_images_per_prompt": 2}, "num_images_per_prompt is another name of"),
        (
            {"num_inference_steps": 4},
            "'num_inference_steps' is no argument of sampling from a 'gpt' prior; what is near",
        ),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"guidance": 1}, "did you mean 'guidance_scale'"),
        ({"num_image": 1}, "did you mean 'num_images'"),
        ({"callback": print}, "did you mean 'callback_on_step_end'"),
        ({"prompt": "cat"}, "did you mean 'labels'"),
        ({"caches": False}, "did you mean 'cache'"),
        ({"option": 1}, "its settings are temperature"),  # what takes the settings is no argument
        ({"zzz": 1}, "its settings are temperature, top_k, top_p"),
    ],
)
def test_an_error_names_what_may_have_been_meant(given, message):
    with pytest.raises(TypeError, match=message):
        make_pipeline()(**given)


def test_steps_are_named_where_the_prior_has_them():
    with pytest.raises(TypeError, match="'num_inference_steps' is no argument .* did you mean 'steps'"):
        make_pipeline(prior="masked")(num_inference_steps=3)


def test_a_completion_takes_each_argument_once():
    pipe = make_pipeline()
    images, known = pixels_for(pipe, 1), torch.zeros(8, 12, dtype=torch.bool)
    for given in ({"mask": known, "mask_image": known}, {"known": known, "draws": 2, "num_images_per_prompt": 2}):
        with pytest.raises(TypeError, match="is another name of"):
            pipe.complete(images, **given)
    for name in ("num_images", "num_images_per_label", "tokens"):
        with pytest.raises(TypeError, match=f"'{name}' is no argument of a completion, .* `draws` of each"):
            pipe.complete(images, known, **{name: 2})
