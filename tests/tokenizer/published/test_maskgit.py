"""MaskGIT-VQGAN gives the tokens and images of its definition, for images in [-1, 1]."""

from __future__ import annotations

import pytest
import torch
from givens.published import agree_in_double, imported, maskgit_says, maskgit_shapes, random_images, random_weights
from safetensors.torch import save_file
from small import make_tokenizer


@pytest.mark.parametrize(
    ("mult", "choices"),
    [((1, 1, 2), {"blocks": 2}), ((2, 1), {"channels": 1})],
    ids=["three levels", "a narrow stem, grey"],
)
def test_tokens_and_images_are_the_same(tmp_path, mult, choices):
    weights = random_weights(maskgit_shapes(32, mult, **choices))
    weights["encoder.conv_in.weight"] *= 50  # without a bias: as small as elsewhere, the images would not matter
    save_file(weights, tmp_path / "maskgit.safetensors")
    tokenizer = imported(tmp_path, tmp_path / "out", "image_size=[16, 24]")
    images = random_images(3, (choices.get("channels", 3), 16, 24))
    agree_in_double(tokenizer, images, *maskgit_says(weights, len(mult), images))
    with torch.no_grad():
        assert torch.equal(tokenizer(images).images, tokenizer.decode(tokenizer.encode(images)))


def test_parameters_of_a_likelihood_are_not_rescaled():
    """They are not an image."""
    tokenizer = make_tokenizer("maskgit", likelihood={"kind": "discretized_logistic", "components": 2}).eval()
    tokens = torch.zeros(1, *tokenizer.grid.shape, dtype=torch.long)
    expected = tokenizer.decoder(tokenizer.quantizer.lookup(tokens))
    assert torch.equal(tokenizer._decode_tokens(tokens), expected)
