"""Convolutional decoders of every factor and number of resolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import images_for, make_tokenizer

from tokenizer.losses import total_loss

FORMS = [(2, 1), (2, 2), (4, 1), (4, 3), (8, 2), (16, 1), (16, 4), (16, 5)]
"""Factors and numbers of widths; with one width more than halvings, a patch is one pixel."""


def form(factor: int, count: int, **more: Any) -> dict[str, Any]:
    """The settings of a small network with `count` resolutions."""
    return {"factor": factor, "widths": (8,) * count, "blocks": (1,) * count, **more}


@pytest.mark.parametrize(("factor", "count"), FORMS)
def test_every_factor_decodes_every_size(factor, count):
    channels = 3 if count % 2 else 1
    tokenizer = make_tokenizer(
        "vqvae", (3 * factor, factor), channels, **form(factor, count, attention=count > 2)
    ).train()
    images = images_for(tokenizer, 2)
    output = tokenizer(images)
    assert output.images.shape == images.shape == (2, channels, 3 * factor, factor) and tokenizer.grid.shape == (3, 1)
    loss, _ = total_loss(output, images, {"l1": 1.0, "l2": 1.0, **tokenizer.loss_weights})
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    tokenizer.eval()
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)
