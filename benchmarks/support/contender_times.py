"""Time a training step of each contender, and of the GPT on its tokens."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support.contenders import REFERENCE, Node, is_trained, write_node
from benchmarks.support.random_data import write_tokens_of
from benchmarks.support.tables import write_json
from benchmarks.support.timing import TIMED_STEPS, step_seconds
from pipelines.config.command import parse
from pipelines.train_tokenizer import TrainTokenizerConfig, build_tokenizer

TIMED_IMAGES = 512


def time_steps(nodes: dict[str, Node], only: list[str], gpt: Node | None, path: Path) -> Node:
    """Time a training step of each contender (`tokenizer`) and of the GPT on each grid (`gpt`), cached in `path`. The
    first call times all contenders; later calls time new contenders in `only`, together with the reference."""
    cached = json.loads(path.read_text()) if path.is_file() else {"tokenizer": {}, "gpt": {}, "grids": {}}
    new = [name for name in nodes if name not in cached["grids"] and (name in only or not cached["grids"])]
    if not new:
        return cached
    names = [REFERENCE, *(name for name in new if name != REFERENCE)]
    print(f"timing {TIMED_STEPS} steps of {', '.join(names)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {name: build_untrained(nodes[name], folder) for name in names}
        grids = {name_grid(model.grid): model for model in models.values()}
        trained = [name for name in names if is_trained(nodes[name])]
        arguments = {name: ["--config", write_node(nodes[name], folder / f"{name}.yaml")] for name in trained}
        seconds = step_seconds(arguments, of_prior=False)
        gpt_seconds = time_gpts(grids, gpt, folder) if gpt else {}
    found = {
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "machine": platform.processor() or platform.machine(),
        "tokenizer": rescale(cached["tokenizer"], seconds, REFERENCE),
        "gpt": rescale(cached["gpt"], gpt_seconds, name_grid(models[REFERENCE].grid)),
        "grids": {**{name: name_grid(model.grid) for name, model in models.items()}, **cached["grids"]},
    }
    write_json(found, path)
    return found


def time_gpts(tokenizers: dict[str, Any], preset: Node, folder: Path) -> dict[str, float]:
    """Return the median CPU seconds of a training step of the GPT on random tokens of each grid."""
    arguments = {}
    for name, tokenizer in tokenizers.items():
        tokens = write_tokens_of(tokenizer, folder / "tokens" / name, TIMED_IMAGES)
        node = {**preset, "tokens": str(tokens), "out": str(folder), "track": {"wandb": "disabled"}}
        arguments[name] = ["--config", write_node(node, folder / f"{name}.yaml")]
    return step_seconds(arguments, of_prior=True)


def build_untrained(node: Node, folder: Path) -> Any:
    """Build an untrained tokenizer, which has the same grid as a trained one."""
    argv = ["--config", write_node({**node, "init": None}, folder / "grid.yaml")]
    config = parse(TrainTokenizerConfig, argv, verb="train_tokenizer", description="")
    channels, *size = config.data.spec.shape
    return build_tokenizer(config.model, tuple(size), channels)


def name_grid(grid: Any) -> str:
    """Name a grid, such as `8x8x512`. The GPT takes equally long on equal grids."""
    return "x".join(map(str, (*grid.shape, grid.vocab_size)))


def rescale(before: dict[str, float], now: dict[str, float], reference: str) -> dict[str, float]:
    """Merge the times of two passes, scaled so that the reference takes equally long in both."""
    factor = before[reference] / now[reference] if before and now else 1.0
    return {**{name: seconds * factor for name, seconds in now.items()}, **before}
