"""Imported kinds at their defaults are the published networks."""

from __future__ import annotations

import pytest
import torch
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
    print(f"{kind}: {expected:,}")
