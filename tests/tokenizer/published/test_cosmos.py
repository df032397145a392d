"""Cosmos' discrete tokenizer gives the tokens and images of its definition, and its wavelets lose nothing."""

from __future__ import annotations

import pytest
import torch
from command import fails
from givens.published import (
    agree_in_double,
    cosmos_says,
    cosmos_shapes,
    imported,
    random_images,
    random_weights,
    wavelets,
)
from safetensors.torch import save_file

from tokenizer.published.cosmos import Haar, InverseHaar

LEVELS = (8, 8, 8, 5, 5, 5)
NETWORKS = [
    ((1, 2, 2), 2, {"patch": 2, "blocks": 2, "channels": 1}),
    ((2, 2, 1), 1, {"patch": 4}),  # as of DI8x8: three levels, of which one halves
]


@pytest.mark.parametrize(("mult", "halvings", "choices"), NETWORKS)
def test_tokens_and_images_are_the_same(tmp_path, mult, halvings, choices):
    weights = random_weights(cosmos_shapes(32, mult, halvings, **choices))
    save_file(weights, tmp_path / "autoencoder.safetensors")
    tokenizer = imported(tmp_path, tmp_path / "out", "image_size=[64, 32]")
    patch = choices.get("patch", 4)
    assert tokenizer.config.patch == patch and tokenizer.config.halvings == halvings
    assert tokenizer.grid.shape == (64 // patch // 2**halvings, 32 // patch // 2**halvings)
    assert tokenizer.grid.vocab_size == 64_000
    images = random_images(4, (choices.get("channels", 3), 64, 32))
    agree_in_double(tokenizer, images, *cosmos_says(weights, len(mult), images, LEVELS, patch))


def test_other_levels_are_set_or_read_from_the_file(tmp_path, capsys):
    steps = [7, 5, 4, 3]
    weights = random_weights(cosmos_shapes(32, (1, 2), 1, dim=4))
    save_file(weights, tmp_path / "autoencoder.safetensors")
    command = [f"source={tmp_path}", f"out={tmp_path}/out", "image_size=16"]
    assert "quant_conv.weight" in fails(capsys, "import", *command)
    buffers = {  # what TorchScript also stores
        "quantizer._levels": torch.tensor(steps, dtype=torch.int32),
        "quantizer._basis": torch.ones(4, dtype=torch.int32),
        "quantizer.implicit_codebook": torch.zeros(420, 4),
        "encoder.patcher.wavelets": torch.zeros(2),
        "decoder.unpatcher._arange": torch.zeros(2, dtype=torch.int64),
    }
    images = random_images(3, (3, 16, 16))
    given = imported(tmp_path, tmp_path / "given", "image_size=16", "levels=[7, 5, 4, 3]")
    save_file({**weights, **buffers}, tmp_path / "autoencoder.safetensors")
    found = imported(tmp_path, tmp_path / "out", "image_size=16")
    assert "skipped 5" in capsys.readouterr().out
    for tokenizer in (given, found):
        agree_in_double(tokenizer, images, *cosmos_says(weights, 2, images, steps))


def test_wavelets_are_the_convolutions_that_were_published_and_lose_nothing():
    x = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    for patch in (1, 2, 4, 8):
        folded = Haar(patch)(x)
        assert folded.shape == (2, 3 * patch**2, 16 // patch, 8 // patch)
        assert torch.allclose(folded, wavelets(x, patch), atol=1e-12)
        assert torch.allclose(InverseHaar(patch)(folded), x, atol=1e-12)
