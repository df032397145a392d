"""Time sampling, encoding and decoding on a GPU, next to reference models of the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.support.card import Card
from benchmarks.support.card_training import Sizes, reference_tokenizer

ROWS = (1, 16, 64, 256)
SAMPLING_HEAD = (
    "sampling",
    "images",
    "tokens/s",
    "images/s",
    "ms a token step",
    "kernel by kernel, ms",
    "GPT-2, tokens/s",
    "times faster",
)
CODING_HEAD = ("network", "images", "encoded/s", "decoded/s", "VQModel encoded/s", "decoded/s")


def sampling_rows(card: Card, config: Any, sizes: Sizes, repeats: int) -> Iterator[list[str]]:
    """Yield rows for a GPT with random weights in float32 and bf16, sampling with and without a CUDA graph, next to
    GPT-2's `generate`."""
    import torch

    from prior import Prior

    prior = Prior.create("gpt", **dict(config)).to(card.device).eval()
    scale_logits(prior)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = prior.to(dtype), make_gpt2(card, config, dtype)
        for count in (rows for rows in ROWS if rows <= 8 * sizes.images):
            labels = torch.zeros(count, dtype=torch.long, device=card.device)
            mine, _ = card.times(lambda: ours.sample(count, labels), repeats)  # noqa: B023
            launched, _ = card.times(lambda: sample_with_callback(ours, count, labels), max(1, repeats // 2), warmup=1)  # noqa: B023
            other, _ = card.times(lambda: theirs(count), max(1, repeats // 2), warmup=1)  # noqa: B023
            tokens = count * len(prior.grid)
            yield [
                f"gpt, {str(dtype).removeprefix('torch.')}",
                f"{count}",
                f"{tokens / mine:,.0f}",
                f"{count / mine:.1f}",
                f"{1e3 * mine / len(prior.grid):.2f}",
                f"{1e3 * launched / len(prior.grid):.2f}",
                f"{tokens / other:,.0f}",
                f"{other / mine:.1f}",
            ]


def scale_logits(prior: Any) -> None:
    """Scale the last layer so that logits have a standard deviation of 3, as after training."""
    import torch

    tokens = torch.randint(prior.grid.vocab_size, (4, *prior.grid.shape), device=prior.device)
    with torch.no_grad():
        prior.head.weight.mul_(3 / prior(tokens).std())


def sample_with_callback(prior: Any, count: int, labels: Any) -> Any:
    """Sample with a callback per step, which disables the CUDA graph."""
    return prior.sample(count, labels, on_step=lambda step: None)


def make_gpt2(card: Card, config: Any, dtype: Any) -> Callable[[int], Any]:
    """Return a function that generates one grid of tokens per image with transformers' GPT-2 and its cache."""
    import torch
    import transformers

    size = len(config.grid)
    shape = transformers.GPT2Config(
        vocab_size=config.grid.vocab_size,
        n_positions=size + 1,
        n_embd=config.dim,
        n_layer=config.depth,
        n_head=config.heads,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(shape).to(card.device, dtype).eval()
    settings = {"max_new_tokens": size, "min_new_tokens": size, "do_sample": True, "top_k": 0, "pad_token_id": 0}

    def generate(count: int) -> Any:
        prompt = torch.zeros(count, 1, dtype=torch.long, device=card.device)
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)

    return generate


def coding_rows(card: Card, config: Any, sizes: Sizes, repeats: int) -> Iterator[list[str]]:
    """Yield rows for a tokenizer in float32 and under bf16 autocast, next to `VQModel`."""
    import torch

    from tokenizer import Tokenizer

    count = sizes.images
    ours = Tokenizer.create("vqgan", **dict(config)).to(card.device).eval()
    theirs = reference_tokenizer(card, config, 1)[0].eval()
    images = torch.rand(count, *ours.image_shape, device=card.device) * 2 - 1
    tokens = ours.encode(images)
    latents = theirs.encode(images).latents
    for name, cast in (("float32", False), ("bf16 autocast", True)):
        runs = [
            lambda: ours.encode(images),
            lambda: ours.decode(tokens),
            lambda: theirs.encode(images),
            lambda: theirs.decode(latents),
        ]
        with torch.inference_mode(), torch.autocast(card.device.type, torch.bfloat16, enabled=cast):
            seconds = [card.times(run, repeats)[0] for run in runs]
        yield [f"vqgan, {name}", f"{count}", *(f"{count / taken:.0f}" for taken in seconds)]
