r"""Cost of drawing several tokens per pass, in bits: ordered partitions against raster order, all exact densities.

    pip install -e ".[dev]"
    smalti train_tokenizer --config configs/tokenizer/vqvae_fashion_mnist.yaml out=runs/garments
    smalti encode tokenizer=runs/garments/tokenizer out=runs/garments_tokens
    python -m benchmarks.priors.blocks tokens=runs/garments_tokens steps=1500 seeds=3 model.dim=64 model.depth=4 \
        model.heads=4 train.batch_size=64 train.lr=3e-3

Trains one prior of kind `blocks` for each of `orders`, a `gpt` in raster order and a `masked` prior on the same tokens,
for the same number of steps and with `seeds` seeds, by `smalti train_prior --config CONFIG` and the dotted keys of this
command. Finished runs are read from `out`.

bits/token: -log2 p per token of the held-out split given its labels; price: the difference to `gpt`. Means over seeds,
+- half of the 95 % t-interval. s: seconds for 64 images, classes in turn, cached, without guidance; median of three, on
one thread by default. `gpt, parallel` draws the same images as `gpt` from fewer passes (mean per image). `masked, K
steps` draws the most confident tokens first, and has no density; `masked along ORDER` evaluates the same weights
exactly (on 500 images).

Samples of the first seed: `samples` images without guidance. agreement: share that a small classifier of decoded
training tokens assigns to the requested class; Frechet: distance between its features of samples and of as many decoded
training images; other gpt: bits per token of the samples under a second `gpt` (seed 9), which favours samples of its
kind. The last row is for decoded held-out images.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.support.options import ROOT, read_options, use_threads
from benchmarks.support.runs import train_once
from benchmarks.support.tables import cache_json, table_head, table_row, with_interval
from benchmarks.support.timing import seconds_of
from pipelines import ImagePipeline
from pipelines.metrics.frechet import frechet_distance
from pipelines.metrics.likelihood import bits_per_token
from pipelines.metrics.quality import train_classifier
from pipelines.tokens import load_tokens

OTHER_SEED, TIMED, EXACT_ROWS, TRAINING, CLASSIFIER_STEPS = 9, 64, 500, 10_000, 1500
OPTIONS = {
    "tokens": str,
    "config": "configs/prior/gpt_fashion_mnist.yaml",
    "orders": "raster,diagonal,halton:13,halton:8,spread:8,regions:4,dyadic,rows,halton:5,spread:5",
    "masked": "8",
    "steps": 1500,
    "seeds": 3,
    "samples": 2000,
    "threads": 1,
    "out": "runs/blocks",
}


def train(kind: str, order: str, seed: int, options: SimpleNamespace) -> Path:
    name = kind if kind != "blocks" else f"blocks-{order.replace(':', '-').replace('/', '_')}"
    run = Path(options.out) / name / f"seed{seed}"
    more = [f"tokens={options.tokens}", f"model.kind={kind}", f"model.order={order}", f"train.seed={seed}"]
    if kind == "masked":
        more += ["model.exact=false"]  # evaluate the bound: the exact density takes N passes
    more += options.changes
    train_once("train_prior", ROOT / options.config, options.steps, run, *more, never=("preview", "save"))
    return run


class Pictures:
    """Decoded tokens as a labelled image set for the classifier."""

    def __init__(self, pipe: Any, split: Any, count: int, class_names: list[str]) -> None:
        self.images = pipe.decode(split.tokens[:count].long(), output_type="pt")
        self.labels, self.class_names = split.given.raw("label")[:count], class_names
        self.spec = pipe.spec

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Any) -> Any:
        return self.images[torch.as_tensor(rows)]


class SampleMetrics:
    """Metrics of samples: a classifier of decoded training tokens, its features, and another prior."""

    def __init__(self, pipe: Any, other_gpt: Any, data: Any, samples: int) -> None:
        pictures: Any = Pictures(pipe, data.splits["train"], TRAINING, data.class_names)
        self.net, self.other_gpt, self.samples = train_classifier(pictures, CLASSIFIER_STEPS), other_gpt, samples
        self.known = self.features(pictures.images[:samples])

    def features(self, images: Any) -> Any:
        with torch.inference_mode():
            return torch.cat([self.net.features(part) for part in images.split(500)])

    def __call__(self, pipe: Any, tokens: Any, labels: Any) -> dict[str, float]:
        """Measure tokens `(n, *grid.shape)` with labels `(n,)`."""
        images = pipe.decode(tokens, output_type="pt")
        with torch.inference_mode():
            found = torch.cat([self.net(part).argmax(1) for part in images.split(500)])
            parts = zip(tokens.split(250), labels.split(250), strict=True)
            nats = torch.cat([self.other_gpt.log_prob(part, ids) for part, ids in parts])
        return {
            "agreement": float((found == labels).double().mean()),
            "frechet": frechet_distance(self.features(images), self.known),
            "other_gpt": -float(nats.double().mean()) / len(self.other_gpt.grid) / math.log(2),
        }


def sample_tokens(pipe: Any, count: int, **how: Any) -> tuple[Any, Any]:
    labels = torch.arange(count) % max(1, pipe.prior.num_classes)
    return pipe(
        count, labels.tolist(), seed=0, guidance_scale=1.0, output_type="pt", progress=False, **how
    ).tokens, labels


def time_sampling(pipe: Any, **how: Any) -> dict[str, Any]:
    labels, rows = torch.arange(TIMED) % max(1, pipe.prior.num_classes), list[int]()
    hook = pipe.prior.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    (seconds,) = seconds_of([lambda: pipe.prior.sample(TIMED, labels, **how)], 3)
    hook.remove()
    return {"seconds": seconds, "passes": sum(rows) / TIMED / 4 if how.get("parallel") else len(pipe.prior.blocks)}


def measure_prior(run: Path, data: Any, metrics: SampleMetrics | None) -> dict[str, Any]:
    """Measure bits and passes of a run; with `metrics` also samples and speed."""
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    split = data.splits["test"]
    found = cache_json(run / "bits.json", lambda: {"bits": bits_per_token(pipe.prior, split)})
    found["passes"] = len(pipe.prior.blocks)
    if metrics:
        found |= cache_json(run / "time.json", lambda: time_sampling(pipe))
        found |= cache_json(run / "samples.json", lambda: metrics(pipe, *sample_tokens(pipe, metrics.samples)))
    return found


def measure_masked(
    run: Path, data: Any, metrics: SampleMetrics | None, steps: int, order: str
) -> dict[str, dict[str, Any]]:
    """Measure a masked prior twice: by confidence in `steps` steps, and exactly along an order."""
    pipe, split = ImagePipeline.from_pretrained(run / "pipeline"), data.splits["test"]
    pipe.prior.exact = True

    def exact() -> dict[str, float]:
        parts = torch.arange(min(EXACT_ROWS, len(split))).split(50)
        with torch.inference_mode():
            each = [pipe.prior.log_prob(split.rows(at), condition=split.given[at], order=order) for at in parts]
        nats = torch.cat(each)
        return {"bits": -float(nats.double().mean()) / len(data.grid) / math.log(2)}

    confident, along = {"passes": steps}, cache_json(run / f"bits-{order.replace(':', '-')}.json", exact)
    if metrics:
        for found, how in ((confident, {"steps": steps}), (along, {"order": order})):
            name = "-".join(map(str, how.values())).replace(":", "-")
            found |= cache_json(run / f"time-{name}.json", lambda how=how: time_sampling(pipe, **how))
            found |= cache_json(
                run / f"samples-{name}.json",
                lambda how=how: metrics(pipe, *sample_tokens(pipe, metrics.samples, **how)),
            )
    along["passes"], confident["passes"] = int(order.partition(":")[2]), steps
    return {f"masked, {steps} steps": confident, f"masked along {order}": along}


def format_row(name: str, runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Format a row of the table. runs: the figures of each seed."""
    first, cells = runs[0], [name, f"{runs[0]['passes']:.3g}" if "passes" in runs[0] else ""]
    if "bits" in first:
        cells += [with_interval([run["bits"] for run in runs], 3)]
        prices = [run["bits"] - other["bits"] for run, other in zip(runs, base, strict=False)]
        cells += [with_interval(prices, 3) if runs is not base else ""]
    else:
        cells += ["no density" if "passes" in first else "", ""]
    cells += [f"{first['seconds']:.2f}" if "seconds" in first else ""]
    cells += [f"{100 * first['agreement']:.1f} %", f"{first['frechet']:.2f}", f"{first['other_gpt']:.2f}"]
    return table_row(cells)


def main() -> None:
    options = read_options(__doc__, OPTIONS, dotted=True)
    use_threads(options.threads)
    data, seeds = load_tokens(options.tokens), range(1, options.seeds + 1)
    orders = [order for order in options.orders.split(",") if order]
    kinds = {"gpt": ("gpt", "raster"), **{order: ("blocks", order) for order in orders}}
    runs = {name: [train(*what, seed, options) for seed in seeds] for name, what in kinds.items()}
    masked = [train("masked", "raster", seed, options) for seed in seeds] if options.masked else []
    other_gpt = ImagePipeline.from_pretrained(train("gpt", "raster", OTHER_SEED, options) / "pipeline")
    metrics = SampleMetrics(other_gpt, other_gpt.prior, data, options.samples)
    rows = {
        name: [measure_prior(run, data, None if at else metrics) for at, run in enumerate(each)]
        for name, each in runs.items()
    }
    first = ImagePipeline.from_pretrained(runs["gpt"][0] / "pipeline")
    jacobi = cache_json(runs["gpt"][0] / "parallel.json", lambda: time_sampling(first, parallel=True))
    rows["gpt, parallel"] = [{**run, **jacobi} for run in rows["gpt"]]
    for steps in (int(text) for text in options.masked.split(",") if text):
        found = [
            measure_masked(run, data, None if at else metrics, steps, f"halton:{steps}")
            for at, run in enumerate(masked)
        ]
        rows |= {name: [each[name] for each in found] for name in found[0]}
    print(f"{len(data.grid)} tokens of {data.grid.vocab_size} ids, {options.steps} steps, {options.seeds} seed(s)\n")
    print(
        table_head("order", "passes", "bits/token", "price", "s, 64 images", "agreement", "Frechet", "other gpt, bits")
    )
    for name, each in rows.items():
        print(format_row(name, each, rows["gpt"]), flush=True)
    test = data.splits["test"]
    real = metrics(other_gpt, test.tokens[: options.samples].long(), test.given.raw("label")[: options.samples])
    print(format_row("held-out images", [real], rows["gpt"]))


if __name__ == "__main__":
    main()
