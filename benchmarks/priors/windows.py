"""What a window of gpt's attention saves and costs: memory, time of a training step and of a token, bits.

    pip install -e ".[dev]"
    python -m benchmarks.priors.windows threads=1                                    # random tokens: memory and time
    python -m benchmarks.priors.windows threads=1 only=openmoji windows=null,3x3     # of one grid, some of the windows
    python -m benchmarks.priors.windows threads=1 minutes=30 seeds=3                 # bits after equal time, too
    python -m benchmarks.priors.windows threads=1 repeats=1 minutes=0.02 rows=2 only=fashion_mnist    # does it run?

Grids: garments, 28x28 pixels of 8 levels, and pictures of 64x64 ids of a palette of 64 colours. Models: `dim=96`,
`depth=4` and four heads. A window is `rows x columns`, with `/1-2-4-8` the dilation of each layer, and `null` all
earlier tokens; `dense` before it is the same as one mask of N x N, which is how the fused kernel alone would do it.

step: forward, backward and a fused AdamW step on 8 garments or 2 pictures; the median of `repeats`, all in turn.
memory: by how much resident memory rises in a step. token: of sampling `images=4` together, all positions, once; kept:
the keys and values of an image. sees: the share of earlier tokens that reach a logit. All on random tokens.

bits: per token of `rows=200` held-out images, evenly spread, after `minutes` of CPU time: as many steps as fit by the
table above, with a warm-up and a cosine. The images are those of the folder `fashion_mnist` or `openmoji` in
SMALTI_DATA or ../shared/data; the palette is fitted to the training images. Means over `seeds`, +- half of the 95 %
t-interval.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks.support.options import choose, image_folder, read_options, use_threads
from benchmarks.support.step_costs import resident_rise
from benchmarks.support.tables import table_head, table_row, with_interval
from benchmarks.support.timing import cpu_seconds_of, steps_within

WARM_UP = 100
OPTIONS = {
    "threads": 0,
    "repeats": 5,
    "images": 4,
    "minutes": 0.0,
    "seeds": 1,
    "rows": 200,
    "dim": 96,
    "depth": 4,
    "lr": 3e-3,
    "only": None,
    "windows": "null,1x1,3x3,6x6,12x12,1x1/1-2-4-8,dense 3x3",
}


class Data(NamedTuple):
    """A grid, the tokenizer that makes it, and how many images a step takes."""

    side: int
    channels: int
    tokenizer: tuple[str, dict[str, Any]]
    batch: int

    def made(self) -> Any:
        from tokenizer import Tokenizer

        kind, settings = self.tokenizer
        return Tokenizer.create(kind, image_size=(self.side, self.side), channels=self.channels, **settings)


DATA = {
    "fashion_mnist": Data(28, 1, ("pixels", {"levels": 8}), 8),
    "openmoji": Data(64, 3, ("palette", {"colors": 64}), 2),
}


def settings_of(name: str) -> dict[str, Any]:
    """Of a model: `3x3`, `3x3/1-2-4-8`, `null`; `dense` before it changes how it is computed alone."""
    size, _, dilation = name.removeprefix("dense ").partition("/")
    if size == "null":
        return {}
    window = {"window": tuple(int(reach) for reach in size.split("x"))}
    return window | ({"dilation": tuple(int(d) for d in dilation.split("-"))} if dilation else {})


def make_model(name: str, grid: Any, sizes: SimpleNamespace, seed: int = 0) -> Any:
    """An untrained model of a window's name."""
    import torch
    from torch.nn import functional

    from prior import Prior

    torch.manual_seed(seed)
    model = Prior.create("gpt", grid=grid, dim=sizes.dim, depth=sizes.depth, heads=4, **settings_of(name))
    if name.startswith("dense "):
        ranks = torch.arange(len(grid))
        for window in {layer.window for layer in model.layers}:
            mask = window.rule()(ranks[:, None], ranks)

            def attend(q: Any, k: Any, v: Any, dropout: float, mask: Any = mask) -> Any:
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

            window.attend = attend
    return model


# Memory and time ----------------------------------------------------------------------------------


def stepper(model: Any, batch: Callable[[], Any], lr: float, steps: int = 1) -> Callable[[], None]:
    """A training step at each call, of `steps` in all."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def step() -> None:
        tokens = batch()
        model.loss(tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    return step


def sampling(model: Any, images: int) -> tuple[float, int]:
    """Seconds of a token of each of so many images, and the bytes that are kept of one."""
    import torch

    with torch.inference_mode():
        state, token = model.start(images, None), None
        began = time.perf_counter()
        for _ in range(len(model.grid)):
            token = model.next_logits(state, token).argmax(-1)
        taken = time.perf_counter() - began
    return taken / len(model.grid), sum(layer[1].nbytes for layer in state.layers) // images


def costs(data: Data, names: list[str], options: SimpleNamespace) -> dict[str, float]:
    """Print the table of a grid; returns CPU seconds per step."""
    import torch

    grid = data.made().grid
    models = {name: make_model(name, grid, options) for name in names}
    tokens = torch.randint(grid.vocab_size, (data.batch, *grid.shape))
    steps = {name: stepper(model.train(), lambda: tokens, 1e-5) for name, model in models.items()}
    seconds = dict(zip(names, cpu_seconds_of(list(steps.values()), options.repeats), strict=True))
    for name, model in models.items():
        rise = resident_rise(steps[name])
        token, kept = sampling(model.eval(), options.images)
        cells = [
            name,
            f"{1e3 * seconds[name]:.0f}",
            f"{seconds[names[0]] / seconds[name]:.2f}",
            "" if rise is None else f"{rise / 2**20:.0f}",
            f"{1e3 * token:.2f}",
            f"{kept / 2**20:.2f}",
            f"{float(model.receptive_field.sum() / (len(grid) * (len(grid) - 1) / 2)):.0%}",
        ]
        print(table_row(cells), flush=True)
    return seconds


# Bits ---------------------------------------------------------------------------------------------


def tokens_of(name: str, data: Data) -> tuple[Any, Any, Any]:
    """The grid, and tokens of the training and of the held-out images, uint8."""
    import torch

    from pipelines.images import DataConfig, load_images

    images = load_images(DataConfig(source=str(image_folder(name)), image_size=data.side, channels=data.channels))
    tokenizer = data.made().eval()
    tokenizer.initialize(images.train.batch(range(len(images.train))))
    with torch.inference_mode():
        train, held_out = (
            torch.cat([tokenizer.encode(part.batch(rows.tolist())) for rows in torch.arange(len(part)).split(256)])
            for part in (images.train, images.held_out)
        )
    return tokenizer.grid, train, held_out


def bits_after(
    model: Any, steps: int, tokens: tuple[Any, Any], batch: int, options: SimpleNamespace, seed: int
) -> float:
    """Bits per held-out token of a model, trained for so many steps on the first of `tokens`."""
    import torch

    train, held_out = tokens
    torch.manual_seed(seed)
    step = stepper(model.train(), lambda: train[torch.randint(len(train), (batch,))].long(), options.lr, steps)
    for _ in range(steps):
        step()
    model.eval()
    rows = torch.linspace(0, len(held_out) - 1, min(options.rows, len(held_out))).round().long()
    with torch.inference_mode():
        nats = [-model.log_prob(part.long()) for part in held_out[rows].split(batch)]
    return float(torch.cat(nats).double().mean()) / (math.log(2) * len(model.grid))


def compare(name: str, data: Data, seconds: dict[str, float], options: SimpleNamespace) -> None:
    """Print bits after equal time, of the windows that differ in what they compute."""
    grid, *tokens = tokens_of(name, data)
    print(f"\n{name}: {len(tokens[0]):,} images, {options.minutes:g} CPU minutes each, {options.seeds} seed(s)\n")
    print(table_head("window", "steps", "bits per token"))
    for window in [window for window in seconds if not window.startswith("dense ")]:
        steps = steps_within(options.minutes, seconds[window])
        bits = [
            bits_after(make_model(window, grid, options, seed), steps, tuple(tokens), data.batch, options, seed)
            for seed in range(options.seeds)
        ]
        print(table_row([window, f"{steps:,}", with_interval(bits, 4)]), flush=True)


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    only = choose(options.only, list(DATA))
    names = [name.strip() for name in options.windows.split(",")]
    threads = use_threads(options.threads)
    import torch

    for name in only:
        data = DATA[name]
        if options.minutes and not image_folder(name).is_dir():
            raise SystemExit(f"{image_folder(name)}: no such folder; without minutes= it is not needed")
        side, vocab_size = data.side, data.made().grid.vocab_size
        print(f"\n{name}, {side}x{side} ids of {vocab_size}, torch {torch.__version__}, {threads} thread(s)\n")
        print(table_head("window", "step, ms", "faster", "memory, MiB", "token, ms", "kept, MiB", "sees"), flush=True)
        seconds = costs(data, names, options)
        if options.minutes:
            compare(name, data, seconds, options)


if __name__ == "__main__":
    main()
