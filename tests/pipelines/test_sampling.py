"""Calling a pipeline: outputs, seeds, labels, sampling settings, callbacks and progress bars."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from small import generators
from small_pipelines import LABELS, every_pair, every_prior_pair, every_tokenizer, make_pipeline, pixels_for

from pipelines import ImagePipeline


def make_like(pipe, sampler):
    return ImagePipeline(pipe.tokenizer, pipe.prior, labels=pipe.labels, sampler=sampler)


ASKED = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "guidance_scale": 2.0}


@pytest.mark.parametrize("method", ["__call__", "complete"])
def test_signatures_show_the_common_settings_and_none_is_the_pipelines_own(method):
    """Also for a prior whose `Sampling` has more settings."""
    plain, known = make_pipeline(prior="masked"), torch.zeros(8, 12, dtype=torch.bool)
    own, first = make_like(plain, ASKED), [2, 1] if method == "__call__" else [pixels_for(plain, 2), known, 1]

    def of(pipe, **settings):
        return getattr(pipe, method)(*first, seed=0, output_type="latent", **settings).tokens

    parameters = inspect.signature(getattr(ImagePipeline, method)).parameters
    assert all(parameters[name].kind == inspect.Parameter.KEYWORD_ONLY for name in ASKED)
    assert of(own).equal(of(plain, **ASKED)) and of(own).equal(of(own, **dict.fromkeys(ASKED)))
    assert of(own, temperature=1.0, guidance_scale=1.0, top_k=99, top_p=1).equal(of(plain))
    assert not of(own).equal(of(plain))
    for name, value in ASKED.items():
        assert of(plain, **{name: value}).equal(of(make_like(plain, {name: value})))


# Outputs


@every_tokenizer
def test_every_output_type_shows_the_same_images(tokenizer):
    pipe = make_pipeline(tokenizer, channels=3)
    if pipe.frames > 1:
        pytest.skip("clips have one more axis: see test_clips.py")
    outputs = {kind: pipe(2, 1, seed=0, output_type=kind, progress=False) for kind in ("pil", "np", "pt", "latent")}
    images, tokens, names = outputs["pt"]
    assert all(torch.equal(out.tokens, tokens) for out in outputs.values()) and names == ["dog", "dog"]
    assert tokens.shape == (2, *pipe.prior.grid.shape) and tokens.dtype == torch.int64
    assert images.shape == (2, *pipe.tokenizer.image_shape) and images.abs().max() <= 1
    assert torch.equal(images, pipe.decode(tokens, output_type="pt"))
    rounded = ((images + 1) * 127.5).round().to(torch.uint8)
    assert np.array_equal(outputs["np"].images, rounded.movedim(1, -1).numpy())
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in outputs["pil"].images)
    assert np.array_equal(np.stack([np.asarray(image) for image in outputs["pil"].images]), outputs["np"].images)
    assert outputs["latent"].images is outputs["latent"].tokens


def test_images_know_their_classes():
    pipe = make_pipeline()
    assert pipe(3, [2, None, "dog"], seed=0).class_names == ["eel", "", "dog"]
    assert pipe(3, seed=0).class_names is None is pipe(3, [None] * 3, seed=0).class_names
    assert make_pipeline(labels=[], num_classes=3)(2, [2, 0], seed=0).class_names == ["2", "0"]
    assert pipe.class_names(torch.arange(4)) == [*LABELS, ""]


# Seeds and batches


@every_pair
def test_a_seed_is_an_image_in_any_batch(tokenizer, prior):
    """Tokens do not depend on the batch; pixels differ by at most one grey level."""
    pipe = make_pipeline(tokenizer, prior)
    labels = [0, "dog", 2, None, 1]
    together = pipe(5, labels, seed=7, output_type="pt")
    assert len({tuple(row.flatten().tolist()) for row in together.tokens}) > 1
    for batch_size in (2, 3):
        parts = pipe(5, labels, seed=7, batch_size=batch_size, output_type="pt", progress=False)
        assert torch.equal(parts.tokens, together.tokens)
        assert (parts.images - together.images).abs().max() <= 1 / 127.5
    for k in (0, 3):
        assert torch.equal(pipe(1, [labels[k]], seed=7 + k).tokens[0], together.tokens[k])


@every_prior_pair
def test_generators_are_one_or_one_per_image(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    wanted = pipe(3, seed=5).tokens
    assert torch.equal(pipe(3, generator=generators(3, 5), batch_size=2).tokens, wanted)
    one = [pipe(3, generator=torch.Generator().manual_seed(5), batch_size=size).tokens for size in (1, 3)]
    assert torch.equal(*one)
    torch.manual_seed(1)
    first, second = pipe(2).tokens, pipe(2).tokens
    torch.manual_seed(1)
    assert torch.equal(pipe(2).tokens, first) and not torch.equal(first, second)


def test_known_tokens_are_unchanged_in_every_batch():
    pipe = make_pipeline()
    tokens = pipe(5, seed=0).tokens
    known = torch.rand(tokens.shape) < 0.5
    given = tokens.clone(), known.clone()
    made = pipe(5, seed=9, tokens=tokens, known=known, batch_size=2).tokens
    assert torch.equal(made[known], tokens[known]) and not torch.equal(made, tokens)
    assert tokens.equal(given[0]) and known.equal(given[1])
    same = pipe(5, seed=9, tokens=tokens[0], known=known[0], batch_size=2, progress=False).tokens
    assert torch.equal(same[:, known[0]], tokens[:1, known[0]].expand(5, -1))


# Labels and counts


def test_labels_say_how_many_images():
    pipe = make_pipeline()
    assert len(pipe(labels="cat", seed=0).images) == len(pipe(seed=0).images) == 1
    wanted = pipe(labels=["dog", "dog", "cat", "cat"], seed=4)
    made = pipe(labels=(name for name in ("dog", "cat")), seed=4, num_images_per_label=2)
    assert made.tokens.equal(wanted.tokens) and made.class_names == ["dog", "dog", "cat", "cat"]
    assert pipe(condition=pipe.read_given(["dog", "cat"]), seed=4, num_images_per_label=2).tokens.equal(made.tokens)
    assert pipe(labels="dog", num_images_per_label=3, seed=4).tokens.equal(pipe(3, "dog", seed=4).tokens)
    assert pipe(num_images_per_label=3, seed=4).tokens.equal(pipe(3, seed=4).tokens)


@pytest.mark.parametrize(("default", "settings"), [({"guidance_scale": 3.0}, {}), (None, {"guidance_scale": 3.0})])
def test_a_guided_call_may_have_batches_without_a_class(default, settings):
    pipe, labels = make_pipeline(sampler=default), [1, None, None, "cat", None]
    whole = pipe(labels=labels, seed=0, **settings).tokens
    for size in (1, 2):
        assert torch.equal(pipe(labels=labels, seed=0, batch_size=size, **settings).tokens, whole)
    assert torch.equal(whole[[1, 2, 4]], torch.cat([pipe(seed=k).tokens for k in (1, 2, 4)]))


@pytest.mark.parametrize(
    ("arguments", "error", "key"),
    [
        ({"num_images": 4, "num_images_per_label": 2}, ValueError, "num_images_per_label"),
        ({"num_images": 2, "seed": 2**64 - 1}, ValueError, "seed"),
        ({"labels": 3}, ValueError, "cat, dog, eel"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed or generator"),
        ({"guidance_scale": 2.0, "labels": [None, None]}, ValueError, "labels"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.long)}, ValueError, "known"),
        ({"tokens": torch.full((2, 3), 99), "known": torch.ones(2, 3).bool()}, ValueError, "ids"),
        ({"temprature": 1}, TypeError, "'temprature'.*'temperature'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, key):
    with pytest.raises(error, match=key):
        make_pipeline()(**arguments)


# Sampling settings


def test_orders_reach_the_prior():
    pipe = make_pipeline(any_order=True)
    orders = torch.rand(5, 6).argsort(1)
    own, column, mixed = (pipe(5, seed=0, **given).tokens for given in ({}, {"order": "column"}, {"num_orders": 3}))
    each = pipe(5, seed=0, order=orders, batch_size=2)
    assert not torch.equal(own, column) and not torch.equal(own, mixed)
    pixels = pixels_for(pipe)
    log_probs = pipe.log_prob(pixels, order=orders, batch_size=2)
    for k in range(5):
        assert torch.equal(pipe(1, seed=k, order=orders[k]).tokens[0], each.tokens[k])
        assert pipe.log_prob(pixels[k : k + 1], order=orders[k])[0] == pytest.approx(float(log_probs[k]), abs=1e-4)
    assert not torch.allclose(pipe.log_prob(pixels, num_orders=3), pipe.log_prob(pixels), atol=1e-3)


def test_steps_of_a_masked_token_prior(tmp_path):
    """`steps` is an argument and a saved default; an order, cache or parallel given without it turn it off."""
    pipe = make_pipeline(prior="masked")
    drawn = {steps: pipe(64, seed=0, steps=steps).tokens for steps in (1, 6)}
    assert not torch.equal(drawn[1], drawn[6])
    make_like(pipe, {"steps": 1}).save_pretrained(tmp_path / "pipe")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(loaded(64, seed=0).tokens, drawn[1])
    assert torch.equal(loaded(64, seed=0, steps=6).tokens, drawn[6])
    exact = pipe(64, seed=0).tokens
    for given in ({"order": "raster"}, {"cache": False}, {"parallel": True}):
        assert torch.equal(loaded(64, seed=0, **given).tokens, exact)
    with pytest.raises(TypeError, match="'steps'"):
        make_pipeline()(2, steps=3)


NO_GUIDANCE = {"guidance_scale": 1.0, "guidance_end": None, "guidance_power": None}


@pytest.mark.parametrize(
    ("prior", "own"),
    [
        ("gpt", {"temperature": 0.0}),
        ("gpt", {"guidance_end": 3.0, "guidance_power": 2.0}),
        ("masked", {"steps": 6, "confidence_temperature": 50.0}),
    ],
)
def test_sampling_settings_are_saved_as_defaults(tmp_path, prior, own):
    pipe = make_like(make_pipeline(prior=prior), own)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert loaded.sampler == pipe.sampler
    plain, labels = make_like(pipe, {}), [0, 1, 2] * 3
    assert torch.equal(loaded(9, labels, seed=0).tokens, plain(9, labels, seed=0, **own).tokens)
    assert torch.equal(loaded(9, seed=0).tokens, make_like(pipe, {**own, **NO_GUIDANCE})(9, seed=0).tokens)


def test_a_given_guidance_schedule_replaces_the_default_as_a_whole():
    pipe, given = make_pipeline(), {"guidance_scale": 2.0, "guidance_end": 4.0, "guidance_power": 3.0}
    own, labels = make_like(pipe, given), [0, 1, 2] * 4

    def of(pipeline, **settings):
        return pipeline(12, labels, seed=0, **settings).tokens

    assert torch.equal(of(own), of(pipe, **given)) and not torch.equal(of(own), of(pipe, guidance_scale=2.0))
    assert torch.equal(of(own, guidance_scale=1.0), of(pipe))
    assert torch.equal(of(own, guidance_end=9.0), of(pipe, guidance_scale=2.0, guidance_end=9.0))
    assert torch.equal(own(3, seed=0).tokens, pipe(3, seed=0).tokens)  # no class, no guidance


# Callbacks


@pytest.mark.sparse
@every_pair
@pytest.mark.parametrize("batch_size", [64, 2])
def test_a_callback_sees_every_step_of_every_batch(tokenizer, prior, batch_size):
    pipe, seen = make_pipeline(tokenizer, prior), []

    def record(pipe, step, rank, kwargs):
        seen.append((pipe, step, rank, kwargs["tokens"].clone(), kwargs["known"].clone()))
        pipe.decode(kwargs["tokens"].zero_())  # a callback may use the pipeline, whose own tokens must not change

    out = pipe(5, 1, seed=3, batch_size=batch_size, callback_on_step_end=record)
    assert out.tokens.equal(pipe(5, 1, seed=3).tokens)
    assert all(each[0] is pipe for each in seen) and [each[1] for each in seen] == list(range(len(seen)))
    before = torch.zeros_like(out.tokens, dtype=torch.bool)
    for _, _, rank, tokens, known in seen:
        assert tokens.shape == known.shape == out.tokens.shape and 0 < rank <= len(pipe.prior.grid)
        assert tokens[known].equal(out.tokens[known]) and not tokens[~known].any()
        assert not (before & ~known).any() and known.sum() > before.sum()
        before = known
    assert before.all()


@pytest.mark.parametrize("way", [{"parallel": True}, {"batch_size": 2}, {"guidance_scale": 3.0}])
def test_a_call_interrupted_by_its_callback_can_be_continued(way):
    """The tokens so far, with the same seeds, lead to the same images."""
    pipe, so_far = make_pipeline(), {}
    wanted = pipe(16, 1, seed=5, **way).tokens
    if "parallel" in way:
        assert wanted.equal(pipe(16, 1, seed=5).tokens)

    def stop(pipe, step, rank, kwargs):
        so_far.update(kwargs)
        if step == 1:
            raise StopIteration

    with pytest.raises(StopIteration):
        pipe(16, 1, seed=5, callback_on_step_end=stop, **way)
    assert 0 < int(so_far["known"].sum()) < 96
    assert pipe(16, 1, seed=5, **so_far, **way).tokens.equal(wanted)


# Bars


def test_long_calls_have_a_bar(capsys):
    """After two seconds."""
    pipe, images = make_pipeline(), torch.zeros(3, 1, 8, 12)
    for options, expected in ({}, False), ({"delay": 0.0, "disable": False}, True), ({"disable": True}, False):
        pipe.set_progress_bar_config(**options)
        pipe.log_prob(images, batch_size=1)
        assert ("scoring" in capsys.readouterr().err) == expected
