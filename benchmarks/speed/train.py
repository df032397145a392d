"""Time training steps of both stages against reference models of the same shapes.

    pip install -e ".[dev,benchmarks]"
    python -m benchmarks.speed.train threads=2
    python -m benchmarks.speed.train threads=2 repeats=3 only="gpt 16x16, vqgan 64x64"    # some rows
    python -m benchmarks.speed.train threads=1 repeats=2 peak=256 only="gpt tiny, vqgan tiny"    # quick

Stage two: transformers' `GPT2LMHeadModel` of the same width, depth, heads, vocabulary and length, without dropout (its
MLP has one hidden layer of 4 times the width, ours two of 8/3). Stage one: diffusers' `VQModel`; for `vqgan` the same
network, for `vqvae` one with about as many parameters and the same grid. Random weights, float32.

step: forward, loss, backward and fused AdamW of the bare model. in the loop: the step of `pipelines.training.trainer`,
with data loading, augmentation, clipping, checks, averaged weights and code counts. faster: the reference's time over
ours. Times are medians of `repeats` rounds, each of which times all candidates in turn.

of peak: FLOP/s as a share of the best float32 matrix product of side `peak`, measured before and in every round: by
`torch.mm` for stage two, as a 1x1 convolution for stage one (on x86 these are different libraries; the last line prints
both). FLOPs are counted by torch, and attention by formula: two products forward, four backward, half if causal. data
wait: share of the time for which the loop waits for batches. saved: memory saved for the backward pass. memory: rise of
resident memory during a step, above weights and moments.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.card_training import preset_arguments
from benchmarks.support.options import choose, read_options, require_packages, use_threads
from benchmarks.support.random_data import write_random_tokens
from benchmarks.support.references import gpt2, vq_model
from benchmarks.support.step_costs import Products, count_flops, count_saved_bytes, measure_memory_rise
from benchmarks.support.tables import table_head, table_row
from benchmarks.support.timing import build_task, seconds_of, stepper
from tokenizer.losses import total_loss

ROWS = 512  # of token datasets and images
Changes = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A preset, changes to it, and the sizes of the reference."""

    preset: str
    changes: Changes
    grid: tuple[int, int] = (0, 0)  # stage two: side and vocabulary
    reference: Any = None  # stage one: widths, blocks, groups


def gpt(side: int, vocab_size: int, dim: int, depth: int, batch: int) -> Case:
    """A GPT with heads of width 64."""
    changes = {"model.dim": dim, "model.depth": depth, "model.heads": max(1, dim // 64), "train.batch_size": batch}
    return Case("prior/gpt_digits", changes, (side, vocab_size))


def vqgan(size: int, widths: tuple[int, ...], groups: int, codes: int, batch: int) -> Case:
    """A VQGAN with one block per level and attention at the token resolution only."""
    quantizer = {"kind": "vq", "codes": codes, "dim": widths[-1] // 2}
    model = {
        "kind": "vqgan",
        "widths": list(widths),
        "blocks": 1,
        "groups": groups,
        "z_channels": widths[-1] // 2,
        "encoder_attention": None,
        "decoder_attention": None,
        "quantizer": quantizer,
    }
    changes = {"model": model, "data.image_size": size, "data.channels": 3, "train.batch_size": batch}
    return Case("tokenizer/vqvae_digits", changes, reference=(widths, 1, groups))


CASES = {
    "gpt digits": Case("prior/gpt_digits", {}, (7, 128)),
    "gpt 16x16": gpt(16, 1024, dim=256, depth=6, batch=8),
    "gpt 16x16 wide": gpt(16, 1024, dim=512, depth=4, batch=8),
    "vqvae digits": Case("tokenizer/vqvae_digits", {}, reference=((32, 56, 72), 1, 8)),
    "vqgan 64x64": vqgan(64, (32, 64, 64, 128), groups=16, codes=512, batch=8),
    "vqgan 32x32 wide": vqgan(32, (64, 128, 256), groups=32, codes=1024, batch=8),
}
TINY = {"gpt tiny": gpt(3, 16, dim=64, depth=1, batch=4), "vqgan tiny": vqgan(8, (8, 16), groups=4, codes=16, batch=4)}


# Tasks and models -----------------------------------------------------------------------------------


def make_task(case: Case, folder: Path) -> tuple[Any, Any]:
    """Create the training task, with random tokens for stage two, and its configuration."""
    more = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in case.changes.items()]
    if case.grid[0]:
        more.append(f"tokens={write_random_tokens(folder / 'tokens', *case.grid, ROWS)}")
    else:
        more.append(f"data.limit={ROWS}")
    return build_task(preset_arguments(case.preset, folder, "train.minutes=null", *more), bool(case.grid[0]))


def make_loss(task: Any, batch: Any) -> Callable[[], Any]:
    """Return a function that computes our model's loss on a batch."""
    if hasattr(task, "tokenizer"):
        return lambda: total_loss(task.tokenizer(batch[0]), batch[0], task.weights)[0]
    tokens, given = batch
    return lambda: task.model.loss_from_outputs(task.model(tokens, task.model.encode_given(given)), tokens)


def make_step(model: Any, loss: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that takes a training step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# The table ----------------------------------------------------------------------------------------


def measure(name: str, case: Case, repeats: int, products: Products, folder: Path) -> list[str]:
    """Return the table rows of a case, for our model and for the reference."""
    task, config = make_task(case, folder)
    bare, batch = copy.deepcopy(task), task.prepare(task.batch(*task.samples(config.train.batch_size, 0, 0), 0))
    models = {name: (bare.model, make_loss(bare, batch))}
    if case.grid[0]:
        other, loss = gpt2(task.model.config, batch[0])
    else:
        other, loss = vq_model(case.reference, task.tokenizer.config, batch[0])
    models[type(other).__name__] = (other, loss)
    steps = [make_step(*pair) for pair in models.values()]
    waits: list[float] = []
    with stepper(task, config, waits) as looped:
        *seconds, in_loop, _ = seconds_of([*steps, looped, products], repeats)
        waits.clear()
        began = time.perf_counter()
        for _ in range(repeats):
            looped()
        waiting = sum(waits) / (time.perf_counter() - began)
    peak = products.best["mm" if case.grid[0] else "conv"]
    lines, ours = [], [f"{seconds[1] / seconds[0]:.2f}", f"{1e3 * in_loop:.1f}", f"{waiting:.2%}"]
    for (label, (model, loss)), step, taken in zip(models.items(), steps, seconds, strict=True):
        rise, flops = measure_memory_rise(step), count_flops(loss)
        cells = [
            label,
            f"{sum(p.numel() for p in model.parameters()):,}",
            f"{flops / 1e9:.2f}",
            f"{1e3 * taken:.1f}",
            f"{flops / taken / peak:.0%}",
            f"{count_saved_bytes(model, loss) / 2**20:.1f}",
            "" if rise is None else f"{rise / 2**20:.0f}",
            *ours,
        ]
        lines.append(table_row(cells))
        ours = [""] * len(ours)
    return lines


def main() -> None:
    options = read_options(__doc__, {"threads": 2, "repeats": 15, "peak": 2048, "only": ",".join(CASES)})
    known = {**CASES, **TINY}
    only = choose(options.only, list(known))
    require_packages("transformers", "diffusers")
    threads = use_threads(options.threads)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    products = Products(options.peak)
    for _ in range(5):
        products()
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, {threads} thread(s), torch {torch.__version__}, transformers "
        f"{version('transformers')}, diffusers {version('diffusers')}\n"
    )
    ours = ("faster", "in the loop, ms", "data wait")
    print(table_head("model", "parameters", "GFLOP", "step, ms", "of peak", "saved, MiB", "memory, MiB", *ours))
    for name in only:
        with tempfile.TemporaryDirectory() as folder:
            for line in measure(name, known[name], options.repeats, products, Path(folder)):
                print(line, flush=True)
        gc.collect()
    print(
        f"\nfloat32 matrix product of side {options.peak}, GFLOP/s: {products.best['mm'] / 1e9:.0f} by torch.mm, "
        f"{products.best['conv'] / 1e9:.0f} as a convolution"
    )


if __name__ == "__main__":
    main()
