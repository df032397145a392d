"""A small tokenizer trained on smooth images."""

from __future__ import annotations

from typing import Any

import torch
from small import make_tokenizer
from torch import Tensor

from tokenizer.losses import total_loss


def trained_on_waves(name: str, steps: int, **config: Any) -> tuple[Any, Tensor]:
    """Train a tokenizer on 256 images of 16 x 16 with five parameters each; returns both."""
    torch.manual_seed(0)
    rows = torch.linspace(-1, 1, 16)
    phases, slopes, heights = torch.rand(256, 1, 1, 1) * 6, torch.rand(256, 1, 1, 2) * 4, torch.rand(256, 1, 1, 1)
    images = heights * (slopes[..., :1] * rows[:, None] + slopes[..., 1:] * rows + phases).sin()
    tokenizer: Any = make_tokenizer(name, (16, 16), 1, **config).train()
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    for step in range(steps):
        some = images[(64 * step + torch.arange(64)) % 256]
        loss, _ = total_loss(tokenizer(some), some, {"l1": 0.0, "l2": 1.0, **tokenizer.loss_weights})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tokenizer.eval(), images
