"""What is promised of an imported tokenizer: the same ids and the same pictures as the original's."""

from __future__ import annotations

import copy

import torch

CLOSE = 1e-4  # of reconstructions in [-1, 1]
SAME = 2e-6  # of those in double precision, of which the original's are told in single


def agree(tokenizer, images, tokens, pictures, different=3):
    """Same ids, and pictures within what is promised; enough of both that it means something."""
    rows, columns = tokenizer.grid.shape
    assert torch.equal(tokenizer.encode(images), tokens.reshape(len(images), rows, columns))
    assert len(tokens.unique()) > different
    difference = (tokenizer.decode(tokenizer.encode(images)) - pictures.clamp(-1, 1)).abs().max()
    assert difference < CLOSE, f"{difference:.1e}"
    assert pictures.std() > 0.1
    print(f"all of {tokens.numel()} tokens, {len(tokens.unique())} ids, largest difference {difference:.2e}")


def agree_in_double(tokenizer, images, tokens, pictures, different=3):
    """As `agree`, where `pictures` were computed in double precision: ours differ by no more than their rounding."""
    agree(tokenizer, images, tokens, pictures, different)
    twin = copy.deepcopy(tokenizer).double()
    with torch.no_grad():
        exact = twin._decode_vectors(twin.quantizer.lookup(tokens.reshape(len(images), *tokenizer.grid.shape)).double())
    assert (exact - pictures).abs().max() < SAME * pictures.abs().max().clamp(min=1)
