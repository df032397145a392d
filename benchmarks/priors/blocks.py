r"""What several tokens per pass cost, in bits: ordered partitions beside raster order, each an exact density.

    pip install -e ".[dev]"
    smalti train_tokenizer --config configs/tokenizer/vqvae_fashion_mnist.yaml out=runs/garments
    smalti encode tokenizer=runs/garments/tokenizer out=runs/garments_tokens
    python -m benchmarks.priors.blocks tokens=runs/garments_tokens steps=1500 seeds=3 model.dim=64 model.depth=4 \
        model.heads=4 train.batch_size=64 train.lr=3e-3

For each of `orders` a prior of kind `blocks`, and beside them a `gpt` in raster order and a `masked` one, are trained
on the same tokens from `seeds` seeds for the same `steps`, by `smalti train_prior --config CONFIG` with what is given
of its keys (those with a dot). What is done is kept under `out` and not done again.

Bits: -log2 p per token of the held-out split, given its labels; price: less those of the `gpt`. Means over seeds, +-
half of the 95 % t-interval. Seconds: 64 images, one per class in turn, cached, without guidance; the median of three,
on one thread unless `threads` says otherwise. `gpt, parallel` draws the same images as `gpt` from fewer passes (its
mean per image). `masked, K steps` keeps the most confident tokens of a pass, which has no density; `masked along ORDER`
reads the same weights exactly (of 500 images).

Samples: of the first seed, `samples` images without guidance. Agreement: how many a small classifier of decoded
training tokens gives the class that was asked for; Frechet: between its features of samples and of as many decoded
training images; judge: bits per token of the samples under another `gpt` (seed 9), which favours its own kind. The last
row has all of it for decoded held-out images. `plot=FILE.png`: bits against passes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.support.options import ROOT, read_options, use_threads
from benchmarks.support.runs import train_once
from benchmarks.support.tables import interval, table_head, table_row, with_interval, write_whole
from benchmarks.support.timing import seconds_of

JUDGE, TIMED, EXACT_ROWS, TRAINING, CLASSIFIER_STEPS = 9, 64, 500, 10_000, 1500
OPTIONS = {
    "tokens": str,
    "config": "configs/prior/gpt_fashion_mnist.yaml",
    "orders": "raster,diagonal,halton:13,halton:8,spread:8,regions:4,dyadic,rows,halton:5,spread:5",
    "masked": "8",
    "steps": 1500,
    "seeds": 3,
    "samples": 2000,
    "threads": 1,
    "plot": None,
    "out": "runs/blocks",
}


def train(kind: str, order: str, seed: int, options: SimpleNamespace) -> Path:
    """The pipeline of one prior, trained once."""
    name = kind if kind != "blocks" else f"blocks-{order.replace(':', '-').replace('/', '_')}"
    run = Path(options.out) / name / f"seed{seed}"
    more = [f"tokens={options.tokens}", f"model.kind={kind}", f"model.order={order}", f"train.seed={seed}"]
    more += ["model.exact=false"] if kind == "masked" else []  # a bound in training, or it would take N passes
    train_once(
        "train_prior", ROOT / options.config, options.steps, run, *more, *options.changes, never=("preview", "save")
    )
    return run


def kept(path: Path, measure: Any) -> dict[str, Any]:
    """What `measure` gives, kept in `path`."""
    if not path.is_file():
        print(f"measuring {path.parent}", file=sys.stderr, flush=True)
        write_whole(measure(), path)
    return json.loads(path.read_text())


class Pictures:
    """Decoded tokens as a set of images with labels, as a classifier reads it."""

    def __init__(self, pipe: Any, split: Any, count: int, class_names: list[str]) -> None:
        self.images = pipe.decode(split.tokens[:count].long(), output_type="pt")
        self.labels, self.class_names = split.labels[:count], class_names
        self.image_shape = tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Any) -> Any:
        """Those images."""
        import torch

        return self.images[torch.as_tensor(rows)]


class Judges:
    """What samples are judged by: a classifier of decoded training tokens, its features of them, and another prior."""

    def __init__(self, pipe: Any, judge: Any, data: Any, samples: int) -> None:
        from pipelines.metrics.quality import train_classifier

        pictures: Any = Pictures(pipe, data.splits["train"], TRAINING, data.class_names)
        self.net, self.judge, self.samples = train_classifier(pictures, CLASSIFIER_STEPS), judge, samples
        self.known = self.features(pictures.images[:samples])

    def features(self, images: Any) -> Any:
        """Rows `(n, d)`."""
        import torch

        with torch.inference_mode():
            return torch.cat([self.net.features(part) for part in images.split(500)])

    def __call__(self, pipe: Any, tokens: Any, labels: Any) -> dict[str, float]:
        """The figures of tokens `(n, *grid.shape)` of labels `(n,)`."""
        import math

        import torch

        from pipelines.metrics.frechet import frechet_distance

        images = pipe.decode(tokens, output_type="pt")
        with torch.inference_mode():
            found = torch.cat([self.net(part).argmax(1) for part in images.split(500)])
            parts = zip(tokens.split(250), labels.split(250), strict=True)
            nats = torch.cat([self.judge.log_prob(part, ids) for part, ids in parts])
        return {
            "agreement": float((found == labels).double().mean()),
            "frechet": frechet_distance(self.features(images), self.known),
            "judge": -float(nats.double().mean()) / len(self.judge.grid) / math.log(2),
        }


def draw(pipe: Any, count: int, **how: Any) -> tuple[Any, Any]:
    """Tokens and labels of samples, a class in turn."""
    import torch

    labels = torch.arange(count) % max(1, pipe.prior.num_classes)
    return pipe(
        count, labels.tolist(), seed=0, guidance_scale=1.0, output_type="pt", progress=False, **how
    ).tokens, labels


def timed(pipe: Any, **how: Any) -> dict[str, Any]:
    """Seconds of 64 images, and passes per image."""
    import torch

    labels, rows = torch.arange(TIMED) % max(1, pipe.prior.num_classes), list[int]()
    hook = pipe.prior.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    (seconds,) = seconds_of([lambda: pipe.prior.sample(TIMED, labels, **how)], 3)
    hook.remove()
    return {"seconds": seconds, "passes": sum(rows) / TIMED / 4 if how.get("parallel") else len(pipe.prior.blocks)}


def measure_prior(run: Path, data: Any, judges: Judges | None) -> dict[str, Any]:
    """Bits and passes of a run; with `judges` its samples and their time."""
    from pipelines import ImagePipeline
    from pipelines.metrics.likelihood import bits_per_token

    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    split = data.splits["test"]
    found = kept(run / "bits.json", lambda: {"bits": bits_per_token(pipe.prior, split)})
    found["passes"] = len(pipe.prior.blocks)
    if judges:
        found |= kept(run / "time.json", lambda: timed(pipe))
        found |= kept(run / "samples.json", lambda: judges(pipe, *draw(pipe, judges.samples)))
    return found


def measure_masked(run: Path, data: Any, judges: Judges | None, steps: int, order: str) -> dict[str, dict[str, Any]]:
    """The two readings of a masked prior: confidence in so many steps, and exactly along an order."""
    from pipelines import ImagePipeline

    pipe, split = ImagePipeline.from_pretrained(run / "pipeline"), data.splits["test"]
    pipe.prior.exact = True

    def exact() -> dict[str, float]:
        import math

        import torch

        parts = zip(split.tokens[:EXACT_ROWS].long().split(50), split.labels[:EXACT_ROWS].split(50), strict=True)
        with torch.inference_mode():
            nats = torch.cat([pipe.prior.log_prob(part, ids, order=order) for part, ids in parts])
        return {"bits": -float(nats.double().mean()) / len(data.grid) / math.log(2)}

    confident, along = {"passes": steps}, kept(run / f"bits-{order.replace(':', '-')}.json", exact)
    if judges:
        for found, how in ((confident, {"steps": steps}), (along, {"order": order})):
            name = "-".join(map(str, how.values())).replace(":", "-")
            found |= kept(run / f"time-{name}.json", lambda how=how: timed(pipe, **how))
            found |= kept(
                run / f"samples-{name}.json", lambda how=how: judges(pipe, *draw(pipe, judges.samples, **how))
            )
    along["passes"], confident["passes"] = int(order.partition(":")[2]), steps
    return {f"masked, {steps} steps": confident, f"masked along {order}": along}


def line(name: str, runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """A row of the table: the figures of each seed."""
    first, cells = runs[0], [name, f"{runs[0]['passes']:.3g}" if "passes" in runs[0] else ""]
    if "bits" in first:
        cells += [with_interval([run["bits"] for run in runs], 3)]
        prices = [run["bits"] - other["bits"] for run, other in zip(runs, base, strict=False)]
        cells += [with_interval(prices, 3) if runs is not base else ""]
    else:
        cells += ["no density" if "passes" in first else "", ""]
    cells += [f"{first['seconds']:.2f}" if "seconds" in first else ""]
    cells += [f"{100 * first['agreement']:.1f} %", f"{first['frechet']:.2f}", f"{first['judge']:.2f}"]
    return table_row(cells)


def plot(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Bits per token against passes."""
    from PIL import Image

    from pipelines.metrics.charts import render

    def chart(figure: Any) -> None:
        import statistics

        axes = figure.subplots()
        for name, runs in rows.items():
            if "bits" not in runs[0]:
                continue
            passes, bits = runs[0]["passes"], [run["bits"] for run in runs]
            color = "#c2410c" if name.startswith("gpt") else "#7c3aed" if name.startswith("masked") else "#1d6fb8"
            half = interval(bits)
            axes.errorbar(passes, statistics.mean(bits), yerr=half if half == half else None, fmt="o", color=color)
            axes.annotate(
                name,
                (passes, statistics.mean(bits)),
                (7, -12 if name == "gpt" else 3),
                textcoords="offset points",
                size=11,
                color=color,
            )
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.set_xticks([5, 8, 13, 16, 31, 49, 100, 256], [str(n) for n in (5, 8, 13, 16, 31, 49, 100, 256)])
        axes.set_xlim(*axes.dataLim.intervalx * [0.8, 1.5])
        axes.minorticks_off()
        axes.set(title="What several tokens per pass cost", xlabel="passes per image", ylabel="held-out bits per token")

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(900, 560, chart)).save(path)


def main() -> None:
    """Train, measure, print the table."""
    options = read_options(__doc__, OPTIONS, dotted=True)
    use_threads(options.threads)
    from pipelines import ImagePipeline
    from pipelines.tokens import load_tokens

    data, seeds = load_tokens(options.tokens), range(1, options.seeds + 1)
    orders = [order for order in options.orders.split(",") if order]
    named = {"gpt": ("gpt", "raster"), **{order: ("blocks", order) for order in orders}}
    runs = {name: [train(*what, seed, options) for seed in seeds] for name, what in named.items()}
    masked = [train("masked", "raster", seed, options) for seed in seeds] if options.masked else []
    judge = ImagePipeline.from_pretrained(train("gpt", "raster", JUDGE, options) / "pipeline")
    judges = Judges(judge, judge.prior, data, options.samples)
    rows = {
        name: [measure_prior(run, data, None if at else judges) for at, run in enumerate(each)]
        for name, each in runs.items()
    }
    first = ImagePipeline.from_pretrained(runs["gpt"][0] / "pipeline")
    jacobi = kept(runs["gpt"][0] / "parallel.json", lambda: timed(first, parallel=True))
    rows["gpt, parallel"] = [{**run, **jacobi} for run in rows["gpt"]]
    for steps in (int(text) for text in options.masked.split(",") if text):
        found = [
            measure_masked(run, data, None if at else judges, steps, f"halton:{steps}") for at, run in enumerate(masked)
        ]
        rows |= {name: [each[name] for each in found] for name in found[0]}
    print(f"{len(data.grid)} tokens of {data.grid.vocab_size} ids, {options.steps} steps, {options.seeds} seed(s)\n")
    print(table_head("order", "passes", "bits/token", "price", "s, 64 images", "agreement", "Frechet", "judge, bits"))
    for name, each in rows.items():
        print(line(name, each, rows["gpt"]), flush=True)
    test = data.splits["test"]
    real = judges(judge, test.tokens[: options.samples].long(), test.labels[: options.samples])
    print(line("held-out images", [real], rows["gpt"]))
    if options.plot:
        plot(rows, Path(options.plot))


if __name__ == "__main__":
    main()
