"""Tokens and bits as pictures."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.app.colours import golden, heat, token_picture


def test_ids_have_colours_of_their_own():
    colours = golden(torch.arange(256)).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == 256
    steps = np.abs(np.diff(colours.astype(int), axis=0)).sum(1)
    assert steps.min() > 60  # neighbours are told apart


def test_a_pixel_for_each_token():
    assert token_picture(torch.arange(12).reshape(3, 4)).shape == (3, 4, 3)
    assert token_picture(torch.zeros(2, 3, 4, dtype=torch.long)).shape == (6, 4, 3)  # levels below each other
    folded = token_picture(torch.arange(5))
    assert folded.shape == (2, 3, 3) and np.array_equal(folded.reshape(-1, 3)[:5], golden(torch.arange(5)))


def test_more_bits_are_brighter():
    found = heat(torch.linspace(0, 1, 40).reshape(5, 8)).reshape(-1, 3).astype(int).sum(1)
    assert found[0] == 0 and found[-1] == 3 * 255 and (np.diff(found) > 0).all()
