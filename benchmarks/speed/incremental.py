"""What sampling costs with the incremental path, for every prior: FLOPs against one pass, seconds against none cached.

    pip install -e ".[dev]"
    python -m benchmarks.speed.incremental threads=2

Random weights, 16 images. FLOPs: of `sample` (with the passes over single images that decide close calls) over those of
one forward pass on the same batch, attention counted by an explicit product (the counter does not see the fused kernel
on a CPU). Cached: the median of three. Uncached: N times the median of five forward passes, which is what the path
without a cache takes. Any order: an order of its own for each image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.support.options import read_options, use_threads
from benchmarks.support.tables import table_head, table_row
from benchmarks.support.timing import seconds_of

IMAGES = 16
GRIDS = [((28, 28), 2), ((16, 16), 512)]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # label -> kind, sizes
    "made, one layer of 8000": ("made", {"hidden": (8000,)}),
    "causal_conv, 8 x 64": ("causal_conv", {"dim": 64, "depth": 8}),
    "pixelcnn, 15 x 16": ("pixelcnn", {"dim": 16, "depth": 15, "row_embedding": False}),
    "gated_pixelcnn, 10 x 128": ("gated_pixelcnn", {"dim": 128, "depth": 10, "row_embedding": False}),
    "pixelcnn_pp, 3 stages of 2 x 32": ("pixelcnn_pp", {"dim": 32, "depth": 2, "row_embedding": False}),
    "pixelsnail, 4 x 64": ("pixelsnail", {"dim": 64, "depth": 4}),
    "gpt, 8 x 64": ("gpt", {"dim": 64, "depth": 8, "heads": 4}),
    "gpt, any order, 8 x 64": ("gpt", {"dim": 64, "depth": 8, "heads": 4, "any_order": True}),
}
EMBEDDED = {"made": {"embedding": 32, "hidden": (2000,)}}  # where there are many ids


def attention_by_product(q: Any, k: Any, v: Any, is_causal: bool = False, dropout_p: float = 0.0) -> Any:
    """What the FLOP counter can see."""
    import torch

    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ v


def flops(run: Callable[[], object]) -> int:
    """FLOPs of a call."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    fused = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention_by_product
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
    finally:
        torch.nn.functional.scaled_dot_product_attention = fused
    return counter.get_total_flops()


def measure(model: Any) -> list[str]:
    """The cells of a row: parameters, FLOPs, seconds with a cache and without, and the ratio of these."""
    import torch

    size = len(model.grid)
    tokens = torch.randint(model.grid.vocab_size, (IMAGES, *model.grid.shape))
    walk = {"order": torch.rand(IMAGES, size).argsort(1)} if model.any_order else {}

    def sample() -> None:
        model.sample(IMAGES, generator=torch.Generator().manual_seed(0), **walk)

    ratio = flops(sample) / flops(lambda: model(tokens, **walk))
    (cached,) = seconds_of([sample], 3)
    with torch.inference_mode():
        (one_pass,) = seconds_of([lambda: model(tokens, **walk)], 5)
    count = sum(p.numel() for p in model.parameters())
    return [f"{count:,}", f"{ratio:.3f}", f"{cached:.2f}", f"{size * one_pass:.1f}", f"{size * one_pass / cached:.0f}"]


def main() -> None:
    threads = use_threads(read_options(__doc__, {"threads": 2}).threads)
    import torch

    from prior import Prior
    from tokenizer import TokenGrid

    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {threads} thread(s), {IMAGES} images\n")
    print(table_head("grid", "prior", "parameters", "FLOPs / one pass", "cached, s", "uncached, s", "speed-up"))
    for shape, vocab_size in GRIDS:
        for label, (kind, sizes) in MODELS.items():
            if vocab_size > 32 and kind in EMBEDDED:
                sizes = EMBEDDED[kind]
                label = f"{kind}, one layer of {sizes['hidden'][0]}, ids embedded in {sizes['embedding']}"
            model = Prior.create(kind, grid=TokenGrid(shape, vocab_size), **sizes).eval()
            cells = [f"{'x'.join(map(str, shape))} of {vocab_size}", label, *measure(model)]
            print(table_row(cells), flush=True)


if __name__ == "__main__":
    main()
