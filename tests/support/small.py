"""Small models of every registered kind, so that a new file in a family is tested at once."""

import math
from typing import Any

import torch
from torch import Tensor

from prior import Prior
from prior.condition_encoder import Encoded
from tokenizer import TokenGrid, Tokenizer
from tokenizer.quantizers import Quantized, Quantizer

EMA = {"kind": "ema", "codes": 32, "dim": 8}
# Settings of small models. A model that is not listed is tested with its defaults.
SMALL: dict[str, dict[str, Any]] = {
    "gpt": {"dim": 32, "depth": 2, "heads": 2},
    "causal_conv": {"dim": 16, "depth": 4, "max_dilation": 8, "skip": 16},
    "pixelsnail": {"dim": 8, "depth": 2, "heads": 2, "key": 4, "value": 8, "hidden": 8},
    "made": {"hidden": (132, 121)},
    "pixelcnn": {"dim": 8, "depth": 2, "first_kernel": 3, "hidden": 8},
    "gated_pixelcnn": {"dim": 8, "depth": 2, "first_kernel": 3, "hidden": 8},
    "pixelcnn_pp": {"dim": 4, "depth": 1, "stages": 2},
    "masked": {"dim": 32, "depth": 2, "heads": 2},
    "blocks": {"dim": 32, "depth": 2, "heads": 2},
    "next_scale": {"dim": 32, "depth": 2, "heads": 2, "channels": 8},
    "vqvae": {"widths": (16,), "blocks": (1,), "quantizer": EMA},
    "vit": {"dim": 16, "depth": 1, "heads": 2, "quantizer": EMA},
    "titok": {"dim": 16, "depth": 1, "heads": 2, "registers": 5, "keep": "uniform", "quantizer": EMA},
    "vqgan": {"widths": (8, 16), "blocks": 1, "groups": 4, "quantizer": {"kind": "vq", "codes": 32, "dim": 8}},
    "cosmos": {
        "widths": (8, 16),
        "stem": 8,
        "blocks": 1,
        "groups": 4,
        "patch": 2,
        "halvings": 1,
        "z_channels": 8,
        "quantizer": {"kind": "fsq", "levels": (8, 8, 8)},
    },
    "maskgit": {"widths": (8, 16), "blocks": 1, "groups": 4, "quantizer": {"kind": "vq", "codes": 32, "dim": 8}},
    "magvit2": {"widths": (8, 16), "blocks": 1, "groups": 4, "quantizer": {"kind": "lfq", "bits": 8}},
    "frame_by_frame": {
        "frames": 2,
        "tokenizer": {"kind": "vqvae", "factor": 2, "widths": (16,), "blocks": (1,), "quantizer": EMA},
    },
    "ema": {"codes": 32, "dim": 8},
    "vq": {"codes": 32, "dim": 8},
    "ibq": {"codes": 32, "dim": 8},
    "gumbel": {"codes": 32, "dim": 8},
    "simvq": {"codes": 32, "dim": 8},
    "rvq": {"depth": 3, "book": EMA},
    "fsq": {"levels": (5, 4, 3)},
    "lfq": {"bits": 8, "levels": 2, "group": 3},
    "bsq": {"bits": 6},
    "multiscale": {"scales": (1, 3, 7), "book": EMA},
    "pixels": {"levels": 5},
    "palette": {"colors": 12},
    "klvae": {"widths": (16,), "blocks": (1,), "latent": 3, "bins": 6},
    "posthoc": {"bins": 7, "vae": {"kind": "klvae", "widths": (16,), "blocks": (1,), "latent": 3}},
}
# Settings with which a prior takes every order.
ANY_ORDER: dict[str, dict[str, Any]] = {
    "gpt": {"any_order": True},
    "made": {"order_agnostic": True},
    "masked": {},
    "blocks": {"any_order": True},
}
# Priors with settings that change much of the code path, tested like separate kinds.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "windowed_gpt": ("gpt", {"window": (1, 2), "dilation": (2, 1)}),
    "windowed_blocks": ("blocks", {"window": (1, 2), "dilation": (1, 2)}),
}
FLAT = {"next_scale", "pixelcnn", "gated_pixelcnn", "pixelcnn_pp", "pixelsnail"}
"""Priors that need two axes, or a grid of several scales."""
QUANTIZERS, TOKENIZERS, PRIORS = Quantizer.available(), Tokenizer.available(), Prior.available()
ORDERS = ["raster", "column", "snake", "spiral_in", "spiral_out", "z_curve", "hilbert", "subsample", "random:3"]
PARTITIONS = ["diagonal", "wave:2", "rows", "dyadic", "regions:4", "halton:4", "spread:5", "random:3:4", "snake/5"]


def node_of(name: str) -> dict[str, Any]:
    """The configuration node of a small model."""
    return {"kind": name, **SMALL.get(name, {})}


def quantizer_of(name: str, height: int, width: int) -> dict[str, Any]:
    """The configuration node of a small quantizer for latents of this size."""
    scales = {"scales": ("1x1", f"{height}x{width}")} if name == "multiscale" else {}
    return {**node_of(name), **scales}


def make_quantizer(name: str, **config: Any) -> Quantizer:
    """A small quantizer of the family."""
    return Quantizer.create(name, **{**SMALL.get(name, {}), **config})


def latents(quantizer: Quantizer, count: int, *spatial: int) -> Tensor:
    """Random vectors `(count, dim, *spatial)`; a quantizer of scales determines its own size."""
    return torch.randn(count, quantizer.dim, *(quantizer.scales[-1] if quantizer.scales else spatial))


def train_on(quantizer: Quantizer, z: Tensor) -> Quantized:
    """A training step without an optimizer: only moving averages change."""
    return quantizer.quantize(z)


def make_tokenizer(name: str, image_size: tuple[int, int] = (12, 8), channels: int = 3, **config: Any) -> Tokenizer:
    """A small tokenizer of the family."""
    return Tokenizer.create(name, image_size=image_size, channels=channels, **{**SMALL.get(name, {}), **config})


def images_for(tokenizer: Tokenizer, count: int = 3) -> Tensor:
    """Random 8-bit images in [-1, 1]."""
    return torch.randint(256, (count, *tokenizer.image_shape)) / 127.5 - 1


PLACED = [name for name in TOKENIZERS if make_tokenizer(name).placed]
"""Tokenizers that can tell which tokens the known pixels determine."""


def grid_of(name: str, shape: tuple[int, ...], vocab_size: int) -> TokenGrid:
    """A grid for this prior: of this shape, or with scales that double up to it."""
    if name != "next_scale" or len(shape) != 2:
        return TokenGrid(shape, vocab_size)
    scales = [shape]
    while max(scales[0]) > 1:
        scales.insert(0, tuple(-(-side // 2) for side in scales[0]))
    return TokenGrid((sum(math.prod(sides) for sides in scales),), vocab_size, tuple(scales))


def make_prior(name: str, shape: tuple[int, ...] = (3, 4), vocab_size: int = 5, **config: Any) -> Prior:
    """A small prior in eval mode, with weights large enough that every input matters."""
    kind, settings = VARIANTS.get(name, (name, {}))
    config = {"grid": grid_of(kind, shape, vocab_size), "num_classes": 3, **SMALL.get(kind, {}), **settings, **config}
    model = Prior.create(kind, **config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def draw_tokens(model: Prior, count: int) -> Tensor:
    """Random ids `(count, *grid)`."""
    return torch.randint(model.grid.vocab_size, (count, *model.grid.shape))


def draw_known(model: Prior, count: int, share: float) -> Tensor:
    """bool `(count, *grid)`, True for about this share of the tokens."""
    return torch.rand(count, *model.grid.shape) < share


def encode(model: Prior, count: int, labels: Any = None, condition: Any = None) -> Encoded:
    """What is given of `count` images, as `forward` receives it."""
    return model.encode_given(model.read_given(labels, condition, count))


def logits_of(model: Prior, tokens: Tensor, labels: Any = None, *, condition: Any = None, **inputs: Any) -> Tensor:
    """Teacher-forced logits given labels and a condition; inputs: further arguments of `forward`."""
    logits: Tensor = model(tokens, encode(model, len(tokens), labels, condition), **inputs)
    return logits


def moved_by(model: Prior, tokens: Tensor, labels: Tensor | None = None, least: float = 1e-9, **inputs: Any) -> Tensor:
    """bool `(N, N)`: [i, j] if changing token j changes the logits at i by more than `least`, in some image."""
    vocab, size = model.grid.vocab_size, len(model.grid)
    encoded, moved = encode(model, len(tokens), labels), torch.zeros(size, size, dtype=torch.bool)
    before = model(tokens, encoded, **inputs)
    for at in range(size):
        changed = tokens.flatten(1).clone()
        changed[:, at] = (changed[:, at] + torch.randint(1, vocab, changed[:, at].shape)) % vocab
        moved[:, at] = (model(changed.view_as(tokens), encoded, **inputs) - before).abs().amax((0, 2)) > least
    return moved


def allows_order(name: str, order: str) -> bool:
    """Whether the prior accepts this order at construction."""
    try:
        make_prior(name, order=order)
    except ValueError:
        return False
    return True


PRIORS_IN_ORDERS = [
    (name, order)
    for name in [*PRIORS, *VARIANTS]
    for order in ([*ORDERS, *PARTITIONS] if name in PRIORS else ["raster", "snake", "diagonal", "halton:4"])
    if allows_order(name, order)
]


SLOWER_TO_TEST = {"column", "snake", "spiral_out", "z_curve", "subsample", "wave:2", "dyadic", "regions:4", "spread:5"}
PRIORS_IN_SOME_ORDERS = [(name, order) for name, order in PRIORS_IN_ORDERS if order not in SLOWER_TO_TEST]
"""For slow tests that do not depend on the shape of an order."""


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    """One generator per image, seeded as in a pipeline."""
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]
