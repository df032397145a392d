"""Time sampling, encoding and decoding on a GPU, next to reference models of the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.support.card import Card
from benchmarks.support.card_training import Sizes, reference_tokenizer
from benchmarks.support.references import gpt2_sampler
from prior import Prior
from tokenizer import Tokenizer

ROWS = (1, 16, 64, 256)
Row = tuple[str, str, Callable[[], list[str]]]
"""The first two cells of a row, and a function that measures the others."""
SAMPLING_HEAD = ("sampling", "images", "tokens/s", "images/s", "ms a token step", "kernel by kernel, ms")
CODING_HEAD = ("network", "images", "encoded/s", "decoded/s", "VQModel encoded/s", "decoded/s")


def sampling_rows(card: Card, config: Any, sizes: Sizes, repeats: int) -> Iterator[Row]:
    """Yield rows for a GPT with random weights in float32 and bf16, and for GPT-2 of the same size. For each, the
    fastest way (one CUDA graph; a static cache and torch.compile), and kernel by kernel."""
    few = max(1, repeats // 2)

    def ours(dtype: torch.dtype, count: int) -> list[str]:
        prior = Prior.create("gpt", **dict(config)).to(card.device, dtype).eval()
        scale_logits(prior)
        labels = torch.zeros(count, dtype=torch.long, device=card.device)
        fast, _ = card.times(lambda: prior.sample(count, labels), repeats)
        eager = {"on_step": lambda step: None}  # a callback disables the CUDA graph
        slow, _ = card.times(lambda: prior.sample(count, labels, **eager), few, warmup=1)
        return format_sampling(len(config.grid), count, fast, slow)

    def theirs(dtype: torch.dtype, count: int) -> list[str]:
        generate = gpt2_sampler(config, card.device, dtype)
        slow, _ = card.times(lambda: generate(count), few, warmup=1)
        fast, _ = card.times(lambda: generate(count, cache_implementation="static"), few)
        return format_sampling(len(config.grid), count, fast, slow)

    for name, measure in (("gpt", ours), ("transformers GPT-2", theirs)):
        for dtype in (torch.float32, torch.bfloat16):
            for count in (rows for rows in ROWS if rows <= 8 * sizes.images):
                yield f"{name}, {str(dtype).removeprefix('torch.')}", f"{count}", partial(measure, dtype, count)


def format_sampling(size: int, count: int, fast: float, slow: float) -> list[str]:
    """Format the cells of `count` images of `size` tokens, in seconds for each of the two ways."""
    times = [f"{1e3 * seconds / size:.2f}" for seconds in (fast, slow)]
    return [f"{count * size / fast:,.0f}", f"{count / fast:.1f}", *times]


def scale_logits(prior: Any) -> None:
    """Scale the last layer so that logits have a standard deviation of 3, as after training."""
    tokens = torch.randint(prior.grid.vocab_size, (4, *prior.grid.shape), device=prior.device)
    with torch.no_grad():
        prior.head.weight.mul_(3 / prior(tokens).std())


def coding_rows(card: Card, config: Any, sizes: Sizes, repeats: int) -> Iterator[Row]:
    """Yield rows for a tokenizer in float32 and under bf16 autocast, next to `VQModel`."""

    def measure(cast: bool) -> list[str]:
        ours = Tokenizer.create("vqgan", **dict(config)).to(card.device).eval()
        theirs = reference_tokenizer(card, config, 1)[0].eval()
        images = torch.rand(sizes.images, *ours.image_shape, device=card.device) * 2 - 1
        tokens = ours.encode(images)
        latents = theirs.encode(images).latents
        runs = [
            lambda: ours.encode(images),
            lambda: ours.decode(tokens),
            lambda: theirs.encode(images),
            lambda: theirs.decode(latents),
        ]
        with torch.inference_mode(), torch.autocast(card.device.type, torch.bfloat16, enabled=cast):
            return [f"{sizes.images / card.times(run, repeats)[0]:.0f}" for run in runs]

    for name, cast in (("float32", False), ("bf16 autocast", True)):
        yield f"vqgan, {name}", f"{sizes.images}", partial(measure, cast)
