"""Measure what `smalti infer` says of held-out images: classes, numbers, several images of one object, and classes that
are new.

    python -m benchmarks.uses.infer
    python -m benchmarks.uses.infer only=garments before=FOLDER

    garments   the class, by the pipeline of the package, and by that in the folder `before`
    digits     slant and thickness of digits, each alone, and given the other
    signs      the class of traffic signs, from one photograph, and from those of one physical sign; the class
               `LEFT_OUT` is not trained on: the AUROC of "none of these", by several scores
    nuclei     the number of nuclei in 64 x 64 pixels; beside a convolutional network that is trained for this number on
               the same crops, for as many processor seconds as both stages

Images are folders `fashion_mnist`, `mnist`, `traffic_signs` and `nuclei` below SMALTI_DATA; what is missing is left
out. Models are trained with the commands that users have. One half of the held-out images, or objects, calibrates, and
the other half is measured (garments: a sixteenth). Intervals are of 95 %, over units. Pictures are saved in `out`.
"""

from __future__ import annotations

import csv
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.support.condition_data import make_data
from benchmarks.support.options import ROOT, choose, image_folder, read_options, use_threads
from benchmarks.support.runs import encode_once, load_pipeline, train_once
from benchmarks.support.tables import cache_json, table_head, table_row
from pipelines import ImagePipeline
from pipelines.commands.calibrate import main as calibrate
from pipelines.images import ImageDataset, load_images
from pipelines.images.pictures import save_picture
from pipelines.inference.posterior import Posterior, RangePosterior
from pipelines.inference.scales import calibrate_column
from pipelines.metrics.charts import BLUE, GREY, render
from pipelines.metrics.inferred import score_posterior, summarize
from pipelines.metrics.localization import auroc, auroc_interval
from pipelines.provenance import inherit, trained_data
from pipelines.tokens import load_tokens

OPTIONS = {
    "only": None,
    "before": None,
    "limit": 10_000,
    "tokenizer_steps": 1000,
    "steps": 1500,
    "seed": 0,
    "out": "runs/infer",
    "threads": 0,
}
LEFT_OUT = "no entry"
SIDE = 64
"""Of the crops of nuclei."""
SEED = 0
"""Of the halves that calibrate and measure."""
HEAD = (
    "column",
    "given",
    "units",
    "right, or correlation",
    "error",
    "log score",
    "calibration error",
    "in sets at 90 %",
)


@dataclass(frozen=True)
class Measured:
    """What was inferred of units (images or objects), their true values, and the scores of `score_posterior`."""

    posterior: Posterior
    truth: Tensor
    scores: Tensor


# Measurements -------------------------------------------------------------------------------------


def measure(
    pipe: ImagePipeline,
    images: Tensor,
    column: str,
    truth: Tensor,
    *,
    condition: Any = None,
    groups: Sequence[str] | None = None,
    share: int = 2,
) -> Measured:
    """Calibrate with every `share`-th unit (an image or an object), and infer the column of the others."""
    names = [str(row) for row in range(len(images))] if groups is None else list(groups)
    units = np.random.default_rng(SEED).permutation(sorted(set(names)))
    fitted = set(units[::share].tolist())
    known = torch.tensor([name in fitted for name in names])
    given = pipe.read_given(None, condition, len(images))

    def of(rows: Tensor) -> tuple[Any, list[str] | None]:
        return given[rows], None if groups is None else [names[row] for row in rows.tolist()]

    fitting, scoring = (torch.nonzero(part)[:, 0] for part in (known, ~known))
    some, objects = of(fitting)
    calibrate_column(pipe, images[fitting], column, truth[fitting], condition=some, groups=objects)
    some, objects = of(scoring)
    posterior = pipe.infer(images[scoring], column, condition=some, groups=objects)
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    rows = scoring if groups is None else torch.tensor([first[name] for name in posterior.rows])
    return score(pipe, posterior, column, truth[rows])


def score(pipe: ImagePipeline, posterior: Posterior, column: str, raw: Tensor) -> Measured:
    """Compare a posterior with raw true values, one per row."""
    truth = pipe.columns[column].to_targets(raw)
    return Measured(posterior, truth, score_posterior(posterior, truth).double())


def print_measured(name: str, given: str, found: Measured) -> None:
    """Print a row of the table."""
    posterior, truth = found.posterior, found.truth
    errors, covered = found.scores[:, 0], found.scores[:, -1]
    figures = summarize(found.scores, is_listed=not isinstance(posterior, RangePosterior))
    if isinstance(posterior, RangePosterior):
        right, error = f"r = {np.corrcoef(posterior.mean, truth)[0, 1]:.3f}", f"{figures['error']:.3g}"
    else:
        right, error = share(1 - errors), ""
    known = covered[~covered.isnan()]
    fitted = max(len(scale.denser) for scale in posterior.scales)
    inside = share(known, fitted) if len(known) else "not calibrated"
    more = [f"{figures[key]:.3f}" for key in ("log_score", "calibration_error")]
    print(table_row([name, given, f"{len(truth):,}", right, error, *more, inside]), flush=True)


def share(events: Tensor, fitted: int | None = None) -> str:
    """Format a share of units in percent with its Wilson interval; of what is inside regions whose level was fitted to
    `fitted` units, as wide as these and the measured units let it scatter."""
    n, p, z = float(len(events)), float(events.double().mean()), 1.96
    n = n if fitted is None else 1 / (1 / n + 1 / (fitted + 2))
    middle, half = p + z**2 / 2 / n, z * math.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return f"{100 * p:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def bins(found: Measured, count: int = 15) -> list[tuple[float, float, int]]:
    """Return the mean confidence, the share that is right, and the number of units in each bin of confidence."""
    confidence = found.scores[:, 2]
    right, place = 1 - found.scores[:, 0], (confidence * count).long().clamp(max=count - 1)
    parts = [place == bin for bin in range(count)]
    return [
        (float(confidence[part].mean()), float(right[part].mean()), int(part.sum())) for part in parts if part.any()
    ]


def draw_calibration(curves: dict[str, Measured], path: Path) -> None:
    """Plot calibration: of classes the share that is right against the confidence; of numbers the share of true values
    in regions against their credible level, before levels are calibrated."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, found in curves.items():
            if isinstance(found.posterior, RangePosterior):
                level = found.scores[:, 3].sort().values
                axes.plot(level, (torch.arange(len(level)) + 1) / len(level), label=name)
            else:
                points = [(c, r) for c, r, n in bins(found) if n >= 10]
                axes.plot(*zip(*points, strict=True), "o-", label=name)
        axes.plot([0, 1], [0, 1], color=GREY, zorder=0)
        axes.set(xlabel="confidence, or credible level", ylabel="right, or inside", xlim=(0, 1), ylim=(0, 1))
        axes.legend()

    save_picture(render(480, 420, draw), path, overwrite=True)


def draw_examples(images: Tensor, found: Posterior, path: Path, truth: Sequence[str]) -> None:
    """Draw images beside what is inferred of them."""
    count = min(4, len(images))

    def draw(figure: Any) -> None:
        for row in range(count):
            left, right = figure.add_subplot(count, 2, 2 * row + 1), figure.add_subplot(count, 2, 2 * row + 2)
            pixels = ((images[row] + 1) / 2).clamp(0, 1).permute(1, 2, 0)
            left.imshow(pixels.expand(-1, -1, 3), interpolation="nearest")
            left.set(xticks=[], yticks=[], ylabel=truth[row])
            found.plot_row(right, row, BLUE)
            if row == count - 1:
                right.set(xlabel=found.name)

    save_picture(render(560, 130 * count, draw), path, overwrite=True)


def read_split(pipe: ImagePipeline, source: Path | None = None, part: str = "held_out") -> ImageDataset:
    """Return a part of the images of a pipeline, which may have moved to `source`."""
    data = trained_data(pipe.provenance)
    assert data is not None
    if source is not None:
        data = data.model_copy(update={"source": str(source)})
    found: ImageDataset = getattr(load_images(data, inherited=inherit(data, pipe.provenance)), part)
    return found


def read_all(images: ImageDataset) -> Tensor:
    return images.batch(np.arange(len(images)))


def train(
    name: str, options: SimpleNamespace, out: Path, source: Sequence[str], steps: tuple[int, int], *more: str
) -> ImagePipeline:
    """Train both stages with the presets of `name`, and return the pipeline. more: settings of the tokens."""
    seed, presets = f"train.seed={options.seed}", ROOT / "configs"
    train_once("train_tokenizer", presets / f"tokenizer/vqvae_{name}.yaml", steps[0], out / "tokenizer", *source, seed)
    encode_once(out / "tokenizer", out / "tokens", *more)
    prior = [f"tokens={out / 'tokens'}", seed, "sampler={}"]
    train_once("train_prior", presets / f"prior/gpt_{name}.yaml", steps[1], out / "prior", *prior)
    pipe: ImagePipeline = load_pipeline(out / "prior")
    return pipe


# Tasks --------------------------------------------------------------------------------------------


def infer_garments(options: SimpleNamespace, out: Path) -> dict[str, Measured]:
    curves, source = {}, image_folder("fashion_mnist")
    for name, folder in {"garments": "garments", "garments, before": options.before}.items():
        if folder is None:
            continue
        pipe = ImagePipeline.from_pretrained(folder)
        held_out = read_split(pipe, source)
        images = read_all(held_out)
        assert held_out.labels is not None
        start = time.monotonic()
        found = measure(pipe, images, "label", held_out.labels, share=16)
        print(f"{1000 * (time.monotonic() - start) / len(images):.0f} ms per image", flush=True)
        print_measured(name, "", found)
        curves[name] = found
    return curves


def infer_digits(options: SimpleNamespace, out: Path) -> dict[str, Measured]:
    data, columns = make_data("digits", options.limit, out / "data"), ("slant", "thickness")
    source = [f"data.source={data / 'images'}", "data.image_size=28"]
    given = "attributes={slant: {column: slant}, thickness: {column: thickness}}"
    pipe = train("digits", options, out, source, (options.tokenizer_steps, options.steps), given)
    images = read_all(read_split(pipe))
    test = load_tokens(str(out / "tokens")).splits["test"].given[:]
    curves = {}
    for column, other in (columns, columns[::-1]):
        for others in ([], [other], [other, "label"]):
            known = test.without(set(test.names) - {*others})
            found = measure(pipe, images, column, test.raw(column), condition=known)
            print_measured(column, ", ".join(others), found)
            curves[column if not others else f"{column} given {', '.join(others)}"] = found
    one = pipe.infer(images[:4], "thickness")
    truth = [f"{float(value):.2f}" for value in test.raw("thickness")[:4]]
    draw_examples(images[:4], one, out / "examples.png", truth)
    return curves


def infer_signs(options: SimpleNamespace, out: Path) -> dict[str, Measured]:
    data = out / "data"
    if not data.is_dir():
        write_signs(out)
    source = [f"data.source={data}", "data.image_size=32", r"data.group=^(.*/\d+)_", "data.held_out_fraction=0.2"]
    source += ["model.factor=4", "model.quantizer.rate=0.1", "critic.weight=0", "data.augment={}"]
    pipe = train("openmoji", options, out, source, (options.tokenizer_steps, options.steps))
    held_out = read_split(pipe)
    images = read_all(held_out)
    objects = held_out.objects()
    assert held_out.labels is not None and objects is not None
    curves = {"signs, one photograph": measure_one(pipe, images, held_out.labels, objects)}
    curves["signs, all photographs of a sign"] = measure(pipe, images, "label", held_out.labels, groups=objects)
    for name, found in curves.items():
        print_measured("class", name, found)
    calibrate([f"pipeline={out / 'prior/pipeline'}", "every=2"])
    pipe = load_pipeline(out / "prior")
    rows = np.flatnonzero(~np.isin(objects, np.unique(objects)[::2]))  # which were not calibrated with
    new = pipe.to_images([Image.open(path).convert("RGB") for path in sorted((out / "left_out").glob("*.png"))])
    both, anomalous = torch.cat([images[rows], new]), np.arange(len(rows) + len(new)) >= len(rows)
    scores = {method: pipe.anomaly_score(both, method).numpy() for method in ("joint", "neighbours", "nll")}
    scores["entropy of the class"] = pipe.infer(both, "label").entropy.numpy()
    print(table_head(f"none of these: {LEFT_OUT!r}", "AUROC"))
    for name, values in scores.items():
        value = auroc(values, anomalous)
        low, high = auroc_interval(value, len(rows), len(new))
        print(table_row([name, f"{value:.3f} ({low:.3f} to {high:.3f}, as if images were independent)"]), flush=True)
    print(table_head(*HEAD))
    names = pipe.class_names(held_out.labels[:400:100])
    draw_examples(images[:400:100], pipe.infer(images[:400:100], "label"), out / "examples.png", names)
    return curves


def measure_one(pipe: ImagePipeline, images: Tensor, labels: Tensor, objects: list[str]) -> Measured:
    """Infer the class of one photograph of each sign; the others do not count."""
    firsts = sorted({name: row for row, name in reversed(list(enumerate(objects)))}.values())
    return measure(pipe, images[firsts], "label", labels[firsts], groups=[objects[row] for row in firsts])


def write_signs(out: Path) -> None:
    """Write the training photographs as `data/CLASS/SIGN_ROW.png`, those of `LEFT_OUT` into `left_out`."""
    from datasets import load_dataset

    rows = load_dataset(str(image_folder("traffic_signs")), split="train")
    names, work = rows.features["label"].names, out / ".data"
    for number, row in enumerate(rows):
        name = names[row["label"]]
        file = f"{row['sign'].replace('-', '')}_{number}.png"
        path = out / "left_out" / file if name == LEFT_OUT else work / name.replace("/", " ") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    work.rename(out / "data")


def infer_nuclei(options: SimpleNamespace, out: Path) -> dict[str, Measured]:
    if not (out / "data").is_dir():
        write_nuclei(out)
    source = [f"data.source={out / 'data'}", f"data.image_size={SIDE}", "data.channels=1", "data.group=image"]
    source += ["model.quantizer.rate=0.1", "critic.weight=0", "data.augment={}"]
    steps = options.tokenizer_steps // 2, options.steps // 2

    def train_both() -> ImagePipeline:
        return train("openmoji", options, out, source, steps, "attributes={nuclei: {column: nuclei}}")

    def measure_seconds() -> float:
        before = spent()
        train_both()
        return spent() - before

    seconds = cache_json(out / "seconds.json", measure_seconds)
    pipe = train_both()
    images = read_all(read_split(pipe))
    tokens = load_tokens(str(out / "tokens")).splits
    raw = tokens["test"].given[:].raw("nuclei")
    found = measure(pipe, images, "nuclei", raw)
    print_measured("nuclei", "", found)
    trained_on = read_split(pipe, part="train")
    counts = tokens["train"].given[:].raw("nuclei")
    guess = regress(read_all(trained_on), counts, images, seconds)
    print(f"a convolutional network of {seconds:.0f} s: mean error {float((guess - raw[:, 0]).abs().mean()):.3f}")
    print(f"the median of training: {float((counts.median() - raw[:, 0]).abs().mean()):.3f}", flush=True)
    some = raw[:, 0].argsort()[[len(raw) * part // 100 for part in (50, 75, 90, 99)]].tolist()
    draw_examples(
        images[some],
        pipe.infer(images[some], "nuclei"),
        out / "examples.png",
        [f"{float(raw[row]):.0f}" for row in some],
    )
    return {"nuclei": found}


def spent() -> float:
    """Return the processor seconds of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def write_nuclei(out: Path) -> None:
    """Write crops of 64 x 64 pixels, and in `metadata.csv` the image, and the number of nuclei whose centres lie
    in the crop."""
    from scipy import ndimage

    source, work = image_folder("nuclei"), out / ".data"
    for split in ("train", "test"):
        (work / split).mkdir(parents=True, exist_ok=True)
        rows = [("file_name", "image", "nuclei")]
        for path in sorted((source / split / "images").glob("*.png")):
            pixels = np.asarray(Image.open(path).convert("L"))
            marks, count = ndimage.label(
                np.asarray(Image.open(source / split / "masks" / path.name).convert("L")) > 200
            )
            centres = np.array(ndimage.center_of_mass(marks > 0, marks, range(1, count + 1))).reshape(-1, 2)
            for top in range(0, pixels.shape[0] - SIDE + 1, SIDE):
                for left in range(0, pixels.shape[1] - SIDE + 1, SIDE):
                    inside = ((centres >= (top, left)) & (centres < (top + SIDE, left + SIDE))).all(1).sum()
                    name = f"{path.stem}_{top}_{left}.png"
                    Image.fromarray(pixels[top : top + SIDE, left : left + SIDE]).save(work / split / name)
                    rows.append((name, path.stem, str(inside)))
        with (work / split / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    work.rename(out / "data")


def regress(images: Tensor, truth: Tensor, test: Tensor, seconds: float) -> Tensor:
    """Train a convolutional network with flips and quarter turns to regress a number for so many processor seconds,
    and return its values for test images `(n,)`."""
    torch.manual_seed(SEED)
    layers: list[nn.Module] = []
    for width, last in ((32, 1), (64, 32), (96, 64), (128, 96)):
        layers += [nn.Conv2d(last, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1))
    optimizer, until, start = torch.optim.AdamW(net.parameters(), 2e-3), spent() + seconds, spent()
    while spent() < until:
        rows = torch.randint(len(images), (64,))
        batch = images[rows].rot90(int(torch.randint(4, ())), (2, 3))
        batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
        optimizer.param_groups[0]["lr"] = 2e-3 * max(0.0, 1 - (spent() - start) / seconds)
        loss = (net(batch)[:, 0] - truth[rows, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return torch.cat([net.eval()(part)[:, 0] for part in test.split(256)])


SOURCES = {"garments": "fashion_mnist", "digits": "mnist", "signs": "traffic_signs", "nuclei": "nuclei"}
TASKS = {"garments": infer_garments, "digits": infer_digits, "signs": infer_signs, "nuclei": infer_nuclei}


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    use_threads(options.threads)
    for name in choose(options.only, list(TASKS)):
        if not image_folder(SOURCES[name]).is_dir():
            print(f"{name}: no folder {image_folder(SOURCES[name])}")
            continue
        out = Path(options.out).absolute() / name
        out.mkdir(parents=True, exist_ok=True)
        print(f"\n{table_head(*HEAD)}", flush=True)
        draw_calibration(TASKS[name](options, out), out / "calibration.png")


if __name__ == "__main__":
    main()
