"""Imported kinds at their defaults are the published networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from givens.published import cosmos_shapes, magvit2_shapes, maskgit_shapes

from tokenizer import Tokenizer

PUBLISHED = {
    "cosmos": (cosmos_shapes(128, (2, 4, 4), 2, blocks=2, z=256), 64_000),  # DI16x16
    "magvit2": (magvit2_shapes(128, (1, 1, 2, 2, 4), blocks=4, bits=18), 262_144),
    "maskgit": (maskgit_shapes(128, (1, 1, 2, 2, 4), blocks=2, codes=1024, dim=256), 1024),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_defaults_are_the_published_network(kind):
    """By the shapes of the weights of the published sizes, of which 16x16 ids of 256x256 pixels come."""
    shapes, vocab_size = PUBLISHED[kind]
    with torch.device("meta"):
        tokenizer = Tokenizer.create(kind, image_size=(256, 256), channels=3)
    expected = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sum(p.numel() for p in tokenizer.parameters()) == expected
    assert tokenizer.grid.shape == (16, 16) and tokenizer.grid.vocab_size == vocab_size


def test_the_preset_of_a_vqgan_is_llamagens_network():
    """71.88 million parameters, as its published weights have."""
    path = Path(__file__).parents[3] / "configs" / "tokenizer" / "vqgan_imagenet256.yaml"
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    with torch.device("meta"):
        tokenizer = Tokenizer.create(model.pop("kind"), image_size=(256, 256), channels=3, **model)
    assert sum(p.numel() for p in tokenizer.parameters()) == 71_883_403
    assert tokenizer.grid.shape == (16, 16) and tokenizer.grid.vocab_size == 16384
