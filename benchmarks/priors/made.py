"""MADE as `smalti train_prior` trains it, against a plain loop of the same network, on one core.

    pip install -e ".[dev]"
    python -m benchmarks.priors.made minutes=3             # 784-1000-784 on black and white garments, without classes
    python -m benchmarks.priors.made steps=200 minutes=0   # the step alone
    python -m benchmarks.priors.made source=digits minutes=0.01 steps=2     # does it run?

The images are in `source=`, or in fashion_mnist in the folder SMALTI_DATA or ../shared/data, or come from the Hub.

A step: the whole of one of `train_prior` (its batch is made, gradients clipped, weights averaged, terms logged) against
bare torch, masks as in the paper (`F.linear(x, weight * mask)`, masks made before) and the same optimizer; both at
`batch`, in turn, medians of `steps`.

The race: `minutes` of this process's own time (so it does not matter what else the machine does) for each, one after
the other. Ours is `configs/prior/made_fashion_binary.yaml` without its labels. The plain loop is pytorch-generative's
recipe: batches of 64, Adam at 1e-3, a random order, uniform degrees, weights masked where they are before every pass;
its masks are kept, not drawn again, and its images lie in memory. Images seen; nats per test image.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.support.options import ROOT, image_folder, read_options, use_threads
from benchmarks.support.runs import NEVER
from benchmarks.support.tables import table_head
from benchmarks.support.timing import cpu_seconds_of, stepper

SIZE, HIDDEN, BATCH = 784, 1000, 64


def tokens_without_classes(source: str, folder: Path) -> None:
    """Write the token dataset of the binary garments, without labels."""
    from pipelines import encode, train_tokenizer
    from pipelines.tokens import TokenSplit, load_tokens

    preset = str(ROOT / "configs" / "tokenizer" / "pixels_fashion_binary.yaml")
    made = folder.parent
    train_tokenizer.main(
        ["--config", preset, f"out={made / 'tokenizer'}", f"data.source={source}", "track.wandb=disabled"]
    )
    encode.main([f"tokenizer={made / 'tokenizer' / 'tokenizer'}", f"out={made / 'labelled'}"])
    data = load_tokens(made / "labelled")
    splits = {name: TokenSplit(split.tokens, None) for name, split in data.splits.items()}
    replace(data, class_names=[], splits=splits).save(folder)


def our_config(tokens: Path, out: Path, **train: Any) -> Any:
    """The preset's run, with no previews and saves in between."""
    import yaml

    from pipelines.train_prior import TrainPriorConfig

    node = yaml.safe_load((ROOT / "configs" / "prior" / "made_fashion_binary.yaml").read_text())
    never = {f"{what}_every": NEVER for what in ("preview", "save")}
    node |= {"tokens": str(tokens), "out": str(out), "track": {"wandb": "disabled"}}
    node["train"] |= {**never, **train}
    return TrainPriorConfig.model_validate(node)


def paper_masks() -> tuple[Any, Any]:
    """Of one hidden layer with uniform degrees, in a random order: `(HIDDEN, SIZE)` and `(SIZE, HIDDEN)`."""
    import torch

    degrees, ranks = torch.randint(1, SIZE, (HIDDEN,)), torch.randperm(SIZE)
    return (ranks < degrees[:, None]).float(), (degrees <= ranks[:, None]).float()


def bare_steps(rows: Any, batch: int) -> Iterator[None]:
    """Steps of masked linear layers, with the loop's own optimizer."""
    import torch
    import torch.nn.functional as F

    first, last = torch.nn.Linear(SIZE, HIDDEN), torch.nn.Linear(HIDDEN, SIZE)
    below, above = paper_masks()
    parameters = [*first.parameters(), *last.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02, fused=True)
    while True:
        x = rows[torch.randint(len(rows), (batch,))].float()
        hidden = F.relu(F.linear(x, first.weight * below, first.bias))
        logits = F.linear(hidden, last.weight * above, last.bias)
        F.binary_cross_entropy_with_logits(logits, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def compare_steps(tokens: Path, rows: Any, batch: int, count: int) -> None:
    """Print the medians of both steps, in turn."""
    from pipelines.train_prior import PriorTask

    config = our_config(tokens, tokens.parent / "steps", batch_size=batch)
    with stepper(PriorTask(config), config) as step:
        ours, bare = cpu_seconds_of([step, partial(next, bare_steps(rows, batch))], count)
    print(table_head("a step at batch", "ours, ms", "bare torch, ms", "ratio"))
    print(f"| {batch} | {1e3 * ours:.1f} | {1e3 * bare:.1f} | {ours / bare:.2f} |\n", flush=True)


def ours(tokens: Path, out: Path, minutes: float) -> tuple[int, float]:
    """Images that a run of the preset saw, and its nats per test image. Minutes are of this process."""
    from pipelines import ImagePipeline, train_prior
    from pipelines.metrics.likelihood import bits_per_token
    from pipelines.tokens import load_tokens
    from pipelines.training import trainer

    clock = trainer.time
    trainer.time = SimpleNamespace(monotonic=time.process_time)
    try:
        config = our_config(tokens, out, steps=None, minutes=minutes)
        train_prior.run(config)
    finally:
        trainer.time = clock
    steps = max(json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines())
    prior = ImagePipeline.from_pretrained(out / "pipeline").prior
    bits = bits_per_token(prior, load_tokens(tokens).splits["test"])
    return steps * config.train.batch_size, bits * SIZE * math.log(2)


def plain(train: Any, test: Any, minutes: float) -> tuple[int, float]:
    """Images that the plain loop saw, and its nats per test image."""
    import torch
    import torch.nn.functional as F

    first, last = torch.nn.Linear(SIZE, HIDDEN), torch.nn.Linear(HIDDEN, SIZE)
    masks = list(zip((first, last), paper_masks(), strict=True))

    def nats(x: Any) -> Any:
        with torch.no_grad():
            for layer, mask in masks:
                layer.weight *= mask
        logits = last(F.relu(first(x)))
        return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1).mean()

    optimizer = torch.optim.Adam([*first.parameters(), *last.parameters()], lr=1e-3)
    began, images = time.process_time(), 0
    while time.process_time() - began < 60 * minutes:
        for rows in torch.randperm(len(train)).split(BATCH):
            if time.process_time() - began >= 60 * minutes:
                break
            optimizer.zero_grad()
            nats(train[rows].float()).backward()
            optimizer.step()
            images += len(rows)
    with torch.no_grad():
        return images, float(nats(test.float()))


def main() -> None:
    options = read_options(__doc__, {"minutes": 3.0, "steps": 60, "batch": 128, "seed": 0, "source": None})
    use_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch

    from pipelines.tokens import load_tokens

    torch.manual_seed(options.seed)
    folder = image_folder("fashion_mnist")
    source = options.source or (str(folder) if folder.is_dir() else "zalando-datasets/fashion_mnist")
    minutes = options.minutes
    with tempfile.TemporaryDirectory() as place:
        tokens = Path(place) / "tokens"
        tokens_without_classes(source, tokens)
        train, test = (load_tokens(tokens).splits[name].tokens.flatten(1) for name in ("train", "test"))
        print(f"torch {torch.__version__}, 1 thread, {SIZE}-{HIDDEN}-{SIZE}\n", flush=True)
        if options.steps:
            compare_steps(tokens, train, options.batch, options.steps)
        if minutes:
            print(table_head(f"{minutes:g} minutes of one core", "images", "nats per test image"))
            for name, (images, nats) in (
                ("ours", ours(tokens, Path(place) / "run", minutes)),
                ("plain loop", plain(train, test, minutes)),
            ):
                print(f"| {name} | {images:,} | {nats:.2f} |", flush=True)


if __name__ == "__main__":
    main()
