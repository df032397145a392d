"""Tokens per second of `GPT.sample` against `generate` of transformers' GPT-2 of the same size.

    pip install -e ".[dev,benchmarks]"
    python -m benchmarks.speed.sampling threads=1

Both draw 256 tokens of 512 ids with a KV cache, at temperature 1, without top-k or top-p, with random weights, in
float32. Times are medians of `repeats` runs after a warm-up, in turn. "no cache" is our sampling of one image without a
cache, which costs N times as much.
"""

from __future__ import annotations

import torch

from benchmarks.support.options import read_options, require_packages, use_threads
from benchmarks.support.references import gpt2_sampler
from benchmarks.support.timing import seconds_of
from prior import Prior
from tokenizer import TokenGrid

SIZES = [  # width, depth, heads, batch, target ratio
    (128, 4, 4, 1, 6.0),
    (128, 4, 4, 64, 1.8),
    (512, 8, 8, 1, 1.4),
    (512, 8, 8, 16, 1.4),
]
TOKENS, VOCAB = 256, 512


def measure(width: int, depth: int, heads: int, batch: int, repeats: int) -> tuple[float, float, float | None]:
    """Measure tokens per second of our GPT, of GPT-2 and, for one image, of our GPT without a cache."""
    ours = Prior.create("gpt", grid=TokenGrid((16, 16), VOCAB), dim=width, depth=depth, heads=heads).eval()
    generate = gpt2_sampler(ours.config, "cpu", torch.float32)
    assert generate(batch).shape == (batch, TOKENS + 1)
    mine, other = seconds_of([lambda: ours.sample(batch), lambda: generate(batch)], repeats)
    slow = seconds_of([lambda: ours.sample(batch, cache=False)], 1)[0] if batch == 1 else None
    return batch * TOKENS / mine, batch * TOKENS / other, batch * TOKENS / slow if slow else None


def main() -> None:
    options = read_options(__doc__, {"threads": 1, "repeats": 5})
    require_packages("transformers")
    threads = use_threads(options.threads)
    import transformers

    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {threads} thread(s); tokens per second")
    print("width depth batch     smalti      gpt-2  ratio  target  no cache")
    for width, depth, heads, batch, target in SIZES:
        mine, other, slow = measure(width, depth, heads, batch, options.repeats)
        uncached = f"{slow:9.0f}" if slow else ""
        print(
            f"{width:5} {depth:5} {batch:5} {mine:10.0f} {other:10.0f} {mine / other:6.2f}  {target:6.1f} {uncached}",
            flush=True,
        )


if __name__ == "__main__":
    main()
