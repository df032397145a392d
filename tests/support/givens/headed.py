"""Small priors of every kind and output head, over grids that the head fits."""

import math

import torch
from small import FLAT, PRIORS, PRIORS_IN_ORDERS, SMALL, VARIANTS, make_prior

from prior import Prior
from tokenizer import TokenGrid

HEADS = {"depth": {"kind": "depth", "dim": 12, "layers": 1}, "logistic": {"kind": "logistic", "components": 2}}
VOCAB = {"depth": 4, "logistic": 16}
TOGETHER = ["gpt", "blocks", "causal_conv", "pixelcnn", "gated_pixelcnn", "pixelcnn_pp", "pixelsnail"]
"""Kinds whose heads may draw several ids of a position."""
HEADED = {f"{kind}, depth": (kind, "depth", {"levels": 3}) for kind in TOGETHER}
HEADED |= {f"{kind}, logistic": (kind, "logistic", {"channels": 3}) for kind in TOGETHER}
HEADED |= {f"{kind}, grey": (kind, "logistic", {"channels": 1}) for kind in ("gpt", "masked", "made")}
HEADED["gpt, depth of channels"] = ("gpt", "depth", {"channels": 3})
"""Kind, output head and facts of the grid of each prior with a head, by name."""
ORDERS = {
    "gpt, depth": ["snake", "random:1"],
    "causal_conv, depth": ["column"],
    "blocks, depth": ["diagonal", "halton:2", "raster/4"],
    "masked, grey": ["halton:2"],
    "made, grey": ["snake"],
}
CLIPS = {f"{name}, clip": (name, {}) for name in PRIORS if name not in FLAT}
CLIPS |= {f"windowed {name}, clip": (name, {"window": (1, 1, 1), "dilation": (2, 1)}) for name in ("gpt", "blocks")}
CLIPS |= {"gpt, random clip": ("gpt", {"order": "random:1"}), "blocks of 4, clip": ("blocks", {"order": "random:1:4"})}
"""Kind and settings of priors over frames, rows and columns, by name."""
MODELS = [*PRIORS, *VARIANTS, *HEADED]
MODELS_IN_ORDERS = [
    *PRIORS_IN_ORDERS,
    *((name, order) for name in HEADED for order in ("raster", *ORDERS.get(name, []))),
]
"""The name of every prior, without a head or with one, and each order that it is tested in."""


def make_model(name, order="raster", **config):
    """A small prior of `MODELS` or `CLIPS`, in eval mode."""
    if name in CLIPS:
        kind, settings = CLIPS[name]
        return make_prior(kind, **{"shape": (3, 2, 3), **settings, **config})
    return make_headed(*HEADED[name], order, **config) if name in HEADED else make_prior(name, order=order, **config)


def make_tiny(name, order, max_grids):
    """A prior of `MODELS` or `CLIPS` in float64 with at most `max_grids` grids, and all of these grids."""
    sizes = {"shape": (2, 3), "vocab_size": 3}
    if name == "next_scale":
        sizes = {"shape": (2, 3), "vocab_size": 2} if max_grids >= 512 else {"shape": (2, 2), "vocab_size": 2}
    if name in CLIPS:
        sizes["shape"] = (2, 1, 3)
    if name in HEADED:
        order = "raster" if order.startswith(("halton", "raster/")) else order
        pixels = HEADED[name][1] == "logistic"
        sizes = {"positions": (1, 1), "vocab_size": 16} if pixels else {"positions": (1, 2), "vocab_size": 2}
    model = make_model(name, order, **sizes)
    if model.grid.vocab_size ** len(model.grid) > max_grids:
        model = make_model(name, order, **{**sizes, "vocab_size": 2})
    return model.double(), all_grids(model.grid)


def all_grids(grid):
    """Every grid of tokens, `(V^N, *grid.shape)`."""
    count = grid.vocab_size ** len(grid)
    digits = grid.vocab_size ** torch.arange(len(grid)).flip(0)
    return (torch.arange(count)[:, None] // digits % grid.vocab_size).view(count, *grid.shape)


def numbers_of(tokens, grid):
    """The number of each of `tokens` `(B, *grid.shape)` in `all_grids`."""
    return (tokens.flatten(1) * grid.vocab_size ** torch.arange(len(grid)).flip(0)).sum(1)


def grid_with(facts: dict[str, int], positions: tuple[int, int], vocab_size: int) -> TokenGrid:
    """A grid of `positions`, each with as many ids as `facts` say."""
    return TokenGrid((positions[0] * math.prod(facts.values()), positions[1]), vocab_size, **facts)


def make_headed(kind, head, facts, order="raster", positions=(2, 3), vocab_size=None, std=0.3, **config):
    """A prior in eval mode, with weights large enough that every input matters."""
    grid = grid_with(facts, positions, vocab_size or VOCAB[head])
    settings = {"num_classes": 3, **SMALL.get(kind, {}), **config}
    model = Prior.create(kind, grid=grid, order=order, head=HEADS[head], **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()
