"""Pipelines whose images are conditioned on columns: forms of values, calls, files, and refusals."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from small import draw_tokens, make_prior, make_tokenizer
from small_pipelines import COLUMNS, GIVEN, make_conditioned, make_pipeline, pixels_for

from pipelines import ConfigError, ImagePipeline, IntegrityError
from pipelines.compression.container import StreamError
from pipelines.saving import FILES
from prior.columns import GridColumn
from tokenizer.files import PipelineLoadError, write_json, write_manifest

COUNT = 5
EACH = {
    "view": ["frontal", None, 1, "lateral", "none of both"],
    "findings": [["bone"], [], None, ["water", "metal"], "bone"],
    "age": [20, 30.5, None, 60, 90],
    "motion": [[1, 2], [0, 0], [-4, -2], None, [2, 1]],
    "text": ["a fish", "two fishes", None, "a cat", "A Fish"],
}
"""A value of each column for each image."""


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return make_conditioned(before=True)


@pytest.fixture(scope="module")
def only():
    """A pipeline with a grid, and no other column."""
    torch.manual_seed(1)
    return make_conditioned(columns={})


def pictures(count=COUNT, size=(24, 16)):
    chance = np.random.default_rng(0)
    return [Image.fromarray(chance.integers(0, 256, size[::-1], dtype=np.uint8)) for _ in range(count)]


def every_column(pipe):
    """A different value of each column for each image."""
    outlines = [*pictures(3), None, draw_tokens(pipe.condition_tokenizers["outline"], 1)[0]]
    befores = draw_tokens(pipe.prior, COUNT)
    return {**EACH, "outline": outlines, **({"before": befores} if "before" in pipe.prior.config.conditions else {})}


def tokens_of(pipe, count=None, **options):
    return pipe(count, seed=3, output_type="latent", progress=False, **options).tokens


# Sampling


@pytest.mark.parametrize("prior", ["gpt", "blocks", "masked", "next_scale", "made", "gated_pixelcnn"])
def test_image_k_depends_on_its_own_condition_alone(prior):
    torch.manual_seed(2)
    pipe = make_conditioned(prior)
    every = every_column(pipe)
    guided = {"guidance_scale": 8.0, "guidance_on": ["age", "outline"]}
    whole = tokens_of(pipe, condition=every, labels=[0, 1, None, 2, 0], **guided)
    assert len(whole) == COUNT
    assert torch.equal(tokens_of(pipe, condition=every, labels=[0, 1, None, 2, 0], batch_size=2, **guided), whole)
    given = pipe.read_given([0, 1, None, 2, 0], every)
    for k in range(COUNT):
        alone = pipe(condition=given[k : k + 1], seed=3 + k, progress=False, **guided)
        assert torch.equal(alone.tokens[0], whole[k])
    assert not torch.equal(tokens_of(pipe, condition=every, labels=[0, 1, None, 2, 0]), whole), "guidance did nothing"


def test_the_pipelines_guidance_applies_if_there_is_something_to_remove():
    torch.manual_seed(3)
    made = make_conditioned(columns=COLUMNS).components
    guided = ImagePipeline(**made, sampler={"guidance_scale": 4.0})
    on_age = ImagePipeline(**made, sampler={"guidance_scale": 4.0, "guidance_on": ["age"]})
    assert on_age.sampler.guidance_on == ("age",)
    plain = ImagePipeline(**made)
    ages, views = ({"condition": {name: EACH[name]}} for name in ("age", "view"))
    assert torch.equal(tokens_of(guided, **ages), tokens_of(plain, **ages, guidance_scale=4.0))
    assert not torch.equal(tokens_of(guided, **ages), tokens_of(plain, **ages))
    assert torch.equal(tokens_of(guided, 3), tokens_of(plain, 3))
    assert torch.equal(tokens_of(on_age, **ages), tokens_of(guided, **ages))
    assert torch.equal(tokens_of(on_age, **views), tokens_of(plain, **views)), "the age is not given"
    assert torch.equal(tokens_of(on_age, **views, guidance_scale=4.0), tokens_of(guided, **views))


# Forms of values


def test_pictures_in_every_form_equal_their_tokens(only):
    tokenizer = only.condition_tokenizers["outline"]
    images = pictures(3)
    arrays = np.stack(images)
    floats = torch.from_numpy(arrays)[:, None].float() / 127.5 - 1
    expected = tokenizer.encode(floats)
    forms = {
        "PIL": images,
        "arrays": list(arrays),
        "channels": list(arrays[..., None]),
        "one array": arrays,
        "bytes": torch.from_numpy(arrays)[:, None],
        "floats": floats,
        "list of floats": list(floats),
        "tokens": expected,
        "lists of tokens": expected.tolist(),
        "mixed": [images[0], expected[1], arrays[2]],
    }
    for name, form in forms.items():
        assert torch.equal(only.read_given(None, {"outline": form}, 3).raw("outline"), expected), name
        assert torch.equal(only.read_given(None, form, 3).raw("outline"), expected), name
        if name != "lists of tokens":
            assert torch.equal(only.read_given(None, form[0], 2).raw("outline"), expected[[0, 0]]), name
    for call in (tokens_of, lambda pipe, condition: pipe.log_prob(pixels_for(pipe, 3) * 0, condition=condition)):
        assert torch.equal(call(only, condition=images), call(only, condition=expected))
        assert not torch.equal(call(only, condition=images), call(only, condition=expected.roll(1, 0)))


def test_a_pixel_column_tells_bytes_of_an_image_from_ids():
    """Its tokens have the shape of its images."""
    other = make_tokenizer("pixels", (8, 12), 1)
    own = make_tokenizer("vqvae", (8, 12), 1).eval()
    column = GridColumn(grid=other.grid, tokenizer=other.fingerprint())
    prior = make_prior("gpt", grid=own.grid, conditions={"outline": column}, condition_width=16)
    pipe = ImagePipeline(own, prior, condition_tokenizers={"outline": other})
    pixels = np.stack(pictures(2, size=(12, 8)))
    expected = other.encode(torch.from_numpy(pixels)[:, None].float() / 127.5 - 1)
    for form in (pixels, pixels[..., None], expected, expected.numpy()):
        assert torch.equal(pipe.read_given(None, form, 2).raw("outline"), expected)


def test_text_is_encoded_for_a_column_of_n_grams(pipe):
    raw = pipe.read_given(None, {"text": EACH["text"]}).raw("text")
    assert torch.equal(raw[0], raw[4]) and not torch.equal(raw[0], raw[1]) and raw[2].isnan().all()
    assert torch.equal(pipe.read_given(None, {"text": "a fish"}, 2).raw("text"), raw[[0, 0]])


def test_numbers_outside_the_training_data_count_as_the_nearest_of_these_and_warn_once_a_call(pipe):
    """At the doors of the pipeline; the model, and streams as those of 0.3, take numbers as they are."""
    images = pixels_for(pipe, 1)
    beyond, edge = {"age": 400, "motion": [-9, 0.5]}, {"age": 90, "motion": [-4, 0.5]}
    raw = {name: torch.tensor(value, dtype=torch.float32).view(1, -1) for name, value in beyond.items()}
    with pytest.warns(UserWarning, match="^condition: age: [^\n]* 18 to 90[^\n]*$") as found:
        pipe.complete(images, torch.zeros(8, 12, dtype=torch.bool), condition={"age": 400}, draws=2)
    assert len(found) == 1 and found[0].filename == __file__
    with pytest.warns(UserWarning, match="count as the nearest"):
        for call in (
            lambda condition: pipe.log_prob(images, condition=condition),
            lambda condition: pipe(condition=condition, seed=0).tokens,
            lambda condition: pipe.embed(images, condition=condition),
        ):
            assert torch.equal(call(beyond), call(edge)) and torch.equal(call(raw), call(edge))
        tokens = pipe.encode(images)
        assert not torch.equal(pipe.prior.log_prob(tokens, condition=raw), pipe.log_prob(images, condition=edge))
        if find_spec("constriction"):
            stream = pipe.compress(images, condition=beyond)
            assert np.array_equal(*(pipe.decompress(stream, condition=one, output_type="np") for one in (beyond, raw)))
            with pytest.raises(StreamError):
                pipe.decompress(stream, condition=edge)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.read_given(None, {**GIVEN, "age": [18, 90, None]})


# Completion, scores and vectors


@pytest.mark.parametrize("prior", ["gpt", "masked"])
def test_completions_repeat_the_condition_of_each_image(prior):
    torch.manual_seed(4)
    pipe = make_conditioned(prior)
    images, known = pixels_for(pipe, COUNT), torch.ones(8, 12, dtype=torch.bool)
    known[:, 4:] = False
    every = {"condition": every_column(pipe), "labels": [0, 1, None, 2, 0]}
    guided = {"guidance_scale": 2.0, "guidance_on": ["age", "outline"], "progress": False, "output_type": "latent"}
    made = pipe.complete(images, known, **every, draws=2, seed=5, **guided).tokens
    given = pipe.read_given(**every)
    for k in range(COUNT):
        own = {"condition": given[k : k + 1], "seed": 5 + 2 * k}
        assert torch.equal(pipe.complete(images[k : k + 1], known, **own, draws=2, **guided).tokens[0], made[k])


def test_the_probability_of_the_hidden_part_is_conditional(pipe):
    images, none = pixels_for(pipe, COUNT), torch.zeros(8, 12, dtype=torch.bool)
    every = every_column(pipe)
    whole = pipe.log_prob(images, 1, condition=every)
    torch.testing.assert_close(pipe.conditional_log_prob(images, none, 1, condition=every, batch_size=2), whole)
    torch.testing.assert_close(pipe.log_prob(images, 1, condition=every, batch_size=2), whole)
    assert not torch.allclose(pipe.conditional_log_prob(images, none, 1), whole)


# Files


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_what_is_saved_is_what_is_loaded(pipe, variant, tmp_path):
    every = {"condition": every_column(pipe), "labels": 1}
    before = tokens_of(pipe, **every)
    pipe.save_pretrained(tmp_path / "a", variant=variant)
    names = names_in(tmp_path / "a")
    assert set(filter_repo_objects(names, allow_patterns=FILES)) == names, "the Hub fetches other files"
    found = ImagePipeline.from_pretrained(tmp_path / "a")
    assert found.condition_tokenizers["before"] is found.tokenizer and found.labels == pipe.labels
    for name, tokenizer in found.condition_tokenizers.items():
        assert found.prior.config.conditions[name].tokenizer == tokenizer.fingerprint() and not tokenizer.training
    if variant is None:
        assert torch.equal(tokens_of(found, **every), before)
        assert found.prior.config.conditions == pipe.prior.config.conditions
    found.save_pretrained(tmp_path / "b", variant=variant)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert torch.equal(tokens_of(pipe, **every), before), "saving changed the pipeline"


def test_conversions_keep_tokenizers_that_fit(tmp_path):
    torch.manual_seed(5)
    pipe = make_conditioned(before=True)
    every = {"condition": every_column(pipe), "labels": 1}
    before = tokens_of(pipe, **every)
    for other in (ImagePipeline(**pipe.components, labels=pipe.labels), pickle.loads(pickle.dumps(pipe))):
        assert other.condition_tokenizers["before"] is other.tokenizer
        assert torch.equal(tokens_of(other, **every), before)
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    assert {model.dtype for model in half.models.values()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half")
    again = ImagePipeline.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.condition_tokenizers["outline"].fingerprint() == again.prior.config.conditions["outline"].tokenizer
    assert torch.equal(tokens_of(again, **every), tokens_of(half, **every))


def test_the_example_on_the_card_can_be_called(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert "| age | number | 18 to 90 |" in card
    example = re.search(r"condition=({.*}), seed", card)[1]
    image = type("Image", (), {"open": staticmethod(lambda name: pictures(1)[0])})
    given = eval(example, {"Image": image})
    assert set(given) == set(pipe.prior.config.conditions) and pipe.read_given(None, given, 2)


# Bad input


def test_a_condition_that_cannot_be_converted_is_one_line(pipe):
    """Other values are in tests/prior/test_given.py. Two columns hold less than others: a vector of an unknown encoder,
    and a grid without a tokenizer, which needs none for ids."""
    ids = {"kind": "grid", "grid": {"shape": [2, 2], "vocab_size": 4}}
    vector = {"kind": "vector", "size": 8, "encoder": "open_clip:encode"}
    strict, outline = make_conditioned(columns={**COLUMNS, "clip": vector, "map": ids}), pictures(1)[0]
    for model, condition, word in (
        (pipe, outline, "outline, before"),  # there are several grids
        (strict, {"outline": ["a.png", outline, None]}, "outline.*paths"),
        (strict, {"clip": "a fish"}, "clip.*open_clip:encode"),
        (strict, {"map": outline}, "map"),
        (make_pipeline(), {"age": 3}, "^condition: .*the columns are label$"),
    ):
        with pytest.raises(ValueError, match=word) as caught:
            model.read_given(None, condition, 3)
        assert "\n" not in str(caught.value)
    values = torch.tensor([[0, 3], [-1, 2]])
    assert torch.equal(strict.read_given(None, {"map": values}, 2).raw("map"), torch.stack([values, values]))


def test_guidance_needs_a_column_that_is_given_and_a_prompt_one_of_text(pipe):
    with pytest.raises(ValueError, match="labels or a condition"):
        pipe(2, condition={"age": [None, None]}, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="agee"):
        ImagePipeline(**pipe.components, sampler={"guidance_on": ["agee"]})
    with pytest.raises(TypeError, match="a column of text"):
        pipe(prompt="a fish")


def test_models_that_do_not_fit_are_refused(pipe):
    parts = {**pipe.components, "labels": pipe.labels}
    for tokenizers, word in (
        ({}, "conditions/outline: missing"),
        ({"outline": make_tokenizer("vqvae", (16, 24), 1)}, "conditions/outline: .* another tokenizer"),
        ({"outline": pipe.tokenizer}, "conditions/outline: grid"),
    ):
        with pytest.raises(IntegrityError, match=word):
            ImagePipeline(**{**parts, "condition_tokenizers": tokenizers})
    config = {name: value for name, value in pipe.prior.config.to_dict().items() if name != "kind"}
    for conditions in (pipe.prior.config.conditions, {}):
        background = make_prior("gpt", **{**config, "conditions": conditions})
        assert ImagePipeline(**parts, background=background).background is background
    with pytest.raises(IntegrityError, match="background/config.json: conditions"):
        ImagePipeline(**parts, background=make_prior("gpt", **{**config, "conditions": COLUMNS}))


def test_a_path_in_a_forged_index_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    path = tmp_path / "pipe" / "model_index.json"
    write_json(path, {**json.loads(path.read_text()), "conditions": {"../../outline": "vqvae"}})
    write_manifest(path.parent)
    with pytest.raises(PipelineLoadError, match="model_index.json: conditions"):
        ImagePipeline.from_pretrained(tmp_path / "pipe")
