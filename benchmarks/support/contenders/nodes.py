"""Whether a contender of `benchmarks/tokenizers/equal_bits.py` can be trained, and the configurations of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.support.options import ROOT, image_folder
from benchmarks.support.runs import NEVER

Node = dict[str, Any]


def missing(spec: Node) -> str | None:
    """What a contender needs and is not there, if anything."""
    from pipelines.train_tokenizer import TrainTokenizerConfig
    from tokenizer import Tokenizer
    from tokenizer.quantizers import Quantizer

    model = spec["model"]
    if model["kind"] not in Tokenizer.available():
        return f"there is no tokenizer {model['kind']!r}"
    if model.get("quantizer", {"kind": "ema"})["kind"] not in Quantizer.available():
        return f"there is no quantizer {model['quantizer']['kind']!r}"
    strange = [key for key in spec if key not in TrainTokenizerConfig.model_fields]
    return f"train_tokenizer has no {strange[0]!r}" if strange else None


def trainable(spec: Node) -> bool:
    """Whether it takes training steps; what starts from another tokenizer takes none."""
    return "init" not in spec


def read_presets(name: str, changes: list[str]) -> dict[str, Node]:
    """The two presets of a data set, with `key.path=value` changes; exits where there are none."""
    from pipelines.config.arguments import read_file, read_override
    from tokenizer.config import merge

    paths = {"tokenizer": f"tokenizer/vqvae_{name}.yaml", "gpt": f"prior/gpt_{name}.yaml"}
    if absent := [path for path in paths.values() if not (ROOT / "configs" / path).is_file()]:
        raise SystemExit(f"data={name}: there is no preset configs/{absent[0]}")
    presets = {kind: read_file(str(ROOT / "configs" / path)) for kind, path in paths.items()}
    for change in changes:
        presets = merge(presets, read_override(change if change.startswith("gpt.") else f"tokenizer.{change}"))
    return presets


def with_seed(presets: dict[str, Node], seed: int) -> dict[str, Node]:
    """Both presets with another seed."""
    return {kind: {**preset, "train": {**preset["train"], "seed": seed}} for kind, preset in presets.items()}


def images_of(name: str, given: str | None) -> str | None:
    """The folder of the images, or None for what the preset says."""
    folder = image_folder(name)
    return given or (str(folder) if folder.is_dir() else None)


def tokenizer_node(preset: Node, spec: Node, source: str | None, limit: int | None, steps: int, run: Path) -> Node:
    """The configuration of `train_tokenizer` for so many steps; a contender may train in its own way, by `train`."""
    data = {**preset["data"], **({"source": source} if source else {}), "limit": limit}
    return {
        **preset,
        "data": data,
        "out": str(run),
        "track": {"wandb": "disabled"},
        **paced(spec, steps),
        "train": {**train_node(preset, steps), **spec.get("train", {})},
    }


def paced(spec: Node, steps: int) -> Node:
    """A contender with what it does by steps fitted to so many of them: a critic learns alone for a fifth, and is
    listened to more and more for another; Gumbel noise cools over three quarters."""
    model = spec["model"]
    if model.get("quantizer", {}).get("kind") == "gumbel":
        model = {**model, "quantizer": {**model["quantizer"], "anneal_steps": 3 * steps // 4}}
    if "critic" in spec:
        spec = {**spec, "critic": {**spec["critic"], "warmup": steps // 5, "ramp": steps // 5}}
    return {**spec, "model": model}


def train_node(preset: Node, steps: int) -> Node:
    """A preset's `train` with another end. Resume states are written now and then, for an interrupted benchmark."""
    never = {"evaluate_every": NEVER, "preview_every": NEVER, "save_every": 500}
    return {**preset["train"], "steps": steps, "minutes": None, **never}


def write_node(node: Node, path: Path) -> str:
    """The configuration as a file for --config."""
    from pipelines.config.yaml_text import write_yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_yaml(node))
    return str(path)
