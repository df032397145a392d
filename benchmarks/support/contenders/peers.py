"""Other networks at equal bits, each in three sizes: what `benchmarks/tokenizers/equal_bits.py set=peers` compares.

Factor, codes and training are those of the preset; a name is a network's and a size's. `subpixel` has the preset's own
widths and blocks as its medium size; `nearest` is the decoder of before (nearest pixels repeated, and a patch painted
by one convolution), whose presets had two more residual blocks at the token resolution.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

from benchmarks.support.contenders.nodes import Node

SIZES = {"small": 0.5, "medium": 1.0, "large": 2.0}
NARROWEST, HEAD = 16, 32  # channels at the image's resolution of a medium VQGAN; of an attention head
DEPTHS = {"small": 2, "medium": 4, "large": 6}  # of each transformer of a ViT
WIDTH = 128  # of a medium one
GROUPS = 8  # of a VQGAN's group normalisation


def peers(preset: Node, out: Path) -> dict[str, Node]:
    """What each peer says on top of the tokenizer's preset, by name."""
    if find_spec("diffusers"):
        from benchmarks.support.contenders import vq_model  # noqa: F401 (its tokenizer is now one of the family)

    model = preset["model"]
    found = {name: {size: make(model, size) for size in SIZES} for name, make in NETWORKS.items()}
    return {f"{name}-{size}": {"model": node} for name, nodes in found.items() for size, node in nodes.items()}


def subpixel(model: Node, size: str) -> Node:
    """The preset's network, narrower or wider."""
    return {**model, "widths": scaled(model["widths"], size), "upsampling": "subpixel"}


def nearest(model: Node, size: str) -> Node:
    """The network of before."""
    *blocks, last = model["blocks"]
    found = {key: value for key, value in model.items() if key != "tail"}
    return {**found, "widths": scaled(model["widths"], size), "blocks": [*blocks, last + 2], "upsampling": "nearest"}


def vqgan(model: Node, size: str) -> Node:
    """A level for each halving, without attention; the preset's quantizer."""
    return {
        "kind": "vqgan",
        "widths": levels_of(model, size),
        "blocks": 1,
        "groups": GROUPS,
        "z_channels": model["quantizer"]["dim"],
        "encoder_attention": None,
        "decoder_attention": None,
        "mid_attention": False,
        "quantizer": model["quantizer"],
    }


def diffusers(model: Node, size: str) -> Node:
    """The same by another library, with its own quantizer."""
    book = model["quantizer"]
    return {
        "kind": "diffusers",
        "widths": levels_of(model, size),
        "groups": GROUPS,
        "codes": book["codes"],
        "dim": book["dim"],
    }


def vit(model: Node, size: str) -> Node:
    """Two transformers."""
    dim = scaled([WIDTH], size)[0]
    return {
        "kind": "vit",
        "factor": model["factor"],
        "dim": dim,
        "depth": DEPTHS[size],
        "heads": dim // HEAD,
        "quantizer": model["quantizer"],
    }


NETWORKS = {"subpixel": subpixel, "nearest": nearest, "vqgan": vqgan, "diffusers": diffusers, "vit": vit}


def scaled(widths: list[int], size: str) -> list[int]:
    """Widths of another size, multiples of 8."""
    return [max(8, 8 * round(SIZES[size] * width / 8)) for width in widths]


def levels_of(model: Node, size: str) -> list[int]:
    """Widths of a VQGAN, which double with each halving."""
    return scaled([NARROWEST * 2**level for level in range(int(math.log2(model["factor"])) + 1)], size)
