"""Convolutional decoders of every factor and number of resolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import make_tokenizer
from torch import Tensor, nn

from tokenizer import Tokenizer
from tokenizer.losses import total_loss

FORMS = [(factor, count) for factor in (2, 4, 8, 16) for count in range(1, factor.bit_length() + 1)]
"""Factors and numbers of widths; with one width more than halvings, a patch is one pixel."""


def form(factor: int, count: int, **more: Any) -> dict[str, Any]:
    """The settings of a small network with `count` resolutions."""
    return {"factor": factor, "widths": (8,) * count, "blocks": (1,) * count, **more}


def images_for(tokenizer: Tokenizer, count: int = 2) -> Tensor:
    return torch.rand(count, *tokenizer.image_shape) * 2 - 1


@pytest.mark.parametrize(("factor", "count"), FORMS)
def test_every_factor_decodes_every_size(factor, count):
    channels = 3 if count % 2 else 1
    tokenizer = make_tokenizer(
        "vqvae", (3 * factor, factor), channels, **form(factor, count, attention=count > 2)
    ).train()
    images = images_for(tokenizer)
    output = tokenizer(images)
    assert output.images.shape == images.shape == (2, channels, 3 * factor, factor) and tokenizer.grid.shape == (3, 1)
    loss, _ = total_loss(output, images, {"l1": 1.0, "l2": 1.0, **tokenizer.loss_weights})
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    tokenizer.eval()
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)


@pytest.mark.parametrize("name", ["vqvae", "klvae"])
def test_memory_stays_channels_last(name):
    tokenizer = make_tokenizer(name, (16, 16), **form(8, 1)).eval()
    layers = [module for module in tokenizer.decoder.modules() if isinstance(module, (nn.Conv2d, nn.PixelShuffle))]
    formats = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _, given, __: formats.append(given[0].is_contiguous(memory_format=torch.channels_last))
        )
    tokenizer(images_for(tokenizer))
    assert len(formats) == len(layers) and all(formats[1:])  # the first one reads the quantizer's output
