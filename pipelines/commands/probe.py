"""Measure the accuracy of linear probes that predict classes from each layer of a prior.

For comparison, probes are also fitted to pixels and codes, which need no prior, and to the same prior with random
weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from tokenizer.files import write_json

from ..config import OutputConfig, UserError, run_command
from ..config.table import table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import ImageDataset
from ..images.pictures import write_picture
from ..metrics.charts import BLUE, GREY, Pixels, render
from ..options import UsesImages
from ..provenance import defaults
from ..representation import embed_layers, read_batch
from ..shuffling import random_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRENGTH = 0.1  # scikit-learn's C, the inverse L2 penalty: within one point of the best value on digits
WIDEST = 1 << 14  # maximum number of features; wider probes would take too long
Labelled = tuple[Tensor, Tensor]
"""uint8 images `(n, C, H, W)` and their classes `(n,)`."""


class ProbeConfig(UsesImages, OutputConfig):
    examples = ("pipeline=runs/gpt_digits/pipeline",)
    often = "pipeline out overwrite num_train num_test data.source device"

    out: str | None = Field(
        None, description="folder for probe.json and probe.png; default: beside the pipeline folder"
    )
    num_train: int = Field(5000, ge=10, description="maximum number of training images")
    num_test: int = Field(2000, ge=1, description="maximum number of held-out images")
    seed: int = Field(0, ge=0, description="seed for choosing images and for the random weights")


@dataclass(frozen=True)
class Probe:
    """Accuracy on held-out images with these features, and with those of the prior with random weights."""

    features: str
    accuracy: float
    random_accuracy: float | None = None


def run(config: ProbeConfig) -> list[Probe]:
    """Fit the probes, print a table, write `probe.json` and `probe.png`, and return the rows."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise UserError('smalti probe needs scikit-learn: pip install "smalti[probe]"') from error
    local = Path(config.pipeline).is_dir()
    out = Path(config.out or (Path(config.pipeline).parent / "probe" if local else "probe"))
    output = Output(out, [config.pipeline, config.data.path], config.overwrite)
    output.check_files(["probe.png", "probe.json"])
    with lock_output(out):
        pipeline = config.load_pipeline()
        splits = config.load_images(pipeline)
        train = choose_labelled(splits.train, config.num_train, config.seed)
        test = choose_labelled(splits.held_out, config.num_test, config.seed)
        layers = [f"prior.{index}" for index in range(pipeline.prior.feature_layers)]
        random = measure_accuracy(randomize_prior(pipeline, config.seed), layers, train, test)
        accuracies = measure_accuracy(pipeline, ["pixels", "codes", *layers], train, test)
        rows = [Probe(name, accuracy, random.get(name)) for name, accuracy in accuracies.items()]
        cells = [("features", "accuracy", "random weights")]
        for row in rows:
            control = "" if row.random_accuracy is None else f"{row.random_accuracy:.1%}"
            cells.append((row.features, f"{row.accuracy:.1%}", control))
        common = int(test[1].bincount().max()) / len(test[1])
        print(table(cells, right=[1, 2]))
        print(f"\n{len(test[1]):,} held-out images; the most frequent class has {common:.1%}")
        with output.files() as folder:
            write_picture(draw_bars(rows), folder / "probe.png")
            write_json(folder / "probe.json", {"probes": [asdict(row) for row in rows]})
        print(f"\nprobe.json and probe.png: {out}")
    return rows


def choose_labelled(split: ImageDataset, count: int, seed: int) -> Labelled:
    """Return up to `count` random images. Raises `UserError` unless they have at least two classes."""
    chosen = random_rows(len(split), count, seed)
    if split.labels is None or len(split.labels[chosen].unique()) < 2:
        raise UserError("data.label_column: a probe needs images of at least two classes")
    return split.pixels(chosen), split.labels[chosen]


def randomize_prior(pipeline: ImagePipeline, seed: int) -> ImagePipeline:
    """Return the pipeline with an untrained prior of the same configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # only the CPU's generator, which draws the weights
        prior = type(pipeline.prior)(pipeline.prior.config)
    others = pipeline.condition_tokenizers
    return ImagePipeline(pipeline.tokenizer, prior.to(pipeline.device), condition_tokenizers=others)


def measure_accuracy(pipeline: ImagePipeline, layers: list[str], train: Labelled, test: Labelled) -> dict[str, float]:
    """Return the accuracy of a probe for each layer that is not too wide. The prior gets no condition."""

    def embed(images: Tensor) -> list[Tensor]:
        batch = read_batch(pipeline, images)
        return embed_layers(pipeline, batch, pipeline.read_given(count=len(batch)), layers)

    first = embed(train[0][:1])
    layers = [layer for layer, features in zip(layers, first, strict=True) if features.shape[1] <= WIDEST]
    features, unseen = (embed(images) for images, _ in (train, test))
    return {
        layer: fit_probe(fitted, new, train[1], test[1])
        for layer, fitted, new in zip(layers, features, unseen, strict=True)
    }


def fit_probe(features: Tensor, unseen: Tensor, labels: Tensor, truth: Tensor) -> float:
    """Fit a logistic regression to standardised `features` (n, dim); return its accuracy on `unseen` (m, dim)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
    model.fit(features.cpu().numpy(), labels.numpy())
    return float(model.score(unseen.cpu().numpy(), truth.numpy()))


def draw_bars(rows: list[Probe]) -> Pixels:
    """Draw the accuracies as bars, with those of random weights in grey."""

    def draw(figure: Figure) -> None:
        axes, names = figure.subplots(), [row.features for row in rows]
        axes.bar_label(axes.barh(names, [100 * row.accuracy for row in rows], color=BLUE), fmt="%.1f", padding=4)
        axes.barh(names, [100 * (row.random_accuracy or 0) for row in rows], 0.2, color=GREY)
        axes.set(title="Linear probes (grey: random weights)", xlabel="accuracy on held-out images, %", xlim=(0, 108))
        axes.invert_yaxis()

    return render(720, 100 + 34 * len(rows), draw)


main = partial(run_command, ProbeConfig, run, verb="probe", description=__doc__, defaults=defaults)
