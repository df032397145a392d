"""Imported tokenizers give the same ids and images as the original."""

from __future__ import annotations

import copy

import torch

CLOSE = 1e-4  # tolerance for reconstructions in [-1, 1]
SAME = 2e-6  # relative tolerance in double precision; the expected images are float32


def agree(tokenizer, images, tokens, pictures, different=3):
    """Assert equal ids and close images; ids and images must vary."""
    rows, columns = tokenizer.grid.shape
    assert torch.equal(tokenizer.encode(images), tokens.reshape(len(images), rows, columns))
    assert len(tokens.unique()) > different
    difference = (tokenizer.decode(tokenizer.encode(images)) - pictures.clamp(-1, 1)).abs().max()
    assert difference < CLOSE, f"{difference:.1e}"
    assert pictures.std() > 0.1
    print(f"all of {tokens.numel()} tokens, {len(tokens.unique())} ids, largest difference {difference:.2e}")


def agree_in_double(tokenizer, images, tokens, pictures, different=3):
    """Like `agree`, for `pictures` computed in double precision, from which ours differ only by rounding."""
    agree(tokenizer, images, tokens, pictures, different)
    twin = copy.deepcopy(tokenizer).double()
    with torch.no_grad():
        exact = twin._decode_vectors(twin.quantizer.lookup(tokens.reshape(len(images), *tokenizer.grid.shape)).double())
    assert (exact - pictures).abs().max() < SAME * pictures.abs().max().clamp(min=1)
