"""Passes per image of parallel sampling, and whether its images are those drawn step by step.

    pip install -e ".[dev]"
    python -m benchmarks.priors.ladder data=fashion_mnist minutes=2
    python -m benchmarks.priors.parallel ladder=runs/ladder/fashion_mnist prior=gpt

64 images, one per class in turn, the noise of seeds 0 to 63. Seconds: median of three, against the path with a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.support.options import read_options, use_threads
from benchmarks.support.tables import table_head, table_row
from benchmarks.support.timing import seconds_of

IMAGES = 64


def passes_of(draw: Callable[[], Any]) -> tuple[float, int, Any]:
    """Return the passes per image, the slowest image's, and the tokens of a draw."""
    from prior import base

    real, passes = base.sample_parallel, list[int]()

    def counted(*given: Any) -> Any:
        tokens, each = real(*given)
        passes.extend(each.tolist())
        return tokens, each

    with mock.patch.object(base, "sample_parallel", counted):
        tokens = draw()
    return sum(passes) / len(passes), max(passes), tokens


def measure(model: Any, name: str, draw: Callable[..., Any]) -> list[str]:
    """Return a row of the table."""
    expected = draw()
    cached = [seconds_of([lambda n=n: draw(n)], 3)[0] for n in (IMAGES, 1)]
    mean, slowest, tokens = passes_of(lambda: draw(parallel=True))
    times = [seconds_of([lambda n=n: draw(n, parallel=True)], 3)[0] for n in (IMAGES, 1)]
    wrong = int((tokens != expected).flatten(1).any(1).sum())
    seconds = [f"{one:.3f}" for pair in zip(cached, times, strict=True) for one in pair]
    return [name, f"{mean:.1f}", f"{mean / len(model.grid):.1%}", f"{slowest}", *seconds, f"{wrong}"]


def main() -> None:
    options = read_options(__doc__, {"ladder": "runs/ladder/fashion_mnist", "prior": "gpt"})
    use_threads()
    import torch

    from pipelines import ImagePipeline

    model = ImagePipeline.from_pretrained(Path(options.ladder) / options.prior / "seed0" / "pipeline").prior
    labels = torch.arange(IMAGES) % model.num_classes if model.num_classes else None
    print(f"{model.name}, {len(model.grid)} tokens of {model.grid.vocab_size}\n")
    several, one = f"{IMAGES} images, s", "one image, s"
    head = ("settings", "passes per image", "of N", "slowest", several, "in parallel", one, "in parallel", "differ")
    print(table_head(*head))
    for settings in ({}, {"temperature": 0.7}, {"top_p": 0.9}):

        def draw(count: int = IMAGES, settings: dict[str, Any] = settings, **given: Any) -> Any:
            seeds = [torch.Generator().manual_seed(k) for k in range(count)]
            return model.sample(count, None if labels is None else labels[:count], generator=seeds, **settings, **given)

        chosen = ", ".join(f"{name} {value}" for name, value in settings.items()) or "temperature 1"
        print(table_row(measure(model, chosen, draw)), flush=True)


if __name__ == "__main__":
    main()
