"""`ImagePipeline` with any tokenizer and prior: encoding and decoding, scores, types and components."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small import make_prior, make_tokenizer, quantizer_of
from small_pipelines import (
    every_prior_pair,
    every_tokenizer,
    make_pipeline,
    pixels_for,
)
from torch._dynamo.testing import CompileCounter

from pipelines import ImagePipeline
from tokenizer.base import LikelihoodError
from tokenizer.files import ConfigError, IntegrityError

# Scoring


@every_prior_pair
def test_log_prob_is_that_of_the_tokens(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    pixels = pixels_for(pipe)
    tokens = pipe.encode(pixels)
    torch.testing.assert_close(pipe.log_prob(pixels), pipe.prior.log_prob(tokens))
    mixed = pipe.log_prob(pixels, [0, None, "eel", 1, 1], batch_size=2)
    torch.testing.assert_close(mixed, pipe.prior.log_prob(tokens, torch.tensor([0, 3, 2, 1, 1])))


@every_tokenizer
def test_bits_per_dim_needs_a_decoder_with_a_likelihood(tokenizer):
    pipe = make_pipeline(tokenizer)
    pixels = pixels_for(pipe, 2)
    images = pixels.float() / 127.5 - 1
    given = pipe.tokenizer.pixel_log_prob(images, pipe.encode(images))
    if given is None:
        with pytest.raises(LikelihoodError, match=pipe.tokenizer.name):
            pipe.bits_per_dim(pixels)
    else:
        expected = -(pipe.log_prob(pixels) + given) / (images[0].numel() * np.log(2))
        torch.testing.assert_close(pipe.bits_per_dim(pixels), expected)


def test_an_empty_batch_has_empty_scores():
    """A selection of images may be empty."""
    pipe = make_pipeline("pixels")
    none = torch.zeros(0, 1, 8, 12)
    known = torch.ones(8, 12, dtype=torch.bool)
    assert pipe.log_prob(none, 1).shape == pipe.bits_per_dim(none, []).shape == (0,)
    assert pipe.conditional_log_prob(none, known).shape == (0,)
    assert pipe.anomaly_map(none).shape == (0, 8, 12)
    assert pipe.reconstruct(none, output_type="pt").shape == none.shape


# Encoding and decoding


@every_tokenizer
def test_tokens_and_pixels_do_not_depend_on_the_batch(tokenizer):
    """Pixels differ by at most one grey level."""
    pipe = make_pipeline(tokenizer, channels=3)
    pixels = pixels_for(pipe, 9)
    tokens = pipe.encode(pixels)
    images = pipe.decode(tokens, output_type="pt")
    assert torch.equal(pipe.encode(pixels, batch_size=4), tokens)
    assert (pipe.decode(tokens, output_type="pt", batch_size=4) - images).abs().max() <= 1 / 127.5
    assert (pipe.reconstruct(pixels, output_type="pt", batch_size=4) - images).abs().max() <= 1 / 127.5


def test_grey_images_have_mode_l_and_one_channel():
    pipe = make_pipeline()
    assert [image.mode for image in pipe(2, seed=0).images] == ["L", "L"]
    assert pipe(2, seed=0, output_type="np").images.shape == (2, 8, 12, 1)


def test_prefixes_of_tokens_decode_in_any_batch():
    pipe = make_pipeline("titok")
    tokens = pipe.encode(pixels_for(pipe))
    for count in (1, 3, 5):
        made = pipe.decode(tokens[:, :count], output_type="pt")
        torch.testing.assert_close(made[2:3], pipe.decode(tokens[2:3, :count], output_type="pt"))
        torch.testing.assert_close(made, pipe.tokenizer.decode(tokens[:, :count]))
    with pytest.raises(ValueError, match="got 2"):
        make_pipeline("titok", sizes={"keep": None}).decode(torch.zeros(1, 2, dtype=torch.long))


# Types and components


@pytest.mark.sparse
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_prior_pair
def test_half_precision_can_be_used_saved_and_loaded(tokenizer, prior, dtype, tmp_path):
    pipe = make_pipeline(tokenizer, prior)
    assert pipe.to(dtype=dtype) is pipe and next(pipe.prior.parameters()).dtype == dtype
    pixels = pixels_for(pipe, 2)
    drawn = pipe(2, 1, seed=0)
    assert len(drawn.images) == len(pipe.reconstruct(pixels)) == 2
    assert torch.isfinite(pipe.log_prob(pixels)).all()
    pipe.save_pretrained(tmp_path / "half")
    same = ImagePipeline.from_pretrained(tmp_path / "half", dtype=dtype)
    assert torch.equal(same(2, 1, seed=0).tokens, drawn.tokens)
    assert ImagePipeline.from_pretrained(tmp_path / "half").prior.dtype == torch.float32


@pytest.mark.parametrize("name", ["ema", "lfq"])
def test_dtype_is_that_of_the_networks(name):
    """A codebook stays float32, and may be the tokenizer's first parameter."""
    tokenizer = make_tokenizer("vqvae", quantizer=quantizer_of(name, 3, 2))
    pipe = ImagePipeline(tokenizer, make_prior("gpt", grid=tokenizer.grid))
    assert pipe.dtype == torch.float32
    assert pipe.to(dtype=torch.bfloat16).dtype == torch.bfloat16 == pipe.prior.dtype == pipe.tokenizer.dtype


def test_to_takes_device_and_dtype_like_torch():
    pipe = make_pipeline()
    assert pipe.to(torch.bfloat16) is pipe and pipe.dtype == torch.bfloat16
    assert pipe.to("cpu", torch.float16).dtype == pipe.to(device="cpu").dtype == torch.float16
    assert pipe.to("meta").device == torch.device("meta")


def test_models_that_do_not_fit_are_refused():
    pipe, other = make_pipeline(), make_pipeline()
    with pytest.raises(IntegrityError, match="tokenizer"):
        ImagePipeline(other.tokenizer, pipe.prior)
    with pytest.raises(IntegrityError, match="grid"):
        ImagePipeline(pipe.tokenizer, make_prior("gpt", (3, 3), 32))
    with pytest.raises(ConfigError, match="labels"):
        ImagePipeline(pipe.tokenizer, pipe.prior, labels=["a", "b"])
    with pytest.raises(TypeError, match=r"pipe.prior.compile\(\)"):
        ImagePipeline(pipe.tokenizer, torch.compile(pipe.prior, backend="eager"))


def test_a_compiled_prior_draws_scores_and_embeds_as_before(tmp_path):
    """Features use hooks, which a module compiled without hooks would not call."""
    torch._dynamo.reset()
    pipe, counter = make_pipeline(), CompileCounter()
    images = pixels_for(pipe, 3)
    plain, scores, drawn = pipe.embed(images), pipe.log_prob(images), pipe(3, "dog", seed=0).tokens
    pipe.prior.compile(backend=counter)
    torch.testing.assert_close(pipe.log_prob(images), scores)
    torch.testing.assert_close(pipe.embed(images), plain)
    assert counter.frame_count > 0
    assert pipe(3, "dog", seed=0).tokens.equal(drawn)
    pipe.save_pretrained(tmp_path / "pipe")
    assert ImagePipeline.from_pretrained(tmp_path / "pipe")(3, "dog", seed=0).tokens.equal(drawn)
    torch._dynamo.reset()


def test_components_make_another_pipeline_with_the_same_models():
    pipe = make_pipeline()
    assert list(pipe.components) == ["tokenizer", "prior"]
    pipe.set_background(copy.deepcopy(pipe.prior))
    again = ImagePipeline(**pipe.components, labels=pipe.labels)
    assert list(again.components) == ["tokenizer", "prior", "background"]
    assert all(model is pipe.components[name] for name, model in again.components.items())
    with pytest.raises(IntegrityError, match="background"):
        pipe.set_background(make_pipeline().prior)
