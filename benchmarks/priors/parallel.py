"""Passes per image of parallel sampling, by what is guessed for the tokens after the first wrong one.

    pip install -e ".[dev]"
    python -m benchmarks.priors.ladder data=fashion_mnist minutes=2
    python -m benchmarks.priors.parallel ladder=runs/ladder/fashion_mnist prior=gpt guess=made

64 images, one per class in turn, the noise of seeds 0 to 63. `last output`: what the last pass drew there (Jacobi),
from a start at the likeliest tokens of the noise alone, or of noise and position frequencies (`marginal`). `greedy`:
the likeliest tokens of the last pass, without noise. `8 guesses` at once, in one pass: where one token of the last
output were wrong. `corrected`: drawn from the guessing prior's logits on the new
tokens plus what the last pass's differed from them on the old, in so many passes of that prior; `all kept`: plus the
whole difference. All images are compared with those drawn step by step.
Seconds: median of three, with the guessing prior's passes, against the path with a cache.
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


def greedy(guess: Any, rows: Any, sampler: Any, tokens: Any, ended: Any, logits: Any, cheap: Any, noise: Any) -> Any:
    """A guess that ignores the images' noise, in place of `prior.parallel.corrected`."""
    import torch

    free = (torch.arange(tokens.shape[1]) >= ended[:, None]) & ~rows.keep
    return tokens if logits.ndim == 0 else torch.where(free, logits.argmax(-1), tokens)


def passes_of(draw: Callable[[], Any]) -> tuple[float, int, Any]:
    """Passes per image, the slowest image's, and the tokens of a draw."""
    from prior import drawing

    real, passes = drawing.sample_parallel, list[int]()

    def counted(*given: Any) -> Any:
        found = real(*given)
        passes.extend(found.passes.tolist())
        return found

    with mock.patch.object(drawing, "sample_parallel", counted):
        tokens = draw()
    return sum(passes) / len(passes), max(passes), tokens


def measure(model: Any, draw: Callable[..., Any], rules: list[tuple[str, Any, dict[str, Any]]]) -> None:
    """Print a table: a row per rule."""
    import prior.parallel

    expected, size = draw(), len(model.grid)
    cached = [seconds_of([lambda n=n: draw(n)], 3)[0] for n in (IMAGES, 1)]
    print(table_head("guess", "passes per image", "of N", "slowest", f"{IMAGES} images, s", "one image, s", "differ"))
    print(f"| step by step | | | | {cached[0]:.2f} | {cached[1]:.3f} | |")
    for name, guess, patches in rules:
        with mock.patch.multiple(prior.parallel, **patches) if patches else mock.MagicMock():
            mean, slowest, tokens = passes_of(lambda g=guess: draw(parallel=True, guess=g))
            times = [seconds_of([lambda n=n, g=guess: draw(n, parallel=True, guess=g)], 3)[0] for n in (IMAGES, 1)]
        wrong = int((tokens != expected).flatten(1).any(1).sum())
        cells = [
            name,
            f"{mean:.1f}",
            f"{mean / size:.1%}",
            f"{slowest}",
            f"{times[0]:.2f}",
            f"{times[1]:.3f}",
            f"{wrong}",
        ]
        print(table_row(cells), flush=True)


def main() -> None:
    options = read_options(__doc__, {"ladder": "runs/ladder/fashion_mnist", "prior": "gpt", "guess": "made"})
    use_threads()
    import torch

    from pipelines import ImagePipeline
    from pipelines.tokens import load_tokens
    from prior import Prior

    folder = Path(options.ladder)
    model, cheap = (
        ImagePipeline.from_pretrained(folder / name / "seed0" / "pipeline").prior
        for name in (options.prior, options.guess)
    )
    train = load_tokens(str(folder / "tokens")).splits["train"]
    marginal = Prior.create("marginal", grid=model.grid, num_classes=model.num_classes)
    marginal.initialize(train.tokens, train.labels)
    labels = torch.arange(IMAGES) % model.num_classes if model.num_classes else None
    rules = [
        ("last output", None, {}),
        *((f"last output, {n} guesses", None, {"guesses_at_once": lambda *_, n=n: n}) for n in (2, 4, 8, 16)),
        ("last output, marginal start", marginal, {"CHEAP_PASSES": 1}),
        ("greedy", marginal, {"corrected": greedy}),
        *((f"corrected by {cheap.name}, {n} passes", cheap, {"CHEAP_PASSES": n}) for n in (1, 2, 4, 8)),
        (f"corrected by {cheap.name}, all kept", cheap, {"KEPT": 1.0}),
        (f"corrected by {cheap.name}, 0.6 kept", cheap, {"KEPT": 0.6}),
    ]
    for settings in ({}, {"temperature": 0.7}, {"top_p": 0.9}):

        def draw(count: int = IMAGES, settings: dict[str, Any] = settings, **given: Any) -> Any:
            seeds = [torch.Generator().manual_seed(k) for k in range(count)]
            return model.sample(count, None if labels is None else labels[:count], generator=seeds, **settings, **given)

        chosen = ", ".join(f"{name} {value}" for name, value in settings.items()) or "temperature 1"
        print(f"\n{model.name}, {len(model.grid)} tokens of {model.grid.vocab_size}, {chosen}\n")
        measure(model, draw, rules)


if __name__ == "__main__":
    main()
