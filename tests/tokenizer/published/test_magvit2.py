"""MaskGIT-VQGAN, Open-MAGVIT2 and IBQ of SEED-Voken give the tokens and images of their definitions."""

from __future__ import annotations

import pytest
import torch
from givens.published import (
    agree_in_double,
    ibq_says,
    imported,
    magvit2_says,
    magvit2_shapes,
    maskgit_says,
    maskgit_shapes,
    random_images,
    random_weights,
    taming_shapes,
)
from safetensors.torch import save_file
from small import make_tokenizer


def with_running_means(weights):
    """A file as training leaves it: other last weights, and `weights` as their running means."""
    means = {f"model_ema.{name.replace('.', '')}": value for name, value in weights.items()}
    last = {name: torch.randn(value.shape) for name, value in weights.items()}
    rest = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    return {**last, **means, **rest, "loss.discriminator.main.0.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    ("mult", "choices", "averaged"),
    [((1, 1, 2), {"blocks": 2, "bits": 10}, False), ((2, 1), {"channels": 1}, True)],
    ids=["three levels", "a narrow stem, grey"],
)
def test_magvit2s_tokens_and_images_are_the_same(tmp_path, mult, choices, averaged):
    weights = random_weights(magvit2_shapes(64, mult, **choices))
    weights["encoder.conv_in.weight"] *= 50  # without a bias: as small as elsewhere, the images would not matter
    for level in range(len(mult)):
        weights[f"decoder.adaptive.{level}.gamma.bias"] += 1  # next to 0, rounding would be normalised
    save_file(with_running_means(weights) if averaged else weights, tmp_path / "magvit2.safetensors")
    tokenizer = imported(tmp_path, tmp_path / "out", "image_size=[16, 24]")
    assert tokenizer.grid.vocab_size == 2 ** choices.get("bits", 6)
    images = random_images(3, (choices.get("channels", 3), 16, 24))
    agree_in_double(tokenizer, images, *magvit2_says(weights, len(mult), images))


@pytest.mark.parametrize(("mult", "choices"), [((1, 1, 2), {"blocks": 2}), ((2, 1), {"channels": 1})])
def test_maskgits_tokens_and_images_are_the_same(tmp_path, mult, choices):
    """For images in [-1, 1]; its own are in [0, 1]."""
    weights = random_weights(maskgit_shapes(32, mult, **choices))
    weights["encoder.conv_in.weight"] *= 50
    save_file(weights, tmp_path / "maskgit.safetensors")
    tokenizer = imported(tmp_path, tmp_path / "out", "image_size=[16, 24]")
    images = random_images(3, (choices.get("channels", 3), 16, 24))
    agree_in_double(tokenizer, images, *maskgit_says(weights, len(mult), images))


def test_parameters_of_a_likelihood_are_not_rescaled_as_maskgits_images_are():
    tokenizer = make_tokenizer("maskgit", likelihood={"kind": "discretized_logistic", "components": 2}).eval()
    tokens = torch.zeros(1, *tokenizer.grid.shape, dtype=torch.long)
    expected = tokenizer.decoder(tokenizer.quantizer.lookup(tokens))
    assert torch.equal(tokenizer._decode_tokens(tokens), expected)


def test_an_image_of_one_token_has_no_deviation():
    tokenizer = make_tokenizer("magvit2", (2, 2)).train()
    output = tokenizer(torch.rand(2, 3, 2, 2))
    output.images.mean().backward()
    assert len(tokenizer.grid) == 1 and output.images.isfinite().all()
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters() if p.grad is not None)


def test_ibqs_tokens_and_images_are_the_same(tmp_path):
    weights = random_weights(taming_shapes(32, (1, 2), attention=(1,), codes=48))
    assert weights["quantize.embedding.weight"].norm(dim=1).std() > 0.1  # or the nearest would be the largest product
    save_file(weights, tmp_path / "ibq.safetensors")
    tokenizer = imported(tmp_path, tmp_path / "out", "image_size=16", "layout=ibq")
    assert tokenizer.quantizer.name == "ibq"
    images = random_images(3, (3, 16, 16))
    agree_in_double(tokenizer, images, *ibq_says(weights, 2, images))
