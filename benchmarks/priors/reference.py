"""Set the presets of pixel models beside published figures, on held-out images.

    python -m benchmarks.priors.reference                                   # binarised MNIST from the Hub, all priors
    python -m benchmarks.priors.reference only=made source=FOLDER threads=1
    python -m benchmarks.priors.reference data=mnist_8bit seeds=3           # MNIST, 256 values
    python -m benchmarks.priors.reference data=fashion_8bit train=false     # print what has been trained

Each preset `configs/prior/*_{data}.yaml` is trained by `smalti train_prior` on its `tokens`, NAME_tokens, those of
`configs/tokenizer/pixels_NAME.yaml` (`source` replaces the images), for the preset's steps or `minutes`, with `seeds`
seeds, and measured by `smalti evaluate`. A run that was interrupted continues; finished runs are read from `out`.

test: the figure on all held-out images, mean over seeds +- half of the 95 % t-interval; on drawn pixels each seed's is
the mean over five fixed draws. validation: the images by which weights are chosen. minutes: of training, by the clock;
CPU: of all its threads, which is less if others used the machine. `curves.png` plots validation figures against hours,
with test figures as diamonds, and published ones, which are of test images, as lines.
"""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from benchmarks.support.options import ROOT, choose, read_options, use_threads
from benchmarks.support.runs import smalti
from benchmarks.support.tables import table_head, table_row, with_interval, write_json
from benchmarks.support.timing import prior_presets
from pipelines.images.pictures import save_picture
from pipelines.metrics.charts import GREY, INK, render
from pipelines.tokens.meta import read_meta

OPTIONS = {
    "data": "mnist_drawn",
    "source": None,
    "minutes": 0.0,
    "seeds": 1,
    "only": None,
    "train": True,
    "threads": 0,
    "out": "runs/reference",
}
BITS = "validation/bits_per_token"


@dataclass(frozen=True)
class Reference:
    """Published figures of a data set. figure: the same in `evaluation.json`. published: by model."""

    figure: str
    unit: str
    published: dict[str, float]
    source: str


REFERENCES = {
    "mnist_drawn": Reference(
        "nats_per_image",
        "nats",
        {"made": 84.87, "gated_pixelcnn": 81.50, "pixelcnn": 81.45, "gpt": 79.17, "pixelsnail": 78.61},
        "pytorch-generative, 50 epochs for MADE and 457 for the others; its gpt is ImageGPT",
    ),
    "mnist_8bit": Reference(
        "bits_per_dim", "bits per dim", {"gated_pixelcnn": 0.808}, "UvA deep learning tutorial 12, 150 epochs on a GPU"
    ),
    "fashion_8bit": Reference("bits_per_dim", "bits per dim", {"JPEG XL": 3.66}, "effort 9, all test images"),
}


def name_tokens(preset: Path, out: Path) -> Path:
    return out / Path(yaml.safe_load(preset.read_text())["tokens"]).name


def make_tokens(source: str | None, tokens: Path) -> None:
    """Encode the images with the pixel preset of the tokens' name, unless that is done."""
    if not (tokens / "manifest.json").is_file():
        name = tokens.name.removesuffix("_tokens")
        images = [f"data.source={source}"] if source else []
        preset, run = ROOT / "configs" / "tokenizer" / f"pixels_{name}.yaml", tokens.with_name(name)
        smalti("train_tokenizer", "--config", str(preset), f"out={run}", "track.wandb=disabled", *images)
        smalti("encode", f"tokenizer={run / 'tokenizer'}", f"out={tokens}", *images)


def train(preset: Path, tokens: Path, seed: int, run: Path, minutes: float) -> None:
    """Train and evaluate a preset, unless that is done, and note the machine and its CPU time."""
    if (run / "evaluation" / "evaluation.json").is_file():
        return
    path = run.parent / f"{run.name}.machine.json"
    spent = json.loads(path.read_text())["cpu_minutes"] if path.is_file() else 0.0
    length = [f"train.minutes={minutes}", "train.steps=null"] if minutes else []
    began = os.times()
    given = [f"tokens={tokens}", f"out={run}", f"train.seed={seed}", "track.wandb=disabled", *length]
    smalti("train_prior", "--config", str(preset), *given)
    ended = os.times()
    spent += (ended.children_user + ended.children_system - began.children_user - began.children_system) / 60
    write_json({"machine": describe_machine(), "cpu_minutes": spent}, path)
    smalti("evaluate", f"pipeline={run / 'pipeline'}", "num_images=0", "feature_steps=0")


def describe_machine() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.environ['OMP_NUM_THREADS']} thread(s)"


def read_run(run: Path, reference: Reference, scale: float) -> dict[str, Any]:
    """Return the curve of a run, hours and validation figures, and what `smalti evaluate` measured; empty without a
    run. scale: the figure of one bit per token."""
    path = run / "metrics.jsonl"
    every = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    lines = [line for line in every if BITS in line]
    if not lines:
        return {}
    found: dict[str, Any] = {
        "hours": [line["minutes"] / 60 for line in lines],
        "figures": [line[BITS] * scale for line in lines],
        "steps": lines[-1]["step"],
        "minutes": lines[-1]["minutes"],
    }
    for path, keys in (
        (run / "evaluation" / "evaluation.json", (reference.figure, "nats_per_image_deviation")),
        (run.parent / f"{run.name}.machine.json", ("machine", "cpu_minutes")),
    ):
        known = json.loads(path.read_text()) if path.is_file() else {}
        found |= {key: known[key] for key in keys if key in known}
    return found


def format_row(kind: str, reference: Reference, runs: list[dict[str, Any]], none: str) -> str:
    """Format a row of the table. runs: those of each seed. none: what to write without a run."""
    digits = 2 if reference.unit == "nats" else 3
    published = reference.published.get(kind)
    tested = [run[reference.figure] for run in runs if reference.figure in run]
    deviations = [run["nats_per_image_deviation"] for run in runs if "nats_per_image_deviation" in run]
    spent = [run["cpu_minutes"] for run in runs if "cpu_minutes" in run]
    cells = [
        kind,
        "" if published is None else f"{published:.{digits}f}",
        with_interval(tested, digits) if tested else "not finished" if runs else none,
        f"{max(deviations):.3f}" if deviations else "",
        with_interval([min(run["figures"]) for run in runs], digits) if runs else "",
        str(len(runs)) if runs else "",
        f"{runs[0]['steps']:,}" if runs else "",
        f"{runs[0]['minutes']:.0f}" + (f" ({spent[0]:.0f} CPU)" if spent else "") if runs else "",
        runs[0].get("machine", "") if runs else "",
    ]
    return table_row(cells)


def draw_curves(found: dict[str, list[dict[str, Any]]], reference: Reference, title: str, path: Path) -> Path:
    """Plot validation figures against hours, the test figure as a diamond, and published figures as lines."""
    figures = [*reference.published.values(), *(min(run["figures"]) for runs in found.values() for run in runs)]
    worst, best = max(figures), min(figures)
    margin = max(0.4 * (worst - best), 0.05 * best)

    def draw(figure: Any) -> None:
        axes, place = figure.subplots(), math.inf
        for name, value in sorted(reference.published.items(), key=lambda pair: -pair[1]):
            axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
            place = min(value, place - 0.05 * (worst - best + 1.3 * margin))  # labels do not overlap
            axes.annotate(f" {name} {value:g}", (1, place), xycoords=("axes fraction", "data"), color=INK, va="center")
        for index, (kind, runs) in enumerate(found.items()):
            for seed, run in enumerate(runs):
                label = kind if seed == 0 else None
                axes.plot(run["hours"], run["figures"], color=f"C{index}", label=label)
                if reference.figure in run:
                    axes.plot(run["minutes"] / 60, run[reference.figure], color=f"C{index}", marker="D")
        axes.set(title=title, xlabel="hours of training", ylabel=f"{reference.unit}, validation images", xlim=0)
        axes.set_ylim(best - 0.3 * margin, worst + margin)
        if found:
            axes.legend()

    save_picture(render(760, 440, draw), path, overwrite=True)
    return path


def compare(options: SimpleNamespace, out: Path) -> None:
    """Train what is missing, print the table, and draw the curves."""
    reference, presets = REFERENCES[options.data], prior_presets(options.data, "squares")
    only = choose(options.only, list(presets))
    if options.train:
        for seed in range(options.seeds):
            for kind in only:
                tokens = name_tokens(presets[kind], out)
                make_tokens(options.source, tokens)
                train(presets[kind], tokens, seed, out / kind / f"seed{seed}", options.minutes)
    found = {}
    for kind in only:
        tokens = name_tokens(presets[kind], out)
        if (tokens / "meta.json").is_file():
            nats = len(read_meta(tokens).grid) * math.log(2)
            scale = nats if reference.unit == "nats" else 1.0  # as many ids as pixels
            every = (read_run(out / kind / f"seed{seed}", reference, scale) for seed in range(options.seeds))
            if runs := [run for run in every if run]:
                found[kind] = runs
    if not found:
        raise SystemExit(f"out={options.out}: nothing was trained there; remove train=false")
    print(f"\n{options.data}: {reference.unit}; published: {reference.source}\n")
    print(table_head("model", "published", "test", "over draws", "validation", "seeds", "steps", "minutes", "machine"))
    names = list(dict.fromkeys([*reference.published, *only]))
    for kind in sorted(names, key=lambda name: -reference.published.get(name, math.inf)):
        print(format_row(kind, reference, found.get(kind, []), "not run" if kind in presets else ""))
    print(f"\ncurves: {draw_curves(found, reference, f'{options.data}: training', out / 'curves.png')}")


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    if options.data not in REFERENCES:
        raise SystemExit(f"data={options.data}: choose from {', '.join(REFERENCES)}")
    use_threads(options.threads)
    compare(options, Path(options.out).absolute() / options.data)


if __name__ == "__main__":
    main()
