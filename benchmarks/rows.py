"""What it is worth to a prior to be told which row it paints, on grids whose rows are levels or channels.

    pip install -e ".[dev]"
    python benchmarks/rows.py                                          # two levels, whose entropy is known; six minutes
    python benchmarks/rows.py data=openmoji side=16 levels=8           # RGB pixels; `source=FOLDER` for other images
    python benchmarks/rows.py steps=5 seeds=1 only=pixelcnn            # does it run?

Two levels: a grid of 16x8 ids of 8. In the upper eight rows, level 1, an id is its left neighbour plus one; in the lower
eight, level 2, its left neighbour minus one; one id in four, and the first of a row, is any. What lies around a position
tells which rule holds, most of the time, and not in the first row of level 2; the row always does. Every grid is a new
one. The table: bits per token above the entropy (-log2 of what the model says, minus that of the truth, same tokens), on
average and in the first row of level 2.

RGB pixels: the pictures of a folder as `pixels` of so many `levels`, interleaved rows; bits per dim of the `levels` on
the pictures held out. `without` is `row_embedding=false`. All have equal steps, batches and seeds.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HEIGHT, WIDTH, VOCAB, STRAY = 8, 8, 8, 0.25
NETWORKS: dict[str, dict[str, Any]] = {
    "pixelcnn": {"dim": 16, "depth": 3, "first_kernel": 5, "head": 64},
    "gated_pixelcnn": {"dim": 16, "depth": 2, "first_kernel": 5, "head": 64},
    "pixelsnail": {"dim": 16, "depth": 1, "head": 64},
    "causal_conv": {"dim": 32, "depth": 4, "max_dilation": 8, "skip": 32},
}
TOLD = ("pixelcnn", "gated_pixelcnn")  # those with a choice


def contenders(only: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind and configuration of each line of a table."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind, sizes in NETWORKS.items():
        if not only or kind in only:
            if kind in TOLD:
                found[f"{kind}, without"] = kind, {**sizes, "row_embedding": False}
            found[kind] = kind, sizes
    return found


def two_levels(count: int, generator: Any) -> tuple[Any, Any]:
    """Grids `(count, 2 * HEIGHT, WIDTH)` and -log2 p of each token."""
    import torch

    tokens = torch.randint(VOCAB, (count, 2 * HEIGHT, WIDTH), generator=generator)
    stray = torch.rand(tokens.shape, generator=generator) < STRAY
    change = torch.tensor([1, -1]).repeat_interleave(HEIGHT)
    p = torch.full(tokens.shape, 1 / VOCAB)
    for column in range(1, WIDTH):
        expected = (tokens[:, :, column - 1] + change) % VOCAB
        tokens[:, :, column] = torch.where(stray[:, :, column], tokens[:, :, column], expected)
        p[:, :, column] = STRAY / VOCAB + (1 - STRAY) * (tokens[:, :, column] == expected)
    return tokens, -p.log2()


def fitted(kind: str, config: dict[str, Any], grid: Any, batch: Callable[[Any], Any], steps: int, lr: float,
           seed: int) -> Any:  # fmt: skip
    """A prior after so many steps of AdamW, with warm-up and a cosine."""
    import torch

    from prior import Prior

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Prior.create(kind, grid=grid, **config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        share = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * share
        tokens = batch(generator)
        loss = model.loss(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def bits(model: Any, tokens: Any) -> Any:
    """-log2 p of each token."""
    import torch

    with torch.inference_mode():
        return torch.cat([-model.token_log_probs(part) for part in tokens.split(64)]) / math.log(2)


def spread(values: list[float]) -> str:
    """Mean and half the range."""
    return f"{sum(values) / len(values):.4f} +- {(max(values) - min(values)) / 2:.4f}"


def toy(only: list[str], seeds: int, steps: int, lr: float) -> None:
    """The table of two levels."""
    import torch

    from tokenizer import TokenGrid

    grid = TokenGrid((2 * HEIGHT, WIDTH), VOCAB)
    held, truth = two_levels(2000, torch.Generator().manual_seed(1 << 20))
    print(f"two levels; entropy {float(truth.mean()):.4f} bits per token; {steps} steps of 64, {seeds} seeds")
    print("| prior | parameters | above the entropy | in the first row of level 2 | seconds |\n|---|---|---|---|---|")
    for name, (kind, config) in contenders(only).items():
        above, first, start = [], [], time.process_time()
        for seed in range(seeds):
            model = fitted(kind, config, grid, lambda g: two_levels(64, g)[0], steps, lr, seed)
            excess = (bits(model, held) - truth).mean((0, 2))
            above.append(float(excess.mean()))
            first.append(float(excess[HEIGHT]))
        count = sum(parameter.numel() for parameter in model.parameters())
        took = (time.process_time() - start) / seeds
        print(f"| {name} | {count:,} | {spread(above)} | {spread(first)} | {took:.0f} |", flush=True)


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    import torch

    torch.set_num_threads(1)
    only = [name for name in options.get("only", "").split(",") if name]
    seeds, steps = int(options.get("seeds", 3)), int(options.get("steps", 400))
    toy(only, seeds, steps, float(options.get("lr", 5e-3)))


if __name__ == "__main__":
    main()
