"""What is promised of an imported tokenizer: the same ids and the same pictures as the original's."""

from __future__ import annotations

import torch

CLOSE = 1e-4  # of reconstructions in [-1, 1]


def agree(tokenizer, images, tokens, pictures, different=3):
    """Same ids, and pictures within what is promised; enough of both that it means something."""
    rows, columns = tokenizer.grid.shape
    assert torch.equal(tokenizer.encode(images), tokens.reshape(len(images), rows, columns))
    assert len(tokens.unique()) > different
    difference = (tokenizer.decode(tokenizer.encode(images)) - pictures.clamp(-1, 1)).abs().max()
    assert difference < CLOSE, f"{difference:.1e}"
    assert pictures.std() > 0.1
    print(f"tokens {tokens.numel()} of {tokens.numel()}, ids {len(tokens.unique())}, largest difference {difference:.2e}")
