"""How long a training step of each contender takes, and one of the GPT on the ids of each."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support.contenders.nodes import Node, trainable, write_node
from benchmarks.support.tables import write_whole
from benchmarks.support.timing import TIMED_STEPS, cpu_seconds_of, stepper

TIMED_IMAGES = 512


def timed(nodes: dict[str, Node], only: list[str], gpt: Node | None, path: Path, reference: str) -> Node:
    """Seconds per step of `tokenizer` by contender and of `gpt`, if there is one, by grid, kept in `path`. The first
    pass times all, a later one those of `only` that are new, and the `reference`."""
    kept = json.loads(path.read_text()) if path.is_file() else {"tokenizer": {}, "gpt": {}, "grids": {}}
    new = [name for name in nodes if name not in kept["grids"] and (name in only or not kept["grids"])]
    if not new:
        return kept
    wanted = [reference, *(name for name in new if name != reference)]
    print(f"timing {TIMED_STEPS} steps of {', '.join(wanted)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {name: untrained(nodes[name], folder) for name in wanted}
        grids = {grid_name(model.grid): model for model in models.values()}
        chosen = {name: nodes[name] for name in wanted if trainable(nodes[name])}
        seconds, gpt_seconds = tokenizer_times(chosen, folder), gpt_times(grids, gpt, folder) if gpt else {}
    grid = grid_name(models[reference].grid)
    found = {
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "machine": platform.processor() or platform.machine(),
        "tokenizer": scaled(kept["tokenizer"], seconds, reference),
        "gpt": scaled(kept["gpt"], gpt_seconds, grid),
        "grids": {**{name: grid_name(model.grid) for name, model in models.items()}, **kept["grids"]},
    }
    write_whole(found, path)
    return found


def tokenizer_times(nodes: dict[str, Node], folder: Path) -> dict[str, float]:
    """Median seconds of a training step of each."""
    import torch

    from pipelines.config.command import parse
    from pipelines.train_tokenizer import TokenizerTask, TrainTokenizerConfig

    with contextlib.ExitStack() as stack:
        steps = []
        for name, node in nodes.items():
            argv = ["--config", write_node(node, folder / f"{name}.yaml")]
            config = parse(TrainTokenizerConfig, argv, verb="train_tokenizer", description="")
            torch.manual_seed(config.train.seed)
            steps.append(stack.enter_context(stepper(TokenizerTask(config), config)))
        return dict(zip(nodes, cpu_seconds_of(steps), strict=True))


def gpt_times(tokenizers: dict[str, Any], preset: Node, folder: Path) -> dict[str, float]:
    """Median seconds of a training step of the GPT on random ids of each tokenizer's grid."""
    import torch

    from pipelines.config.command import parse
    from pipelines.tokens import TokenDataset, TokenSplit
    from pipelines.train_prior import PriorTask, TrainPriorConfig

    with contextlib.ExitStack() as stack:
        steps = []
        for name, tokenizer in tokenizers.items():
            grid, tokens = tokenizer.grid, folder / "tokens" / name
            split = TokenSplit(torch.randint(grid.vocab_size, (TIMED_IMAGES, *grid.shape)), torch.zeros(TIMED_IMAGES))
            both = {"train": split, "test": split}
            TokenDataset(grid, [str(k) for k in range(10)], both, tokenizer, {}).save(tokens)
            node = {**preset, "tokens": str(tokens), "out": str(folder), "track": {"wandb": "disabled"}}
            argv = ["--config", write_node(node, folder / f"{name}.yaml")]
            config = parse(TrainPriorConfig, argv, verb="train_prior", description="")
            steps.append(stack.enter_context(stepper(PriorTask(config), config)))
        return dict(zip(tokenizers, cpu_seconds_of(steps), strict=True))


def untrained(node: Node, folder: Path) -> Any:
    """An untrained tokenizer of a configuration: its grid is what counts."""
    from pipelines.config.command import parse
    from pipelines.train_tokenizer import TrainTokenizerConfig, build_tokenizer

    argv = ["--config", write_node({**node, "init": None}, folder / "grid.yaml")]
    config = parse(TrainTokenizerConfig, argv, verb="train_tokenizer", description="")
    channels, *size = config.data.image_shape
    return build_tokenizer(config.model, tuple(size), channels)


def grid_name(grid: Any) -> str:
    """`8x8x512`: the GPT takes equally long on equal grids."""
    return "x".join(map(str, (*grid.shape, grid.vocab_size)))


def scaled(before: dict[str, float], now: dict[str, float], reference: str) -> dict[str, float]:
    """Times of two passes, the later one in units of the earlier: by the reference, which was timed in both."""
    factor = before[reference] / now[reference] if before and now else 1.0
    return {**{name: seconds * factor for name, seconds in now.items()}, **before}
