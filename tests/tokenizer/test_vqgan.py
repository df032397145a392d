"""Promises of the VQGAN network, beyond those of every tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from small import make_tokenizer

from tokenizer import Tokenizer
from tokenizer.files import ConfigError


@pytest.mark.parametrize(("widths", "grid"), [((8,), (16, 24)), ((8, 16), (8, 12)), ((8, 4, 8, 12), (2, 3))])
def test_every_level_but_one_halves_the_grid(widths, grid):
    tokenizer = make_tokenizer("vqgan", (16, 24), widths=widths).eval()
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    assert tokenizer.grid.shape == grid and tokenizer(images).images.shape == images.shape
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_size": (30, 32)}, "widths: .*30x32"),
        ({"widths": (8,) * 13}, "widths: 13 levels"),
        ({"widths": (8, 18, 8)}, "groups: 4 does not divide the width 18"),
        ({"stem": 6}, "groups: 4 does not divide the width 6"),
        ({"encoder_attention": (3,)}, r"encoder_attention: the levels are 0 to 2 \(got \[3\]\)"),
        ({"decoder_attention": (0, -4)}, r"decoder_attention: the levels are 0 to 2"),
        ({"image_size": (8,)}, "image_size: expected"),
        ({"blocks": 0}, "blocks: must be >= 1"),
        ({"quantizer": {"kind": "vqq"}}, "no Quantizer is called 'vqq'"),
    ],
)
def test_bad_configurations_are_named(config, message):
    choices = {"image_size": (32, 32), "channels": 3, "widths": (8, 8, 16), "groups": 4, **config}
    with pytest.raises(ConfigError, match=message):
        Tokenizer.create("vqgan", **choices)


def test_the_preset_is_llamagens_network():
    """71.88 million parameters, as its published weights have."""
    path = Path(__file__).parents[2] / "configs" / "tokenizer" / "vqgan_imagenet256.yaml"
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    with torch.device("meta"):
        tokenizer = Tokenizer.create(model.pop("kind"), image_size=(256, 256), channels=3, **model)
    assert sum(p.numel() for p in tokenizer.parameters()) == 71_883_403
    assert tokenizer.grid.shape == (16, 16) and tokenizer.grid.vocab_size == 16384
