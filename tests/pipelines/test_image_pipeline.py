"""Promises of `ImagePipeline`, whatever tokenizer and prior it holds: scoring, completing, types, and a light import.

Covers: pipelines/stages/base.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import QUANTIZERS, make_prior, make_tokenizer, quantizer_of
from small_pipelines import (
    as_pil,
    every_pair,
    every_prior_pair,
    every_tokenizer,
    make_pipeline,
    pixels_for,
    placed_pairs,
    placed_priors,
)

from pipelines import ImagePipeline
from tokenizer import TokenGrid, Tokenizer
from tokenizer.base import LikelihoodError
from tokenizer.config import ModelConfig
from tokenizer.files import ConfigError, IntegrityError

# Scoring


@every_prior_pair
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


def test_no_images_are_scored_as_none():
    """What a mask selects may be nothing."""
    pipe = make_pipeline("pixels")
    none = torch.zeros(0, 1, 8, 12)
    known = torch.ones(8, 12, dtype=torch.bool)
    for labels in (None, 1, []):
        assert pipe.log_prob(none, labels).shape == pipe.bits_per_dim(none, labels).shape == (0,)
        assert pipe.conditional_log_prob(none, known, labels).shape == (0,)
        assert pipe.anomaly_map(none, labels).shape == (0, 8, 12)
    assert pipe.reconstruct(none, output_type="pt").shape == none.shape


def test_tokens_out_of_range_are_refused():
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="ids should lie"):
        pipe.decode(torch.full((1, 2, 3), 32))


# Completing


@placed_pairs
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


@placed_pairs
def test_hidden_pixels_do_not_leak(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    pixels = pixels_for(pipe, 8)
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


@placed_priors
def test_completions_differ_by_seed_and_not_by_batch(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    pixels = pixels_for(pipe)
    known = (torch.arange(8) < 4)[:, None].expand(8, 12)
    made = pipe.complete(pixels, known, seed=0)
    assert not torch.equal(made.tokens, pipe.complete(pixels, known, seed=1).tokens)
    assert torch.equal(made.tokens, pipe.complete(pixels, known, seed=0, batch_size=2, progress=False).tokens)
    assert torch.equal(made.tokens, pipe.complete(pixels, known.expand(5, 8, 12).numpy(), seed=0).tokens)


def test_a_tokenizer_of_scales_completes_nothing():
    pipe = make_pipeline(prior="next_scale")
    with pytest.raises(ValueError, match=r"^a coarse scale's token belongs to no part of the image, so [^\n]*$"):
        pipe.complete(pixels_for(pipe), torch.ones(8, 12).bool())


def test_a_row_of_registers_completes_nothing_and_says_so_in_a_line():
    pipe, known = make_pipeline("titok"), torch.arange(12).expand(8, 12) < 5
    message = r"^a register's token belongs to no part of the image[^\n]*$"
    with pytest.raises(ValueError, match=message):
        pipe.complete(pixels_for(pipe), known)
    with pytest.raises(ValueError, match=message):
        pipe.conditional_log_prob(pixels_for(pipe), known)


def test_prefixes_pass_through_the_pipeline_in_any_batch():
    pipe = make_pipeline("titok")
    tokens = pipe.encode(pixels_for(pipe))
    for count in (1, 3, 5):
        made = pipe.decode(tokens[:, :count], output_type="pt")
        assert made.shape == (5, 1, 8, 12)
        assert torch.equal(made[2:3], pipe.decode(tokens[2:3, :count], output_type="pt"))
        torch.testing.assert_close(made, pipe.tokenizer.decode(tokens[:, :count]))
    with pytest.raises(ValueError, match=r"^takes 1 to 5 tokens of an image, got 6$"):
        pipe.decode(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^takes all 5 tokens of an image, got 2; prefixes need model\.keep[^\n]*$"):
        make_pipeline("titok", sizes={"keep": None}).decode(torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("known", [torch.ones(12, 8).bool(), torch.ones(2, 8, 12).bool(), torch.ones(8, 12)])
def test_masks_of_another_shape_or_type_are_refused(known):
    with pytest.raises(ValueError, match="known should be bool"):
        make_pipeline().complete(torch.zeros(3, 1, 8, 12), known)


# Types and parts


@pytest.mark.sparse
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_pair
def test_another_type_can_be_used_saved_and_loaded(tokenizer, prior, dtype, tmp_path):
    pipe = make_pipeline(tokenizer, prior)
    pipe.save_pretrained(tmp_path / "full")
    assert pipe.to(dtype=dtype) is pipe and next(pipe.prior.parameters()).dtype == dtype
    pixels = pixels_for(pipe, 2)
    drawn = pipe(2, 1, seed=0)
    assert len(drawn.images) == len(pipe.reconstruct(pixels)) == 2
    assert torch.isfinite(pipe.log_prob(pixels)).all()
    pipe.save_pretrained(tmp_path / "half")
    same = ImagePipeline.from_pretrained(tmp_path / "half", dtype=dtype)
    assert torch.equal(same(2, 1, seed=0).tokens, drawn.tokens)
    wide = ImagePipeline.from_pretrained(tmp_path / "half")
    assert len(wide(2, 1, seed=0).images) == 2
    loaded = ImagePipeline.from_pretrained(tmp_path / "full", dtype=dtype)
    assert torch.equal(loaded(2, 1, seed=0).tokens, drawn.tokens)
    loaded.save_pretrained(tmp_path / "again")
    ImagePipeline.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_type_is_that_of_the_networks(name):
    """A codebook stays float32, and may be the first of the tokenizer's parameters."""
    tokenizer = make_tokenizer("vqvae", quantizer=quantizer_of(name, 3, 2))
    pipe = ImagePipeline(tokenizer, make_prior("gpt", grid=tokenizer.grid))
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
