"""What it is worth to a prior to be told which row it paints, on grids whose rows are levels or channels.

    pip install -e ".[dev]"
    python -m benchmarks.priors.rows                                             # two levels, whose entropy is known
    python -m benchmarks.priors.rows data=openmoji only=pixelcnn,gated_pixelcnn  # pictures of 16x16, three channels
    python -m benchmarks.priors.rows data=openmoji only=pixelcnn model.first_kernel=13     # with other networks
    python -m benchmarks.priors.rows steps=5 seeds=1 only=pixelcnn               # does it run?

Two levels: a grid of 16x8 ids of 8. In the upper eight rows, level 1, an id is its left neighbour plus one; in the
lower eight, level 2, its left neighbour minus one; one id in four, and the first of a row, is any. What lies around a
position tells which rule holds, most of the time, and not in the first row of level 2; the row always does. Every grid
is a new one. The table: bits per token above the entropy (-log2 of what the model says, minus that of the truth, for
the same tokens), on average and in the first row of level 2.

Pictures: those of `source=FOLDER`, or of the folder `data` in SMALTI_DATA or ../shared/data, `side=16` pixels wide, as
`pixels` of `levels=8` in interleaved rows. The table: bits per channel of a pixel, on a tenth of the training pictures
that is kept aside (to choose by) and on the held-out ones.

`without` is `row_embedding=false`. All have equal steps, batches and seeds, on one thread; mean and half the range.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.support.fitting import spread
from benchmarks.support.options import choose, image_folder, read_options, read_value
from benchmarks.support.tables import table_head, table_row

HEIGHT, WIDTH, VOCAB, STRAY = 8, 8, 8, 0.25
NETWORKS: dict[str, dict[str, Any]] = {
    "pixelcnn": {"dim": 16, "depth": 3, "first_kernel": 5, "hidden": 64},
    "gated_pixelcnn": {"dim": 16, "depth": 2, "first_kernel": 5, "hidden": 64},
    "pixelsnail": {"dim": 16, "depth": 1, "hidden": 64},
    "causal_conv": {"dim": 32, "depth": 4, "max_dilation": 8, "skip": 32},
}
HAVE_A_CHOICE = ("pixelcnn", "gated_pixelcnn")


class Task(NamedTuple):
    """Grids to learn and figures to tell."""

    grid: Any
    batch: Callable[[Any], Any]  # tokens of a step, given a generator
    figures: dict[str, Callable[[Any], float]]  # of a model, by the heading of their column


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


def task_of_levels() -> Task:
    """Two levels, 64 grids a step."""
    import torch

    from tokenizer import TokenGrid

    held_out, truth = two_levels(2000, torch.Generator().manual_seed(1 << 20))

    def above(model: Any, rows: slice) -> float:
        return float((bits(model, held_out) - truth)[:, rows].mean())

    figures = {
        "bits above the entropy": lambda model: above(model, slice(None)),
        "in the first row of level 2": lambda model: above(model, slice(HEIGHT, HEIGHT + 1)),
    }
    grid = TokenGrid((2 * HEIGHT, WIDTH), VOCAB)
    return Task(grid, lambda generator: two_levels(64, generator)[0], figures)


def task_of_pictures(folder: Path, side: int, levels: int) -> Task:
    """Pictures as pixels, 16 a step."""
    import torch

    from pipelines.images import DataConfig, load_images
    from pipelines.images.dataset import carve
    from tokenizer import Tokenizer

    images = load_images(DataConfig(source=str(folder), image_size=side, channels=3))
    pixels = Tokenizer.create("pixels", image_size=(side, side), channels=3, levels=levels)
    train, held_out = (pixels.encode(part.batch(range(len(part)))) for part in (images.train, images.held_out))
    learned, aside = (train[torch.from_numpy(rows)] for rows in carve(len(train), 0.1))

    def batch(generator: Any) -> Any:
        return learned[torch.randint(len(learned), (16,), generator=generator)]

    def mean_bits(tokens: Any) -> Callable[[Any], float]:
        return lambda model: float(bits(model, tokens).mean())

    return Task(pixels.grid, batch, {"kept aside": mean_bits(aside), "held out": mean_bits(held_out)})


def bits(model: Any, tokens: Any) -> Any:
    """-log2 p of each token."""
    import torch

    with torch.inference_mode():
        return torch.cat([-model.token_log_probs(part) for part in tokens.split(64)]) / math.log(2)


def fitted(kind: str, config: dict[str, Any], task: Task, steps: int, lr: float, seed: int) -> Any:
    """A prior after so many steps of AdamW, with a warm-up and a cosine."""
    import torch

    from prior import Prior

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Prior.create(kind, grid=task.grid, **config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        warmed = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = lr * warmed * 0.5 * (1 + math.cos(math.pi * step / steps))
        tokens = task.batch(generator)
        loss = model.loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def model_changes(changes: list[str]) -> dict[str, int]:
    """What `model.key=number` arguments say; exits at others."""
    found = {}
    for change in changes:
        key, _, text = change.partition("=")
        if not key.startswith("model."):
            raise SystemExit(f"{key}: unknown; a key with a dot begins with model.")
        found[key.removeprefix("model.")] = read_value(key, text, 0)
    return found


def contenders(kinds: list[str], changes: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind and configuration of each row of the table."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind in kinds:
        config = {**NETWORKS[kind], **changes}
        if kind in HAVE_A_CHOICE:
            found[f"{kind}, without"] = kind, {**config, "row_embedding": False}
        found[kind] = kind, config
    return found


def main() -> None:
    given = {
        "data": None,
        "source": None,
        "side": 16,
        "levels": 8,
        "only": None,
        "steps": 400,
        "seeds": 3,
        "lr": 5e-3,
    }
    options = read_options(__doc__, given, dotted=True)
    import torch

    torch.set_num_threads(1)
    rows = contenders(choose(options.only, list(NETWORKS)), model_changes(options.changes))
    if options.data:
        folder = Path(options.source or image_folder(options.data))
        task = task_of_pictures(folder, options.side, options.levels)
    else:
        task = task_of_levels()
    steps, seeds, lr = options.steps, options.seeds, options.lr
    print(f"{task.grid.shape} ids of {task.grid.vocab_size}; {steps} steps, {seeds} seeds, lr {lr:g}\n")
    print(table_head("prior", "parameters", *task.figures, "seconds a run"))
    for name, (kind, config) in rows.items():
        start = time.process_time()
        models = [fitted(kind, config, task, steps, lr, seed) for seed in range(seeds)]
        took = (time.process_time() - start) / seeds
        cells = [spread([figure(model) for model in models], 4) for figure in task.figures.values()]
        count = sum(parameter.numel() for parameter in models[0].parameters())
        print(table_row([name, f"{count:,}", *cells, f"{took:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
