"""Small priors with an output head, over suitable grids."""

import torch
from small import SMALL

from prior import Prior
from tokenizer import TokenGrid

HEADS = {"depth": {"kind": "depth", "dim": 12, "layers": 1}, "logistic": {"kind": "logistic", "components": 2}}
VOCAB = {"depth": 4, "logistic": 16}
TOGETHER = ["gpt", "blocks", "causal_conv", "pixelcnn", "gated_pixelcnn", "pixelcnn_pp", "pixelsnail"]
"""Kinds whose heads can predict several ids per position."""
ORDERS = {"gpt": ["snake", "random:1"], "causal_conv": ["column"], "blocks": ["diagonal", "halton:2", "raster/4"]}

CASES = [
    (kind, head, facts, order)
    for kind in TOGETHER
    for head, facts in (
        ("depth", {"levels": 3}),
        ("depth", {"channels": 3}),
        ("logistic", {"channels": 3}),
        ("logistic", {"channels": 1}),
    )
    for order in ("raster", *(ORDERS.get(kind, []) if facts == {"levels": 3} else []))
]
CASES += [("masked", "logistic", {"channels": 1}, order) for order in ("raster", "halton:2")]
CASES += [("made", "logistic", {"channels": 1}, order) for order in ("raster", "snake")]
"""Kind, head, facts of the grid, order of positions."""


def grid_with(facts: dict[str, int], positions: tuple[int, int], vocab_size: int) -> TokenGrid:
    """A grid with this number of positions."""
    return TokenGrid((positions[0] * max(facts.values()), positions[1]), vocab_size, **facts)


def make_headed(kind, head, facts, order="raster", positions=(2, 3), vocab_size=None, std=0.3, **config):
    """A prior in eval mode, with weights large enough that every input matters."""
    grid = grid_with(facts, positions, vocab_size or VOCAB[head])
    settings = {**SMALL.get(kind, {}), **config}
    model = Prior.create(kind, grid=grid, num_classes=3, order=order, head=HEADS[head], **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()
