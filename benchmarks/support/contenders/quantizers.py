"""Every quantizer at equal bits: what `benchmarks/tokenizers/equal_bits.py` compares unless it is told otherwise."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.support.contenders.nodes import Node

REFERENCE = "ema"
CRITIC = {"weight": 0.4, "adaptive": True, "width": 32, "layers": 2, "lr": 2.0}


def shares(bits: int) -> tuple[int, int]:
    """Into how many ids of how many values the bits of a position are split: 8 into 2 of 16, 9 into 3 of 8; 7, which
    cannot be, into 2 of 11."""
    levels = 3 if bits % 2 and not bits % 3 else 2
    return levels, round(2 ** (bits / levels))


def scalars(bits: int) -> list[int]:
    """Levels of FSQ whose product is 2^bits, none above 8."""
    parts = -(-bits // 3)
    return sorted((2 ** (bits // parts + (k < bits % parts)) for k in range(parts)), reverse=True)


def quantizers(bits: int, dim: int) -> dict[str, Node]:
    """The quantizers, each with `bits` bits at a position, and codes of width `dim` where there are any."""
    book = {"codes": 2**bits, "dim": dim}
    levels, each = shares(bits)
    return {
        "ema": {"kind": "ema", **book},
        "vq": {"kind": "vq", **book},
        "vq_rotation": {"kind": "vq", **book, "gradient": "rotation"},
        "vq_normalized": {"kind": "vq", "codes": 2**bits, "dim": 8, "normalize": True},
        "simvq": {"kind": "simvq", **book},
        "ibq": {"kind": "ibq", **book},
        "gumbel": {"kind": "gumbel", **book},
        "fsq": {"kind": "fsq", "levels": scalars(bits)},
        "lfq": {"kind": "lfq", "bits": bits},
        "bsq": {"kind": "bsq", "bits": bits},
        "rvq": {"kind": "rvq", "depth": levels, "book": {"kind": "ema", "codes": each, "dim": dim}},
    }


def contenders(preset: Node, out: Path) -> dict[str, Node]:
    """What each contender says on top of the tokenizer's preset, by name."""
    model = preset["model"]
    codes, dim = model["quantizer"]["codes"], model["quantizer"]["dim"]
    bits = round(math.log2(codes))
    levels, each = shares(bits)
    shape = {key: value for key, value in model.items() if key not in ("kind", "quantizer")}
    found = {name: {"model": {**model, "quantizer": node}} for name, node in quantizers(bits, dim).items()}
    ema = found[REFERENCE]["model"]
    found["critic"] = {"model": ema, "critic": CRITIC}
    found["vit"] = {"model": {"kind": "vit", "factor": model["factor"], "quantizer": ema["quantizer"]}}
    vae = {"kind": "klvae", **shape, "latent": levels, "bins": each}
    binned = {"kind": "posthoc", "bins": each, "vae": vae}
    found["klvae"] = {"model": vae}
    found["posthoc"] = {"model": binned, "init": str(out / "klvae" / "run" / "tokenizer")}
    return found
