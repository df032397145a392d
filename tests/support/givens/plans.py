"""Plans of small runs, and the small priors they are about."""

from __future__ import annotations

import torch
from small import SMALL, grid_of

from pipelines.commands import plan
from prior import Prior
from tokenizer import TokenGrid


def planned(*argv: str) -> plan.Forecast:
    """The figures of a command line."""
    return plan.main(list(argv))


def prior_in_training(name: str, grid: TokenGrid | None = None, **config) -> Prior:
    """A small prior in training mode."""
    grid = grid or grid_of(name, (6, 5), 40)
    return Prior.create(name, grid=grid, num_classes=3, **{**SMALL.get(name, {}), **config}).train()


def on_meta(name: str, **config) -> Prior:
    """The same without storage."""
    with torch.device("meta"):
        return prior_in_training(name, **config)


TINY = [
    "model.kind=gpt",
    "model.dim=64",
    "model.depth=1",
    "model.heads=4",
    "grid=[8,8]",
    "vocab_size=64",
    "classes=10",
    "rows=1000",
]
