"""The tokenizers that `benchmarks/tokenizers/equal_bits.py` compares, and the configurations of their runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.support.options import ROOT, image_folder
from benchmarks.support.runs import NEVER
from pipelines.config.arguments import read_file, read_override
from pipelines.config.yaml_text import write_yaml
from tokenizer.config import merge

Node = dict[str, Any]
"""A part of a configuration."""

REFERENCE = "ema"
CRITIC = {"weight": 0.4, "adaptive": True, "width": 32, "layers": 2, "lr": 2.0}


def split_bits(bits: int) -> tuple[int, int]:
    """Split the bits of a position over several ids; return the number of ids and of values per id. 8 bits become 2 ids
    of 16 values, 9 bits 3 of 8; not every number divides evenly: 7 bits become 2 of 11."""
    levels = 3 if bits % 2 and not bits % 3 else 2
    return levels, round(2 ** (bits / levels))


def fsq_levels(bits: int) -> list[int]:
    """Choose levels of FSQ, each at most 8, with the product 2^bits."""
    channels = -(-bits // 3)
    return sorted((2 ** (bits // channels + (k < bits % channels)) for k in range(channels)), reverse=True)


def quantizers(bits: int, dim: int) -> dict[str, Node]:
    """Quantizers with `bits` bits per position, and codes of width `dim` if they have any."""
    book = {"codes": 2**bits, "dim": dim}
    levels, each = split_bits(bits)
    return {
        "ema": {"kind": "ema", **book},
        "vq": {"kind": "vq", **book},
        "vq_rotation": {"kind": "vq", **book, "gradient": "rotation"},
        "vq_normalized": {"kind": "vq", "codes": 2**bits, "dim": 8, "normalize": True},
        "simvq": {"kind": "simvq", **book},
        "ibq": {"kind": "ibq", **book},
        "gumbel": {"kind": "gumbel", **book},
        "fsq": {"kind": "fsq", "levels": fsq_levels(bits)},
        "lfq": {"kind": "lfq", "bits": bits},
        "bsq": {"kind": "bsq", "bits": bits},
        "rvq": {"kind": "rvq", "depth": levels, "book": {"kind": "ema", "codes": each, "dim": dim}},
    }


def contenders(preset: Node, out: Path) -> dict[str, Node]:
    """Return each contender's changes to the tokenizer preset, by name."""
    model = preset["model"]
    codes, dim = model["quantizer"]["codes"], model["quantizer"]["dim"]
    bits = round(math.log2(codes))
    levels, each = split_bits(bits)
    shape = {key: value for key, value in model.items() if key not in ("kind", "quantizer")}
    found = {name: {"model": {**model, "quantizer": node}} for name, node in quantizers(bits, dim).items()}
    ema = found[REFERENCE]["model"]
    found["critic"] = {"model": ema, "critic": CRITIC}
    found["vit"] = {"model": {"kind": "vit", "factor": model["factor"], "quantizer": ema["quantizer"]}}
    vae = {"kind": "klvae", **shape, "latent": levels, "bins": each}
    found["klvae"] = {"model": vae}
    binned = {"kind": "posthoc", "bins": each, "vae": vae}
    found["posthoc"] = {"model": binned, "init": str(out / "klvae" / "run" / "tokenizer")}
    return found


def is_trained(spec: Node) -> bool:
    """Whether a contender takes training steps. `posthoc` converts a trained VAE instead."""
    return "init" not in spec


def read_presets(data: str, changes: list[str]) -> dict[str, Node]:
    """Read the tokenizer and GPT presets of a data set, with `key.path=value` changes; exit if a preset is missing."""
    paths = {"tokenizer": f"tokenizer/vqvae_{data}.yaml", "gpt": f"prior/gpt_{data}.yaml"}
    if missing := [path for path in paths.values() if not (ROOT / "configs" / path).is_file()]:
        raise SystemExit(f"data={data}: no preset configs/{missing[0]}")
    presets = {kind: read_file(str(ROOT / "configs" / path)) for kind, path in paths.items()}
    for change in changes:
        presets = merge(presets, read_override(change if change.startswith("gpt.") else f"tokenizer.{change}"))
    return presets


def with_seed(presets: dict[str, Node], seed: int) -> dict[str, Node]:
    return {kind: {**preset, "train": {**preset["train"], "seed": seed}} for kind, preset in presets.items()}


def find_images(data: str, given: str | None) -> str | None:
    """Return the folder of the images, or None for the source in the preset."""
    folder = image_folder(data)
    return given or (str(folder) if folder.is_dir() else None)


def tokenizer_node(preset: Node, spec: Node, source: str | None, limit: int | None, steps: int, run: Path) -> Node:
    data = {**preset["data"], **({"source": source} if source else {}), "limit": limit}
    common = {"data": data, "out": str(run), "track": {"wandb": "disabled"}, "train": train_node(preset, steps)}
    return {**preset, **common, **fit_schedules(spec, steps)}


def fit_schedules(spec: Node, steps: int) -> Node:
    """Scale a contender's schedules to the number of steps: a critic trains alone for the first fifth and its weight
    rises during the second; Gumbel noise is annealed over three quarters."""
    model = spec["model"]
    if model.get("quantizer", {}).get("kind") == "gumbel":
        model = {**model, "quantizer": {**model["quantizer"], "anneal_steps": 3 * steps // 4}}
    if "critic" in spec:
        spec = {**spec, "critic": {**spec["critic"], "warmup": steps // 5, "ramp": steps // 5}}
    return {**spec, "model": model}


def train_node(preset: Node, steps: int) -> Node:
    """Return a preset's `train` with another length. Checkpoints let an interrupted benchmark continue."""
    periods = {"evaluate_every": NEVER, "preview_every": NEVER, "save_every": 500}
    return {**preset["train"], "steps": steps, "minutes": None, **periods}


def write_node(node: Node, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_yaml(node))
    return str(path)
