"""Compare prices of codes and sizes of codebooks: decibels against the bits that a prior pays for the tokens.

    python -m benchmarks.tokenizers.rate data=digits seeds=3
    python -m benchmarks.tokenizers.rate data=fashion_mnist rates=0,.3 train.steps=1000 prior.train.steps=700
    python -m benchmarks.tokenizers.rate data=openmoji augmentations=32

For each codebook size (by default that of the preset and one four times as large), each `model.quantizer.rate` and each
training seed, the presets `vqvae_{data}` and `gpt_{data}` are trained, and `smalti evaluate` measures the pipeline.
Images are read from the folder `source=`, `data` below SMALTI_DATA or ../shared/data, or the preset's source.
Dotted keys change the tokenizer's preset, with the prefix `prior.` the prior's. Finished runs below `out` are read
again. `rate.csv` holds the table, in which the first figures, to choose by, are of validation images, and the others of
held-out images; `rate.png` has a curve for the rates of each codebook, and one for the codebooks without a rate.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.support.contenders import find_images
from benchmarks.support.options import ROOT, read_options, use_threads
from benchmarks.support.runs import smalti
from benchmarks.support.tables import table_head, table_row, with_interval
from pipelines.config.arguments import read_yaml_file
from pipelines.images.pictures import save_picture
from pipelines.metrics.charts import GREY, INK, render
from tokenizer.files import read_json
from tokenizer.model import CONFIG

OPTIONS = {
    "data": "digits",
    "source": None,
    "codes": None,
    "rates": "0,.1,.3,1",
    "seeds": 1,
    "first_seed": 0,
    "augmentations": 4,
    "threads": 0,
    "out": "runs/rate",
}
PRESETS = ROOT / "configs"
Runs = list[dict[str, float]]
COLUMNS = {
    "validation dB": ("validation/psnr", 2, 1),
    "validation bits": ("validation/bits_per_token", 3, 1),
    "dB": ("psnr", 2, 1),
    "bits per token": ("bits_per_token", 3, 1),
    "bits per image": ("bits_per_image", 1, 1),
    "agreement, %": ("class_agreement", 1, 100),
    "Frechet": ("frechet_distance", 3, 1),
    "reconstructions": ("reconstruction_frechet_distance", 3, 1),
    "precision": ("precision", 3, 1),
    "recall": ("recall", 3, 1),
}


def train_and_evaluate(options: SimpleNamespace, codes: int, rate: float, seed: int) -> dict[str, float]:
    """Train both stages, unless they are finished, and return the figures of validation and held-out images."""
    run = Path(options.out).absolute() / options.data / f"{codes}_{rate:g}_{seed}"
    tokenizer, tokens, prior = run / "tokenizer", run / "tokens", run / "prior"
    result = prior / "evaluation" / "evaluation.json"
    if not result.is_file():
        more = [each for each in options.changes if not each.startswith("prior.")]
        source = find_images(options.data, options.source)
        more += [f"data.source={source}"] if source else []
        book = [f"model.quantizer.codes={codes}", f"model.quantizer.rate={rate:g}", f"train.seed={seed}"]
        preset = str(PRESETS / "tokenizer" / f"vqvae_{options.data}.yaml")
        smalti("train_tokenizer", "--config", preset, f"out={tokenizer}", *book, *more)
        if not (tokens / "manifest.json").is_file():
            smalti("encode", f"tokenizer={tokenizer}", f"out={tokens}", f"augmentations={options.augmentations}")
        more = [each.removeprefix("prior.") for each in options.changes if each.startswith("prior.")]
        preset = str(PRESETS / "prior" / f"gpt_{options.data}.yaml")
        smalti("train_prior", "--config", preset, f"tokens={tokens}", f"out={prior}", f"train.seed={seed}", *more)
        smalti("evaluate", f"pipeline={prior / 'pipeline'}")
    found: dict[str, float] = json.loads(result.read_text())
    shape = read_json(prior / "pipeline" / "prior" / CONFIG)["grid"]["shape"]
    last = {**last_metrics(tokenizer), **last_metrics(prior)}
    return {**last, **found, "bits_per_image": found["bits_per_token"] * math.prod(shape)}


def last_metrics(run: Path) -> dict[str, float]:
    """Return the last figures that a run logged."""
    found: dict[str, float] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return found


def cells(runs: Runs) -> list[str]:
    """Format the columns of the table: means over seeds with intervals."""
    return [with_interval([scale * run[name] for run in runs], digits) for name, digits, scale in COLUMNS.values()]


def means(runs: Runs) -> tuple[float, float]:
    """Return the mean bits per image and PSNR."""
    return tuple(statistics.mean(run[name] for run in runs) for name in ("bits_per_image", "psnr"))  # type: ignore


def draw_curves(found: dict[tuple[int, float], Runs], title: str) -> Any:
    """Plot bits per image against PSNR: for each codebook a curve over the rates, and a grey one over the codebooks
    without a rate."""
    sizes, rates = (sorted({key[axis] for key in found}) for axis in (0, 1))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set(title=title, xlabel="bits of an image's tokens under the prior", ylabel="held-out PSNR, dB")
        for n, size in enumerate(sizes):
            points = [means(found[size, rate]) for rate in rates if (size, rate) in found]
            axes.plot(
                *zip(*points, strict=True),
                "o-",
                color=f"C{n}",
                label=f"{size} codes, rates {rates[0]:g} to {rates[-1]:g}",
            )
        points = [means(found[size, 0.0]) for size in sizes if (size, 0.0) in found]
        axes.plot(*zip(*points, strict=True), "s--", color=GREY, label="sizes of codebooks, without a rate", zorder=0)
        for (_, rate), runs in found.items():
            axes.annotate(f"{rate:g}", means(runs), (6, -12), textcoords="offset points", color=INK)
        axes.legend(loc="lower right")

    return render(760, 480, draw)


def main() -> None:
    options = read_options(__doc__, OPTIONS, dotted=True)
    use_threads(options.threads)
    preset = read_yaml_file(str(PRESETS / "tokenizer" / f"vqvae_{options.data}.yaml"))["model"]["quantizer"]["codes"]
    sizes = [int(size) for size in options.codes.split(",")] if options.codes else [preset, 4 * preset]
    rates = [float(rate) for rate in options.rates.split(",")]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    found: dict[tuple[int, float], Runs] = {}
    for seed, (size, rate) in itertools.product(seeds, itertools.product(sizes, rates)):
        found.setdefault((size, rate), []).append(train_and_evaluate(options, size, rate, seed))
    rows = [[str(size), f"{rate:g}", *cells(runs)] for (size, rate), runs in sorted(found.items())]
    heads = ["codes", "rate", *COLUMNS]
    print(table_head(*heads), *map(table_row, rows), sep="\n")
    out = Path(options.out) / options.data
    with open(out / "rate.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([heads, *rows])
    save_picture(draw_curves(found, f"{options.data}: rates and sizes of codebooks"), out / "rate.png", overwrite=True)


if __name__ == "__main__":
    main()
