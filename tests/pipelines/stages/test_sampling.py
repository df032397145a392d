"""Sampling from a pipeline: seeds, labels, generators, and settings, of which some belong to one prior."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from small import PRIORS, generators
from small_pipelines import every_pair, every_prior_pair, make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.stages.requests import Request
from prior.orders import Partition
from prior.sampling import DecodingOptions
from tokenizer.files import ConfigError


def rounded(images):
    return ((images + 1) * 127.5).round().to(torch.uint8)


# Sampling


@every_pair
def test_every_output_type_shows_the_same_images(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior, channels=3)
    channels, height, width = pipe.tokenizer.image_shape
    outputs = {kind: pipe(2, 1, seed=0, output_type=kind, progress=False) for kind in ("pil", "np", "pt")}
    assert all(torch.equal(out.tokens, outputs["pt"].tokens) for out in outputs.values())
    assert outputs["pt"].tokens.shape == (2, *pipe.prior.grid.shape) and outputs["pt"].tokens.dtype == torch.int64
    images = outputs["pt"].images
    assert images.shape == (2, channels, height, width) and images.abs().max() <= 1
    assert torch.equal(images, pipe.decode(outputs["pt"].tokens, output_type="pt"))
    assert outputs["np"].images.dtype == np.uint8
    assert np.array_equal(outputs["np"].images, rounded(images).movedim(1, -1).numpy())
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in outputs["pil"].images)
    assert np.array_equal(np.stack([np.asarray(image) for image in outputs["pil"].images]), outputs["np"].images)


def test_grey_images_are_grey():
    pipe = make_pipeline()
    assert [image.mode for image in pipe(2, seed=0).images] == ["L", "L"]
    assert pipe(2, seed=0, output_type="np").images.shape == (2, 8, 12, 1)


@every_pair
def test_image_k_is_the_one_of_its_own_seed(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    labels = [0, "dog", 2, None, 1]
    together = pipe(5, labels, seed=7, output_type="pt")
    assert len({tuple(row.flatten().tolist()) for row in together.tokens}) > 1
    for batch_size in (2, 3):
        parts = pipe(5, labels, seed=7, batch_size=batch_size, output_type="pt", progress=False)
        assert torch.equal(parts.tokens, together.tokens)
        torch.testing.assert_close(parts.images, together.images)
    for k in (0, 3):
        assert torch.equal(pipe(1, [labels[k]], seed=7 + k).tokens[0], together.tokens[k])


@every_prior_pair
def test_labels_are_ids_or_names_one_or_many(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    wanted = pipe(3, [1, 1, 1], seed=0).tokens
    for labels in (1, "dog", ["dog", 1, "dog"], torch.tensor([1, 1, 1]), np.array([1, 1, 1]), ("dog",) * 3):
        assert torch.equal(pipe(3, labels, seed=0).tokens, wanted)
    without = pipe(3, seed=0).tokens
    assert torch.equal(pipe(3, [None] * 3, seed=0).tokens, without)
    none, cat, dog = (pipe(24, labels, seed=0).tokens for labels in (None, "cat", 1))
    assert not torch.equal(none, dog) and not torch.equal(cat, dog)


def test_labels_say_how_many_images():
    pipe = make_pipeline()
    assert len(pipe(labels=["cat", "dog"], seed=0).images) == 2
    assert len(pipe(labels=torch.tensor([0, 1, 2]), seed=0).images) == 3
    assert len(pipe(labels="cat", seed=0).images) == len(pipe(seed=0).images) == 1


def test_unconditional_pipeline_has_no_classes():
    pipe = make_pipeline(labels=[])
    assert len(pipe(2, seed=0).images) == 2
    with pytest.raises(ValueError, match="unconditional"):
        pipe(2, 0)


@every_prior_pair
def test_generators_are_one_or_one_per_image(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    wanted = pipe(3, seed=5).tokens
    listed = pipe(3, generator=[torch.Generator().manual_seed(5 + k) for k in range(3)], batch_size=2).tokens
    assert torch.equal(listed, wanted)
    one = [pipe(3, generator=torch.Generator().manual_seed(5), batch_size=size).tokens for size in (1, 3)]
    assert torch.equal(*one)
    torch.manual_seed(1)
    first, second = pipe(2).tokens, pipe(2).tokens
    torch.manual_seed(1)
    assert torch.equal(pipe(2).tokens, first) and not torch.equal(first, second)


def test_given_tokens_are_kept_across_batches():
    pipe = make_pipeline()
    tokens = pipe(5, seed=0).tokens
    known = torch.rand(tokens.shape) < 0.5
    made = pipe(5, seed=9, tokens=tokens, known=known, batch_size=2, progress=False).tokens
    assert torch.equal(made[known], tokens[known]) and not torch.equal(made, tokens)
    same = pipe(5, seed=9, tokens=tokens[0], known=known[0], batch_size=2, progress=False).tokens
    assert torch.equal(same[:, known[0]], tokens[:1, known[0]].expand(5, -1))


@pytest.mark.parametrize("cache", [True, False])
def test_sampling_works_in_inference_mode(cache):
    pipe = make_pipeline()
    images = torch.rand(2, 1, 8, 12)
    known = torch.arange(12).expand(8, 12) < 6

    def everything():
        return [
            pipe(2, seed=0, cache=cache, output_type="pt").images,
            pipe.encode(images),
            pipe.reconstruct(images, output_type="pt"),
            pipe.log_prob(images, "cat"),
            pipe.complete(images, known, seed=0, cache=cache, output_type="pt").images,
        ]

    outside = everything()
    with torch.inference_mode():
        inside = everything()
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images"),
        ({"num_images": 1.5}, "num_images must be a whole number (got 1.5)"),
        ({"num_images": "2"}, "num_images must be a whole number (got '2')"),
        ({"seed": 1.5}, "seed must be a whole number (got 1.5)"),
        ({"seed": "7"}, "seed must be a whole number (got '7')"),
        ({"seed": 2**64}, "must be from -2^63 to 2^64 - 1 (got 18446744073709551616)"),
        ({"num_images": 2, "seed": 2**64 - 1}, "must be from -2^63 to 2^64 - 1"),
        ({"labels": []}, "num_images"),
        ({"num_images": 2, "labels": [1]}, "1 labels for 2"),
        ({"labels": 3}, "ids 0 to 2 or names cat, dog, eel"),
        ({"labels": -1}, "no class"),
        ({"labels": True}, "no class"),
        ({"labels": "cow"}, "'cow'"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
        ({"seed": -(1 << 63) - 1}, "must be from -2^63"),
        ({"num_images": 2.0}, "num_images must be a whole number (got 2.0)"),
        ({"num_images": 3, "generator": [torch.Generator()]}, "1 generators for 3"),
        ({"batch_size": 0}, "batch_size"),
        ({"output_type": "latents"}, "output_type"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance_scale": 2.0}, "labels"),
        ({"guidance_scale": 2.0, "labels": [None, None]}, "labels"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.long)}, "go together"),
        (
            {"tokens": torch.zeros(9, 2, 3).long(), "known": torch.ones(2, 3).bool()},
            "tokens should be whole numbers of shape",
        ),
        ({"tokens": torch.rand(2, 3), "known": torch.ones(2, 3).bool()}, "tokens should be whole numbers"),
        ({"tokens": torch.zeros(2, 3).long(), "known": torch.ones(3, 3).bool()}, "known should be bool of shape"),
        ({"tokens": torch.full((2, 3), 99), "known": torch.ones(2, 3).bool()}, "ids should lie"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_pipeline()(**arguments)


@pytest.mark.parametrize(("default", "settings"), [({"guidance_scale": 3.0}, {}), (None, {"guidance_scale": 3.0})])
def test_a_batch_of_no_class_is_part_of_a_guided_call(default, settings):
    """The call has classes to guide towards; which of its images stand in one batch is not the caller's affair."""
    pipe, labels = make_pipeline(sampler=default), [1, None, None, "cat", None]
    whole = pipe(labels=labels, seed=0, **settings).tokens
    for size in (1, 2):
        assert torch.equal(pipe(labels=labels, seed=0, batch_size=size, **settings).tokens, whole)
    assert torch.equal(whole[[1, 2, 4]], torch.cat([pipe(seed=k).tokens for k in (1, 2, 4)]))
    request = Request(pipe, [None, 1], 0, DecodingOptions(), settings)
    assert request.depends_on()["sampler"]["guidance_scale"] == 3.0


def test_labels_are_counted_in_whatever_holds_them():
    pipe, labels = make_pipeline(), ["eel", 0, None]
    plain = pipe(labels=labels, seed=7)
    for given in (iter(labels), (label for label in labels), dict.fromkeys(labels)):
        found = pipe(labels=given, seed=7)
        assert torch.equal(found.tokens, plain.tokens) and found.class_names == ["eel", "cat", ""]
    assert pipe(labels=iter(labels), num_images_per_label=2).class_names == ["eel", "eel", "cat", "cat", "", ""]


def test_numbers_and_masks_may_be_numpys():
    pipe = make_pipeline()
    tokens, known = np.full((2, 3), 1), np.ones((2, 3), bool)
    known[1] = False
    plain = pipe(2, seed=7, tokens=torch.from_numpy(tokens), known=torch.from_numpy(known)).tokens
    assert torch.equal(pipe(np.int64(2), seed=np.int64(7), tokens=tokens, known=known).tokens, plain)
    assert torch.equal(pipe(2, seed=7, tokens=tokens.tolist(), known=known.tolist()).tokens, plain)
    assert pipe(1, seed=2**64 - 1).tokens.shape == (1, 2, 3)


def test_arrays_may_be_flipped_and_of_any_whole_numbers():
    """torch takes no array that is flipped, and sorts no uint16, which files of tokens hold."""
    pipe = make_pipeline(prior="masked")
    order, tokens, known = np.arange(6), pipe(2, seed=0).tokens.numpy(), np.arange(12).reshape(2, 2, 3) % 2 > 0
    labels = np.array([0, 2])
    flipped = {"order": order[::-1], "tokens": tokens[::-1], "known": known[::-1]}
    whole = {name: torch.from_numpy(value.copy()) for name, value in flipped.items()}
    plain = pipe(2, labels[::-1], seed=7, **whole).tokens
    assert torch.equal(pipe(2, labels[::-1], seed=7, **flipped).tokens, plain)
    assert torch.equal(pipe.prior.sample(2, labels[::-1], generator=generators(2, 7), **flipped), plain)
    small = {name: flipped[name].astype(np.uint16) for name in ("order", "tokens")}
    assert torch.equal(pipe(2, labels[::-1], seed=7, **{**flipped, **small}).tokens, plain)
    images = pipe.decode(torch.from_numpy(tokens), output_type="pt")
    for given in (tokens[::-1], tokens[::-1].astype(np.uint16), tokens[::-1].tolist()):
        assert torch.equal(pipe.decode(given, output_type="pt"), images.flip(0))


@pytest.mark.parametrize(
    "ask",
    [
        lambda pipe, images, size: pipe.encode(images, batch_size=size),
        lambda pipe, images, size: pipe.log_prob(images, batch_size=size),
        lambda pipe, images, size: pipe.conditional_log_prob(images, torch.zeros(8, 12).bool(), batch_size=size),
    ],
)
def test_batches_of_none_are_named(ask):
    pipe = make_pipeline()
    images = torch.zeros(2, 1, 8, 12)
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1 .got 0.$"):
        ask(pipe, images, 0)
    with pytest.raises(ValueError, match=r"^batch_size must be a whole number .got 2.5.$"):
        ask(pipe, images, 2.5)


@pytest.mark.parametrize(("given", "found"), [(3, "int"), ([3, 4], "int"), ([None, None], "NoneType"), ("ab", "str")])
def test_what_is_no_generator_is_told(given, found):
    told = f"generator should be a torch.Generator, or a list of them .got {found}.$"
    with pytest.raises(TypeError, match=told):
        make_pipeline()(2, generator=given)


def test_settings_of_the_sampler_are_defaults_that_travel(tmp_path):
    pipe = make_pipeline(sampler={"temperature": 0.0})
    greedy = pipe(2, seed=0).tokens
    assert torch.equal(pipe(2, seed=1).tokens, greedy)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert loaded.sampler == pipe.sampler and torch.equal(loaded(2, seed=3).tokens, greedy)
    warm = loaded(2, seed=0, temperature=1.0).tokens
    assert torch.equal(warm, make_like(pipe, {})(2, seed=0).tokens) and not torch.equal(warm, greedy)
    picky = make_like(pipe, {"top_k": 1, "guidance_scale": 2.0})
    assert torch.equal(picky(2, 1, seed=0).tokens, pipe(2, 1, seed=0, guidance_scale=2.0).tokens)
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["sampler"]["temperature"] == 0.0


def make_like(pipe, sampler):
    return ImagePipeline(pipe.tokenizer, pipe.prior, labels=pipe.labels, sampler=sampler)


# What only some priors take


def test_orders_reach_the_prior():
    pipe = make_pipeline(any_order=True)
    orders = torch.rand(5, 6).argsort(1)
    own, column, mixed = (pipe(5, seed=0, **given).tokens for given in ({}, {"order": "column"}, {"num_orders": 3}))
    each = pipe(5, seed=0, order=orders, batch_size=2)
    assert not torch.equal(own, column) and not torch.equal(own, mixed)
    for k in range(5):
        assert torch.equal(pipe(1, seed=k, order=orders[k]).tokens[0], each.tokens[k])
    pixels = pixels_for(pipe)
    log_probs = pipe.log_prob(pixels, order=orders, batch_size=2)
    for k in range(5):
        assert pipe.log_prob(pixels[k : k + 1], order=orders[k])[0] == pytest.approx(float(log_probs[k]), abs=1e-4)
    assert not torch.allclose(pipe.log_prob(pixels, num_orders=3), pipe.log_prob(pixels), atol=1e-3)
    assert torch.equal(pipe(5, seed=0, order=orders.numpy(), batch_size=2).tokens, each.tokens)
    with pytest.raises(ValueError, match="one order"):
        make_pipeline()(2, order="column")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("number", [1, 3, 7])
def test_as_many_orders_as_images_or_one_for_all(number, batch_size):
    """Not those of the first batches, with the rest left out, nor an error after some were drawn."""
    pipe = make_pipeline(any_order=True)
    orders, pixels, seen = torch.rand(number, 6).argsort(1), pixels_for(pipe), []
    said = re.escape(f"order: got {number} for 5 images; give one, or one per image")
    partition = Partition(orders, (1,) * 6)
    for order in (orders, orders.tolist(), partition):
        with pytest.raises(ValueError, match=said):
            pipe(5, order=order, batch_size=batch_size, callback_on_step_end=lambda *step: seen.append(step))
        with pytest.raises(ValueError, match=said):
            pipe.log_prob(pixels, order=order, batch_size=batch_size)
        with pytest.raises(ValueError, match=said):
            pipe.complete(pixels, torch.zeros(8, 12).bool(), order=order, batch_size=batch_size)
    assert not seen


def test_completion_hears_of_all_that_is_known_where_the_prior_takes_any_order():
    """The lower half is known: an any-order prior looks at it, one in raster order cannot."""
    known = torch.zeros(8, 12, dtype=torch.bool)
    known[4:] = True
    for any_order in (False, True):
        pipe = make_pipeline(any_order=any_order)
        pixels = torch.randint(0, 256, (2, 1, 8, 12), dtype=torch.uint8)
        drawn = [pipe.complete(one.expand(12, -1, -1, -1), known, seed=0) for one in pixels]
        assert torch.equal(drawn[0].tokens[:, :1], drawn[1].tokens[:, :1]) != any_order
        assert not torch.equal(drawn[0].tokens[:, 1:], drawn[1].tokens[:, 1:])


@pytest.mark.parametrize("prior", PRIORS)
def test_parallel_images_are_the_same(prior):
    pipe = make_pipeline(prior=prior)
    assert torch.equal(pipe(5, 1, seed=0, parallel=True).tokens, pipe(5, 1, seed=0).tokens)


def test_steps_of_a_masked_token_prior(tmp_path, monkeypatch):
    """An argument, a default that travels, and not what orders and parallel passes go with."""
    pipe = make_pipeline(prior="masked")
    drawn = {steps: pipe(64, seed=0, steps=steps).tokens for steps in (1, 6)}
    assert not torch.equal(drawn[1], drawn[6])
    assert not torch.equal(pipe(64, seed=0, steps=6, confidence_temperature=50.0).tokens, drawn[6])
    pipe = make_like(pipe, {"steps": 1})
    pipe.save_pretrained(tmp_path / "pipe")
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["sampler"]["steps"] == 1
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(loaded(64, seed=0).tokens, drawn[1]) and torch.equal(
        loaded(64, seed=0, steps=6).tokens, drawn[6]
    )
    exact = make_like(pipe, {})(64, seed=0).tokens
    for given in ({"order": "raster"}, {"cache": False}, {"parallel": True}):
        assert torch.equal(loaded(64, seed=0, **given).tokens, exact)
    with pytest.raises(ConfigError, match="sampler: 'steps' is no argument of sampling from a 'gpt' prior"):
        make_pipeline(sampler={"steps": 2})
    with pytest.raises(ValueError, match="steps must be"):
        make_like(pipe, {"steps": 0})
    with pytest.raises(ConfigError, match=r"sampler: steps must be a whole number from 1 to 6 \(got 7\)"):
        make_like(pipe, {"steps": 7})
    with pytest.raises(ValueError, match="from 1 to 6"):
        pipe(2, steps=7)
    with pytest.raises(TypeError, match="'steps' is no argument of sampling from a 'gpt' prior"):
        make_pipeline()(2, steps=3)
    with pytest.raises(TypeError, match="'warmth' is no argument"):
        make_pipeline()(2, warmth=3)


NO_GUIDANCE = {"guidance_scale": 1.0, "guidance_end": None, "guidance_power": None}
SHARED = {"temperature": 1.0, "guidance_scale": 1.0}
OWN = {"confidence_temperature": 4.5, "schedule": "cosine"}


@pytest.mark.parametrize(
    ("prior", "own", "saved"),
    [
        ("gpt", {}, {}),
        ("masked", {}, OWN),
        ("gpt", {"guidance_end": 3.0, "guidance_power": 2.0}, {"guidance_end": 3.0, "guidance_power": 2.0}),
        ("masked", {"schedule": "cosine", "confidence_temperature": 4.5, "steps": None}, OWN),
        ("masked", {"steps": 6, "confidence_temperature": 50.0}, {**OWN, "steps": 6, "confidence_temperature": 50.0}),
    ],
)
def test_what_a_prior_declares_is_a_default_that_travels(tmp_path, prior, own, saved):
    """The index has all settings that are not None."""
    pipe = make_like(make_pipeline(prior=prior), own)
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["sampler"] == {**SHARED, **saved}
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert loaded.sampler == pipe.sampler
    plain, labels = make_like(pipe, {}), [0, 1, 2] * 3
    assert torch.equal(loaded(9, labels, seed=0).tokens, plain(9, labels, seed=0, **own).tokens)
    assert torch.equal(loaded(9, seed=0).tokens, make_like(pipe, {**own, **NO_GUIDANCE})(9, seed=0).tokens)


def test_the_course_of_guidance_is_one_choice():
    """What is given takes the place of the pipeline's from there on: a constant is a constant."""
    pipe, given = make_pipeline(), {"guidance_scale": 2.0, "guidance_end": 4.0, "guidance_power": 3.0}
    own, labels = make_like(pipe, given), [0, 1, 2] * 4

    def of(pipeline, **settings):
        return pipeline(12, labels, seed=0, **settings).tokens

    assert torch.equal(of(own), of(pipe, **given)) and not torch.equal(of(own), of(pipe, guidance_scale=2.0))
    assert torch.equal(of(own, guidance_scale=1.0), of(pipe))
    assert torch.equal(of(own, guidance_end=9.0), of(pipe, guidance_scale=2.0, guidance_end=9.0))
    assert torch.equal(of(own, guidance_power=0.5), of(pipe, **{**given, "guidance_power": 0.5}))
    assert torch.equal(own(3, seed=0).tokens, pipe(3, seed=0).tokens)  # no class, no guidance
