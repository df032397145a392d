"""Promises of the VQGAN network, beyond those of every tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from small import make_tokenizer

from tokenizer import Tokenizer


@pytest.mark.parametrize(("widths", "grid"), [((8,), (16, 24)), ((8, 16), (8, 12)), ((8, 4, 8, 12), (2, 3))])
def test_every_level_but_one_halves_the_grid(widths, grid):
    tokenizer = make_tokenizer("vqgan", (16, 24), widths=widths).eval()
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    assert tokenizer.grid.shape == grid and tokenizer(images).images.shape == images.shape
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)


def test_the_preset_is_llamagens_network():
    """71.88 million parameters, as its published weights have."""
    path = Path(__file__).parents[2] / "configs" / "tokenizer" / "vqgan_imagenet256.yaml"
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    with torch.device("meta"):
        tokenizer = Tokenizer.create(model.pop("kind"), image_size=(256, 256), channels=3, **model)
    assert sum(p.numel() for p in tokenizer.parameters()) == 71_883_403
    assert tokenizer.grid.shape == (16, 16) and tokenizer.grid.vocab_size == 16384
