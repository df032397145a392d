"""Promises of `ImagePipeline`, whatever tokenizer and prior it holds.

Covers: pipelines/images/pictures.py, pipelines/metrics/report.py, pipelines/stages/base.py, pipelines/stages/index.py,
pipelines/stages/sampling.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small import PRIORS, QUANTIZERS, SMALL, TOKENIZERS, make_prior, make_tokenizer

from pipelines import ImagePipeline, from_unit
from pipelines.images import pictures
from pipelines.metrics.report import report
from pipelines.stages.sampling import settings_in
from tokenizer import TokenGrid, Tokenizer
from tokenizer.base import LikelihoodError
from tokenizer.files.errors import ConfigError, IntegrityError, PathError
from tokenizer.settings import ModelConfig

LABELS = ["cat", "dog", "eel"]
# Every tokenizer with a prior, and every prior with a tokenizer: they only meet in a grid of ids.
PAIRS = [*((tokenizer, "gpt") for tokenizer in TOKENIZERS), *(("vqvae", prior) for prior in PRIORS if prior != "gpt")]
every_pair = pytest.mark.parametrize(("tokenizer", "prior"), PAIRS)
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS)


def make_pipeline(tokenizer="vqvae", prior="gpt", channels=1, labels=LABELS, sampler=None, **config):
    first = make_tokenizer(tokenizer, (8, 12), channels).eval()
    config = {"num_classes": len(labels), "tokenizer": first.fingerprint(), **config}
    second = make_prior(prior, first.grid.shape, first.grid.vocab_size, **config)
    return ImagePipeline(first, second, labels=labels, sampler=sampler)


def pixels_for(pipe, count=5):
    return torch.randint(0, 256, (count, *pipe.tokenizer.image_shape), dtype=torch.uint8)


def as_pil(pixels):
    return [Image.fromarray(p[0] if len(p) == 1 else p.transpose(1, 2, 0)) for p in pixels.numpy()]


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
    for batch_size in (1, 2, 3):
        parts = pipe(5, labels, seed=7, batch_size=batch_size, output_type="pt", progress=False)
        assert torch.equal(parts.tokens, together.tokens)
        torch.testing.assert_close(parts.images, together.images)
    for k in (0, 3):
        assert torch.equal(pipe(1, [labels[k]], seed=7 + k).tokens[0], together.tokens[k])


@every_pair
def test_labels_are_ids_or_names_one_or_many(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    wanted = pipe(3, [1, 1, 1], seed=0).tokens
    for labels in (1, "dog", ["dog", 1, "dog"], torch.tensor([1, 1, 1]), np.array([1, 1, 1]), ("dog",) * 3):
        assert torch.equal(pipe(3, labels, seed=0).tokens, wanted)
    without = pipe(3, seed=0).tokens
    assert torch.equal(pipe(3, [None] * 3, seed=0).tokens, without)
    assert not torch.equal(pipe(24, seed=0).tokens, pipe(24, 1, seed=0).tokens)
    assert not torch.equal(pipe(24, "cat", seed=0).tokens, pipe(24, 1, seed=0).tokens)


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


@every_pair
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
        ({"labels": []}, "num_images"),
        ({"num_images": 2, "labels": [1]}, "1 labels for 2"),
        ({"labels": 3}, "ids 0 to 2 or names cat, dog, eel"),
        ({"labels": -1}, "no class"),
        ({"labels": True}, "no class"),
        ({"labels": "cow"}, "'cow'"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
        ({"num_images": 3, "generator": [torch.Generator()]}, "1 generators for 3"),
        ({"batch_size": 0}, "batch_size"),
        ({"output_type": "latent"}, "output_type"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance_scale": 2.0}, "labels"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.long)}, "go together"),
        ({"tokens": torch.zeros(9, 2, 3).long(), "known": torch.ones(2, 3).bool()}, "tokens should have shape"),
        ({"tokens": torch.zeros(2, 3).long(), "known": torch.ones(3, 3).bool()}, "known should have shape"),
        ({"tokens": torch.full((2, 3), 99), "known": torch.ones(2, 3).bool()}, "ids should lie"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_pipeline()(**arguments)


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
    guess = make_prior("marginal", pipe.prior.grid.shape, pipe.prior.grid.vocab_size)
    assert torch.equal(pipe(5, 1, seed=0, parallel=True, guess=guess).tokens, pipe(5, 1, seed=0).tokens)


def test_steps_of_a_masked_token_prior(tmp_path, monkeypatch):
    """An argument, a default that travels, and not what orders and parallel passes go with."""
    pipe = make_pipeline(prior="masked")
    drawn = {steps: pipe(9, seed=0, steps=steps).tokens for steps in (1, 6)}
    assert not torch.equal(drawn[1], drawn[6])
    assert not torch.equal(pipe(9, seed=0, steps=6, confidence_temperature=50.0).tokens, drawn[6])
    pipe = make_like(pipe, {"steps": 1})
    pipe.save_pretrained(tmp_path / "pipe")
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["sampler"]["steps"] == 1
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(loaded(9, seed=0).tokens, drawn[1]) and torch.equal(loaded(9, seed=0, steps=6).tokens, drawn[6])
    exact = make_like(pipe, {})(9, seed=0).tokens
    for given in ({"order": "raster"}, {"cache": False}, {"parallel": True}):
        assert torch.equal(loaded(9, seed=0, **given).tokens, exact)
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


SHARED = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0}


@pytest.mark.parametrize(
    ("prior", "own", "saved"),
    [
        ("gpt", {}, {}),
        ("masked", {}, {}),
        ("masked", {"schedule": "cosine", "confidence_temperature": 4.5, "steps": None}, {}),
        ("masked", {"steps": 6, "confidence_temperature": 50.0}, {"steps": 6, "confidence_temperature": 50.0}),
    ],
)
def test_what_a_prior_declares_is_a_default_that_travels(tmp_path, prior, own, saved):
    """Settings that every prior has are always in the index, a prior's own only where they are not the default."""
    pipe = make_like(make_pipeline(prior=prior), own)
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert list(index["sampler"].items()) == list({**SHARED, **saved}.items())
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert loaded.sampler == pipe.sampler
    assert torch.equal(loaded(9, seed=0).tokens, make_like(pipe, {})(9, seed=0, **own).tokens)


def test_a_setting_of_no_prior_is_found_in_no_keys():
    keys = {"temperature": 0.5, "top_k": None, "steps": 3, "num_images": 4, "device": "cpu"}
    assert settings_in(keys) == {"temperature": 0.5, "steps": 3}


# Between images and tokens


@every_tokenizer
@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_in_four_kinds(tokenizer, channels):
    pipe = make_pipeline(tokenizer, PRIORS[0], channels)
    pixels = pixels_for(pipe)
    tokens = pipe.encode(pixels)
    assert tokens.shape == (5, *pipe.tokenizer.grid.shape) and len(tokens.unique()) > 1
    for images in (as_pil(pixels), pixels.float() / 127.5 - 1, pixels.double() / 127.5 - 1):
        assert torch.equal(pipe.encode(images), tokens)
        assert torch.equal(pipe.reconstruct(images, output_type="pt"), pipe.decode(tokens, output_type="pt"))
        assert torch.equal(pipe.log_prob(images), pipe.log_prob(pixels))
    assert torch.equal(pipe.encode(as_pil(pixels)[0]), tokens[:1])
    assert torch.equal(pipe.encode(pixels, batch_size=2), tokens)
    assert np.array_equal(
        np.asarray(pipe.decode(tokens)[0]),
        pipe.decode(tokens, output_type="np")[0].squeeze(-1)
        if channels == 1
        else pipe.decode(tokens, output_type="np")[0],
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_as_arrays_and_in_lists(channels):
    """What `output_type="np"` gives, above all."""
    pipe = make_pipeline(channels=channels)
    drawn = {kind: pipe(3, 1, seed=0, output_type=kind).images for kind in ("pil", "np")}
    pixels = torch.from_numpy(drawn["np"]).movedim(-1, 1)
    tokens, array = pipe.encode(drawn["pil"]), drawn["np"]
    kinds = [
        array,
        array / 127.5 - 1,
        (array / 127.5 - 1).astype(np.float32),
        list(array),
        list(pixels),
        [*pixels[:1], drawn["pil"][1], array[2]],
        list(pixels / 127.5 - 1),
        array[::-1][::-1],
        pixels.contiguous(),
    ]
    kinds += [array[..., 0], list(array[..., 0])] if channels == 1 else []
    for images in kinds:
        assert torch.equal(pipe.encode(images), tokens)
        torch.testing.assert_close(pipe.embed(images, batch_size=2), pipe.embed(drawn["pil"]))  # rounding may differ
        assert torch.equal(pipe.log_prob(images), pipe.log_prob(drawn["pil"]))
    for image in [array[0], *([array[0, ..., 0]] if channels == 1 else [])]:
        assert torch.equal(pipe.encode(image), tokens[:1]) and torch.equal(pipe.embed(image), pipe.embed(array[:1]))
    array.flags.writeable = False
    assert torch.equal(pipe.encode(array), tokens)  # and torch does not complain
    assert pipe.compress(array) == pipe.compress(drawn["pil"])


class Watch:
    """Collects warnings of floats, of which a process gives one."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.anew()

    def anew(self):
        """As if in another process."""
        self.monkeypatch.setattr(pictures, "_warned", False)

    def __call__(self, call, *arguments, **options):
        """Where `call` warns, and of what."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(*arguments, **options)
        return [(Path(one.filename).name, str(one.message)) for one in caught]


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    pipe = make_pipeline(any_order=True)
    pipe.calibrate(pixels_for(pipe, 60))
    return pipe


KNOWN = torch.ones(8, 12, dtype=torch.bool)
KNOWN[2:6, 3:7] = False
DOORS = {
    "encode": lambda pipe, images: pipe.encode(images),
    "reconstruct": lambda pipe, images: pipe.reconstruct(images),
    "log_prob": lambda pipe, images: pipe.log_prob(images),
    "complete": lambda pipe, images: pipe.complete(images, KNOWN, seed=0),
    "conditional_log_prob": lambda pipe, images: pipe.conditional_log_prob(images, KNOWN),
    "calibrate": lambda pipe, images: pipe.calibrate(images, false_alarms=0.2),
    "anomaly_score": lambda pipe, images: pipe.anomaly_score(images, "nll", batch_size=5),
    "anomaly_map": lambda pipe, images: pipe.anomaly_map(images, batch_size=5),
    "heal": lambda pipe, images: pipe.heal(images, draws=1),
    "embed": lambda pipe, images: pipe.embed(images, batch_size=5),
    "compress": lambda pipe, images: pipe.compress(images),
}


@pytest.mark.parametrize("door", DOORS)
def test_floats_that_look_like_unit_ones_are_told_of_once(calibrated, watch, door):
    """At the line of the user, through whatever method they come."""
    unit = pixels_for(calibrated, 12) / 255
    for images in (unit, unit.movedim(1, -1).numpy(), list(unit), unit.half()):
        watch.anew()
        ((file, message),) = watch(DOORS[door], calibrated, images)
        assert file == Path(__file__).name and "from_unit" in message and "\n" not in message
        assert watch(DOORS[door], calibrated, images) == []


@pytest.mark.parametrize("door", DOORS)
def test_bright_images_are_not_told_of(calibrated, watch, door):
    """Nor what is made of them on the way: no pixel is darker than the middle."""
    bright = torch.randint(128, 256, (12, *calibrated.tokenizer.image_shape), dtype=torch.uint8)
    floats = bright.float() / 127.5 - 1
    mixed = torch.cat([pixels_for(calibrated, 10).float() / 127.5 - 1, 0.3 + 0.7 * torch.rand(5, 1, 8, 12)])
    for images in (bright, as_pil(bright), floats, floats.half(), torch.ones(12, 1, 8, 12), torch.zeros(12, 1, 8, 12)):
        assert watch(DOORS[door], calibrated, images) == []
    if door != "compress":
        assert watch(DOORS[door], calibrated, mixed) == []  # which has slices that alone would be told of


def test_from_unit_says_so(watch):
    pipe = make_pipeline()
    pixels = pixels_for(pipe)
    assert torch.equal(pipe.encode(from_unit(pixels / 255)), pipe.encode(pixels))
    assert torch.equal(pipe.encode(from_unit(pixels.movedim(1, -1).numpy() / 255)), pipe.encode(pixels))
    assert watch(pipe.encode, from_unit(0.6 + 0.4 * torch.rand(3, 1, 8, 12))) == []
    for wrong in (pixels, pixels / 1.0, pixels / 127.5 - 1, torch.full((2, 2), torch.nan), [pixels / 255], "x"):
        with pytest.raises(ValueError, match="from_unit takes"):
            from_unit(wrong)


def test_other_pil_images_are_made_to_fit():
    pipe = make_pipeline()
    large = Image.new("RGB", (60, 40), (255, 255, 255))
    assert torch.equal(pipe.encode(large), pipe.encode(torch.ones(1, 1, 8, 12)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "(2, 1, 8, 8)"),
        (torch.zeros(1, 8, 12), "(1, 8, 12)"),
        (torch.zeros(2, 3, 8, 12), "(2, 3, 8, 12)"),
        (torch.zeros(2, 1, 8, 12, dtype=torch.int64), "torch.int64"),
        (torch.full((2, 1, 8, 12), 255.0), "[-1, 1]"),
        (torch.full((2, 1, 8, 12), float("nan")), "[-1, 1]"),
        (np.zeros((2, 1, 8, 12), np.uint8), "ndarray of shape (2, 1, 8, 12), uint8"),
        (np.zeros((8, 12, 3), np.uint8), "(B, 8, 12, 1), (B, 8, 12), (8, 12, 1), (8, 12) as arrays"),
        (np.zeros((8, 12), np.int64), "int64"),
        (np.zeros((8, 12), bool), "bool"),
        (np.full((8, 12), 255.0), "[-1, 1]"),
        ([np.zeros((8, 12), np.uint8), np.zeros((8, 12))], "list of float64 and uint8"),
        ([torch.zeros(1, 1, 8, 12)], "(1, 1, 8, 12)"),
        ([], "list of nothing"),
        ("three.png", "str"),
    ],
)
def test_other_images_are_refused(images, message):
    pipe = make_pipeline()
    for method in (pipe.encode, pipe.reconstruct, pipe.log_prob, pipe.bits_per_dim):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            method(images)
        assert "\n" not in str(caught.value)


def test_tokens_out_of_range_are_refused():
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="ids should lie"):
        pipe.decode(torch.full((1, 2, 3), 32))


# Scoring


@every_pair
def test_log_prob_is_that_of_the_tokens(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    pixels = pixels_for(pipe)
    tokens = pipe.encode(pixels)
    torch.testing.assert_close(pipe.log_prob(pixels, "dog"), pipe.prior.log_prob(tokens, torch.full((5,), 1)))
    torch.testing.assert_close(pipe.log_prob(pixels, batch_size=2), pipe.prior.log_prob(tokens))
    mixed = pipe.log_prob(pixels, [0, None, "eel", 1, 1])
    torch.testing.assert_close(mixed, pipe.prior.log_prob(tokens, torch.tensor([0, 3, 2, 1, 1])))


@every_tokenizer
def test_bits_per_dim_needs_a_decoder_with_a_likelihood(tokenizer):
    pipe = make_pipeline(tokenizer)
    pixels = pixels_for(pipe, 2)
    images = pixels.float() / 127.5 - 1
    given = pipe.tokenizer.pixel_log_prob(images, pipe.encode(images))
    if given is None:
        with pytest.raises(LikelihoodError, match=repr(pipe.tokenizer.name)):
            pipe.bits_per_dim(pixels)
    else:
        expected = -(pipe.log_prob(pixels) + given) / (images[0].numel() * np.log(2))
        torch.testing.assert_close(pipe.bits_per_dim(pixels), expected)


def test_vqvae_has_no_likelihood():
    with pytest.raises(LikelihoodError, match="'vqvae'"):
        make_pipeline("vqvae").bits_per_dim(torch.zeros(1, 1, 8, 12))


class HalvesConfig(ModelConfig):
    """Nothing to choose."""


class Halves(Tokenizer):
    """A 2x2 image of 256 grey values: an id says which half a pixel is in, where all 128 values are equally likely."""

    Config = HalvesConfig

    def __init__(self) -> None:
        super().__init__(HalvesConfig())
        self.grid, self.image_shape = TokenGrid((2, 2), 2), (1, 2, 2)

    def encode(self, images):
        return (images[:, 0] > 0).long()

    def decode(self, tokens):
        return tokens.float().unsqueeze(1) - 0.5

    def pixel_log_prob(self, images, tokens):
        inside = (self.encode(images) == tokens).flatten(1).all(1)
        return torch.where(inside, -4 * torch.log(torch.tensor(128.0)), -torch.inf)


def test_bits_per_dim_adds_tokens_and_pixels():
    prior = make_prior("marginal", (2, 2), 2, num_classes=2)
    with torch.no_grad():
        prior.table.zero_()
        prior.table[0, :, 1] = torch.log(torch.tensor(3.0))  # class 0: p(upper half) = 3/4
    pipe = ImagePipeline(Halves(), prior)
    images = torch.tensor([[-1.0, -0.5, -0.1, -0.9], [0.1, 0.5, 1.0, -1.0]]).reshape(2, 1, 2, 2)
    torch.testing.assert_close(pipe.bits_per_dim(images), torch.full((2,), 8.0))  # 1 bit for the half, 7 inside it
    upper = -torch.log2(torch.tensor(0.75))
    expected = 7 + torch.stack([torch.tensor(2.0), (3 * upper + 2) / 4])
    torch.testing.assert_close(pipe.bits_per_dim(images, 0), expected)


# Completing


@every_pair
def test_known_pixels_come_back_as_they_were(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    pixels = pixels_for(pipe)
    known = torch.rand(5, 8, 12) < 0.3
    known[0], known[1] = True, False
    made = pipe.complete(pixels, known, 1, seed=3, output_type="pt")
    assert torch.equal(made.images.movedim(1, -1)[known], (pixels.float() / 127.5 - 1).movedim(1, -1)[known])
    numbers = pipe.complete(as_pil(pixels), known, 1, seed=3, output_type="np").images
    assert np.array_equal(numbers[known.numpy()], pixels.movedim(1, -1)[known].numpy())
    free = pipe(1, 1, seed=4, output_type="pt")  # nothing is known of image 1, whose seed is 3 + 1
    assert torch.equal(made.tokens[1], free.tokens[0])
    torch.testing.assert_close(made.images[1], free.images[0])


@every_pair
def test_hidden_pixels_do_not_leak(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    pixels = pixels_for(pipe, 16)
    known = torch.arange(12).expand(8, 12) < 5  # one column of patches and a little more
    changed = torch.where(known, pixels, 255 - pixels)
    one, other = (pipe.complete(images, known, seed=0, output_type="np") for images in (pixels, changed))
    assert torch.equal(one.tokens, other.tokens)
    assert np.array_equal(one.images, other.images)
    kept = pipe.tokenizer.known_tokens(known)[0]
    if tokenizer == "vqvae":  # there is something to leak: its receptive field is wider than a patch
        assert not torch.equal(pipe.encode(pixels)[:, kept], pipe.encode(changed)[:, kept])
    elsewhere = torch.where(known, 255 - pixels, pixels)
    assert not torch.equal(pipe.complete(elsewhere, known, seed=0).tokens[:, kept], one.tokens[:, kept])


@every_pair
def test_completions_differ_by_seed_and_not_by_batch(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    pixels = pixels_for(pipe)
    known = (torch.arange(8) < 4)[:, None].expand(8, 12)
    made = pipe.complete(pixels, known, seed=0)
    assert not torch.equal(made.tokens, pipe.complete(pixels, known, seed=1).tokens)
    assert torch.equal(made.tokens, pipe.complete(pixels, known, seed=0, batch_size=2, progress=False).tokens)
    assert torch.equal(made.tokens, pipe.complete(pixels, known.expand(5, 8, 12).numpy(), seed=0).tokens)


@pytest.mark.parametrize("known", [torch.ones(12, 8).bool(), torch.ones(2, 8, 12).bool(), torch.ones(8, 12)])
def test_masks_of_another_shape_or_type_are_refused(known):
    with pytest.raises(ValueError, match="known should be bool"):
        make_pipeline().complete(torch.zeros(3, 1, 8, 12), known)


# Saving and loading

PARTS = {f"{part}/{name}" for part in ("tokenizer", "prior") for name in ("config.json", "model.safetensors")}
PROVENANCE = {
    "data": {"source": "digits", "image_size": 28},
    "tokenizer": {"steps": 1234, "minutes": 1.5, "evaluation": {"psnr": 21.75, "codebook_usage": 0.875}},
    "prior": {"steps": 5678, "minutes": 2.5, "evaluation": {"bits_per_token": 3.125}},
}


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


@every_pair
def test_what_is_saved_is_what_is_loaded(tokenizer, prior, tmp_path):
    pipe = make_pipeline(tokenizer, prior, sampler={"top_k": 7})
    pipe.save_pretrained(tmp_path / "pipe")
    assert files_in(tmp_path / "pipe") == {"model_index.json", "manifest.json", "README.md", *PARTS}
    loaded = ImagePipeline.from_pretrained(str(tmp_path / "pipe"))
    assert type(loaded.tokenizer) is type(pipe.tokenizer) and type(loaded.prior) is type(pipe.prior)
    assert loaded.labels == LABELS and loaded.sampler == pipe.sampler and loaded.provenance == {}
    assert not loaded.tokenizer.training and not loaded.prior.training
    one, other = pipe(3, "dog", seed=0, output_type="pt"), loaded(3, "dog", seed=0, output_type="pt")
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.images, other.images)
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index == {
        "_class_name": "ImagePipeline",
        "format_version": 1,
        "tokenizer": tokenizer,
        "prior": prior,
        "labels": LABELS,
        "sampler": {"temperature": 1.0, "top_k": 7, "top_p": None, "guidance_scale": 1.0},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_saving_twice_writes_the_same_bytes(tmp_path):
    pipe = make_pipeline()
    pipe.provenance, pipe.sample_grid = PROVENANCE, pipe.sample_picture(4)
    pipe.save_pretrained(tmp_path / "one")
    loaded = ImagePipeline.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two") >= {"provenance.json", "samples.png"}
    for name in files_in(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_older_pipeline_is_replaced_whole(tmp_path):
    old, new = make_pipeline(), make_pipeline(prior="marginal")
    old.provenance = PROVENANCE
    old.save_pretrained(tmp_path / "pipe", sample_grid=old.sample_picture(4))
    new.save_pretrained(tmp_path / "pipe")
    assert files_in(tmp_path / "pipe") == {"model_index.json", "manifest.json", "README.md", *PARTS}
    assert ImagePipeline.from_pretrained(tmp_path / "pipe").prior.name == "marginal"


def test_failed_save_leaves_the_older_pipeline(tmp_path, monkeypatch):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    before = pipe(2, seed=0).tokens

    def full(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(type(pipe.prior), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        make_pipeline().save_pretrained(tmp_path / "pipe")
    assert torch.equal(ImagePipeline.from_pretrained(tmp_path / "pipe")(2, seed=0).tokens, before)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("mine", "file"):
        with pytest.raises(PathError, match=name):
            make_pipeline().save_pretrained(tmp_path / name)
    assert files_in(tmp_path) == {"mine/thesis.tex", "file"}
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_pair
def test_another_type_can_be_used_saved_and_loaded(tokenizer, prior, dtype, tmp_path):
    pipe = make_pipeline(tokenizer, prior)
    pipe.save_pretrained(tmp_path / "full")
    assert pipe.to(dtype=dtype) is pipe and next(pipe.prior.parameters()).dtype == dtype
    pixels = pixels_for(pipe, 2)
    assert len(pipe(2, 1, seed=0).images) == len(pipe.reconstruct(pixels)) == 2
    assert torch.isfinite(pipe.log_prob(pixels)).all()
    pipe.save_pretrained(tmp_path / "half")
    same = ImagePipeline.from_pretrained(tmp_path / "half", dtype=dtype)
    assert torch.equal(same(2, 1, seed=0).tokens, pipe(2, 1, seed=0).tokens)
    wide = ImagePipeline.from_pretrained(tmp_path / "half")
    assert len(wide(2, 1, seed=0).images) == 2
    loaded = ImagePipeline.from_pretrained(tmp_path / "full", dtype=dtype)
    assert torch.equal(loaded(2, 1, seed=0).tokens, pipe(2, 1, seed=0).tokens)
    loaded.save_pretrained(tmp_path / "again")
    ImagePipeline.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_type_is_that_of_the_networks(name):
    """A codebook stays float32, and may be the first of the tokenizer's parameters."""
    tokenizer = make_tokenizer("vqvae", quantizer={"kind": name, **SMALL[name]})
    pipe = ImagePipeline(tokenizer, make_prior("gpt", tokenizer.grid.shape, tokenizer.grid.vocab_size))
    assert pipe.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert pipe.to(dtype=dtype).dtype == dtype == pipe.prior.dtype == pipe.tokenizer.dtype


def test_device_and_type_are_taken_as_torch_takes_them():
    pipe = make_pipeline()
    assert pipe.to(torch.bfloat16) is pipe and pipe.dtype == torch.bfloat16
    assert pipe.to("cpu", torch.float16).dtype == torch.float16
    assert pipe.to(torch.device("cpu")).dtype == pipe.to(device="cpu").dtype == torch.float16
    assert pipe.to(None, torch.float32).dtype == pipe.to().dtype == torch.float32
    assert pipe.to("meta").device == torch.device("meta")
    for wrong in ((torch.float32, torch.float16), (torch.float32, "cpu")):
        with pytest.raises(TypeError, match=r"^to\(\) takes a device, a dtype, or a device and then a dtype"):
            make_pipeline().to(*wrong)


def test_parts_that_do_not_belong_together_are_refused():
    pipe, other = make_pipeline(), make_pipeline()
    with pytest.raises(IntegrityError, match="another tokenizer"):
        ImagePipeline(other.tokenizer, pipe.prior)
    with pytest.raises(IntegrityError, match="grid"):
        ImagePipeline(pipe.tokenizer, make_prior("gpt", (3, 3), 32))
    with pytest.raises(ConfigError, match="labels: 2 names for 3 classes"):
        ImagePipeline(pipe.tokenizer, pipe.prior, labels=["a", "b"])
    with pytest.raises(ValueError, match="temperature"):
        ImagePipeline(pipe.tokenizer, pipe.prior, sampler={"temperature": -1})


# The model card


def card_of(pipe, folder):
    pipe.save_pretrained(folder)
    return (folder / "README.md").read_text()


def figures_in(card):
    rows = re.findall(r"^\| (?!figure|---)(.+?) \| (.+?) \|$", card, re.M)
    return {name: [float(number) for number in re.findall(r"[\d.]+", value)] for name, value in rows}


def test_card_shows_what_was_measured_and_nothing_else(tmp_path):
    pipe = make_pipeline()
    assert figures_in(card_of(pipe, tmp_path / "a")) == {}
    assert "Measured" not in (tmp_path / "a" / "README.md").read_text()
    pipe.provenance = PROVENANCE
    card = card_of(pipe, tmp_path / "b")
    numbers = sorted(number for values in figures_in(card).values() for number in values)
    assert numbers == [0.875, 1.5, 2.5, 3.125, 21.75, 1234, 5678]
    assert "`digits`" in card and "By training" in card
    pipe.provenance = {**PROVENANCE, "evaluation": {"psnr": 22.5, "class_agreement": 0.9375}}
    card = card_of(pipe, tmp_path / "c")
    shown = [number for values in figures_in(card).values() for number in values]
    assert sorted(shown) == [0.9375, 1.5, 2.5, 22.5, 1234, 5678] and "`smalti evaluate`" in card


def test_a_bound_is_called_one(tmp_path):
    for exact in (True, False):
        pipe = make_pipeline(prior="masked", exact=exact)
        pipe.provenance = PROVENANCE
        assert ("| at most 3.125 |" in card_of(pipe, tmp_path / str(exact))) != exact
        figures = dict.fromkeys(
            [
                "psnr",
                "codebook_usage",
                "codebook_perplexity",
                "bits_per_token",
                "unconditional_bits_per_token",
                "marginal_bits_per_token",
                "uniform_bits_per_token",
            ],
            3.5,
        )
        text = report(figures, exact=pipe.prior.exact, vocab_size=9, num_images=9, device="cpu")
        assert ("<= 3.500" in text) != exact


def test_card_says_what_the_pipeline_is(tmp_path):
    pipe = make_pipeline()
    card = card_of(pipe, tmp_path / "pipe")
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "smalti" and {"vqvae", "gpt"} <= set(header["tags"])
    assert "8 x 12 grey" in card and "3 classes (cat, dog, eel)" in card and "2 x 3 ids of 32" in card
    for part in (pipe.tokenizer, pipe.prior):
        assert f"{sum(p.numel() for p in part.parameters()):,} parameters" in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    names: dict = {}
    exec(code.replace("this folder or Hub id", (tmp_path / "pipe").as_posix()), names)
    assert len(names["images"]) == 4


def test_sample_grid_is_on_the_card_and_comes_back(tmp_path):
    pipe = make_pipeline()
    assert "samples.png" not in card_of(pipe, tmp_path / "without")
    grid = pipe.sample_picture(6)
    assert grid.dtype == np.uint8 and grid.shape[-1] == 3
    assert np.array_equal(grid, pipe.sample_picture(6))
    pipe.save_pretrained(tmp_path / "pipe", sample_grid=grid)
    assert "](samples.png)" in (tmp_path / "pipe" / "README.md").read_text()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pipe" / "samples.png")), grid)
    assert np.array_equal(ImagePipeline.from_pretrained(tmp_path / "pipe").sample_grid, grid)


@pytest.mark.parametrize("labels", [LABELS, []])
def test_push_to_hub_uploads_a_folder_that_loads(labels, monkeypatch):
    calls = []

    def replace_on_hub(folder, repo_id, ours, **options):
        loaded = ImagePipeline.from_pretrained(folder)
        calls.append((repo_id, files_in(folder), loaded(2, seed=0).tokens, options))
        return "a commit"

    monkeypatch.setattr("tokenizer.files.hub.require_reachable", lambda repo_id: None)
    monkeypatch.setattr("tokenizer.files.hub.replace_on_hub", replace_on_hub)
    pipe = make_pipeline(labels=labels)
    pipe.provenance = PROVENANCE
    assert pipe.push_to_hub("me/mosaic", token="hf_secret", private=True, commit_message="first") == "a commit"
    ((repo_id, files, tokens, options),) = calls
    assert (repo_id, options) == ("me/mosaic", {"token": "hf_secret", "private": True, "commit_message": "first"})
    assert files == {"model_index.json", "manifest.json", "README.md", "provenance.json", "samples.png", *PARTS}
    assert torch.equal(tokens, pipe(2, seed=0).tokens)


# Importing


def test_importing_is_light_and_quick():
    code = """
import json, sys, time
began = time.perf_counter()
import tokenizer, prior
models, heavy = time.perf_counter() - began, ["accelerate", "datasets", "wandb", "torchvision"]
loaded = [name for name in heavy if name in sys.modules]
from pipelines import ImagePipeline
seconds = time.perf_counter() - began
print(json.dumps([models, seconds, loaded, [name for name in heavy[:3] if name in sys.modules]]))
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    models, seconds, by_models, by_pipeline = json.loads(result.stdout)
    assert by_models == [] and by_pipeline == []
    print(f"import tokenizer, prior: {models:.2f} s; with ImagePipeline: {seconds:.2f} s")
    assert seconds < 10
