"""The tokenizer of two transformers."""

from __future__ import annotations

import torch
from small import images_for, make_tokenizer


def test_a_position_is_a_patch():
    """Without attention, a position depends on its patch alone, and decodes to it."""
    tokenizer = make_tokenizer("vit", (12, 8), 3, factor=4)
    for tower in (tokenizer.encoder[1], tokenizer.decoder[0]):
        for block in tower.blocks:
            torch.nn.init.zeros_(block.project.weight)
    images = images_for(tokenizer, 1)
    z = tokenizer.encoder(images)
    images[0, 1, 5, 6] += 1  # row 1, column 1 of the grid
    moved = (tokenizer.encoder(images) - z).abs().amax((0, 1)) > 0
    assert moved.nonzero().tolist() == [[1, 1]]
    painted = tokenizer.decoder(z)
    z[0, :, 2, 0] += 1
    moved = (tokenizer.decoder(z) - painted).abs().amax((0, 1)) > 0
    assert moved.nonzero().tolist() == [[row, column] for row in range(8, 12) for column in range(4)]


def test_every_position_sees_the_whole_image():
    tokenizer = make_tokenizer("vit", (12, 8), 3, factor=4)
    images = images_for(tokenizer, 1)
    z = tokenizer.encoder(images)
    images[0, 0, 0, 0] += 1
    assert ((tokenizer.encoder(images) - z).abs().amax((0, 1)) > 0).all()
