"""What sampling costs with the incremental path, for every prior: FLOPs against one pass, seconds against none cached.

    pip install -e ".[dev]"
    python benchmarks/incremental.py threads=2

Random weights, 16 images. FLOPs: of drawing all N tokens, over those of one forward pass on the same batch, attention
counted by an explicit product (the counter does not see the fused kernel on a CPU). Cached: the median of three.
Uncached: N times the median of five forward passes, which is what the path without a cache takes.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from sampling import seconds_of, table_head

IMAGES = 16
GRIDS = [((28, 28), 2), ((16, 16), 512)]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # label -> kind, sizes
    "made, one layer of 8000": ("made", {"hidden": (8000,)}),
    "causal_conv, 8 x 64": ("causal_conv", {"dim": 64, "depth": 8}),
    "pixelcnn, 15 x 16": ("pixelcnn", {"dim": 16, "depth": 15}),
    "gated_pixelcnn, 10 x 128": ("gated_pixelcnn", {"dim": 128, "depth": 10}),
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


def all_steps(model: Any, tokens: Any) -> None:
    """The incremental path over given tokens: all that sampling computes but for the drawing."""
    state, token = model.start(len(tokens), None), None
    for position in model.order.tolist():
        model.next_logits(state, token)
        token = tokens.flatten(1)[:, position]


def flop_ratio(model: Any, tokens: Any) -> float:
    """FLOPs of all N steps over those of one forward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    fused = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention_by_product
    try:
        counts = []
        for run in (lambda: all_steps(model, tokens), lambda: model(tokens)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                run()
            counts.append(counter.get_total_flops())
    finally:
        torch.nn.functional.scaled_dot_product_attention = fused
    return counts[0] / counts[1]


def main() -> None:
    options = dict(argument.split("=") for argument in sys.argv[1:])
    os.environ["OMP_NUM_THREADS"] = options.get("threads", "2")
    import torch

    from prior import Prior
    from tokenizer import TokenGrid

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {IMAGES} images\n")
    print(table_head("grid", "prior", "parameters", "FLOPs / one pass", "cached, s", "uncached, s", "speed-up"))
    for shape, vocab_size in GRIDS:
        for label, (kind, sizes) in MODELS.items():
            if vocab_size > 32 and kind in EMBEDDED:
                sizes = EMBEDDED[kind]
                label = f"{kind}, one layer of {sizes['hidden'][0]}, ids embedded in {sizes['embedding']}"
            model = Prior.create(kind, grid=TokenGrid(shape, vocab_size), **sizes).eval()
            tokens = torch.randint(vocab_size, (IMAGES, *shape))
            ratio = flop_ratio(model, tokens)
            (cached,) = seconds_of([lambda model=model: model.sample(IMAGES)], 3)
            with torch.inference_mode():
                (one_pass,) = seconds_of([lambda model=model, tokens=tokens: model(tokens)], 5)
            slow = len(model.grid) * one_pass
            count = sum(p.numel() for p in model.parameters())
            print(f"| {'x'.join(map(str, shape))} of {vocab_size} | {label} | {count:,} | {ratio:.3f} | {cached:.2f} "
                  f"| {slow:.1f} | {slow / cached:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
